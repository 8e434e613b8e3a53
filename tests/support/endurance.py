"""How long the tests run that find more the longer they run: fuzzers and the soak."""

import os

_ELSEWHERE = 3.0


def seconds(name: str, in_ci: float) -> float:
    """Return the seconds for a test: what QUICSTEER_<name>_SECONDS says, ``in_ci`` in CI, a few elsewhere."""
    default = in_ci if os.environ.get("CI") else _ELSEWHERE
    return float(os.environ.get(f"QUICSTEER_{name}_SECONDS", default))
