"""The C sources of the benchmarks as libraries, compiled when they are first needed."""

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path

_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


@functools.cache
def load_library(name: str) -> ctypes.CDLL:
    """Compile the source ``name.c`` of this directory with ``CC``, ``cc`` by default, and load it.

    Raises: FileNotFoundError without a compiler, CalledProcessError when it fails.
    """
    source = Path(__file__).with_name(f"{name}.c")
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, f"{name}.so")
        subprocess.run([os.environ.get("CC", "cc"), *_FLAGS, source, "-o", output], check=True)
        return ctypes.CDLL(str(output))
