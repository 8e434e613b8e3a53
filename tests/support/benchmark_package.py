"""Makes ``benchmarks`` importable without its parent, which holds the uncompiled package."""

import importlib.util
import sys
from pathlib import Path

_NAME = "benchmarks"


def load() -> None:
    """Import the package ``benchmarks`` of this source tree."""
    if _NAME in sys.modules:
        return
    directory = Path(__file__).parents[2] / _NAME
    spec = importlib.util.spec_from_file_location(
        _NAME, directory / "__init__.py", submodule_search_locations=[str(directory)]
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
