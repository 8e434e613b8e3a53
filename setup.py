"""Builds the extension; everything else about the package is in pyproject.toml."""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

STABLE_ABI = "0x030B0000"  # CPython 3.11

kernel = Extension(
    "quicsteer._kernel",
    sources=["quicsteer/_kernel.pyx", "csrc/sockets.c", "csrc/loader.c", "csrc/spawn.c", "csrc/trace.c"],
    depends=[
        "bpf/abi.h",
        *(
            f"csrc/{name}.h"
            for name in ("decide", "loader", "program", "result", "siphash", "sockets", "spawn", "trace", "types")
        ),
    ],
    include_dirs=["csrc", "bpf"],
    define_macros=[("Py_LIMITED_API", STABLE_ABI)],
    # No debug information: it names the directory of the build, and is most of the wheel.
    extra_compile_args=["-g0", *os.environ.get("QUICSTEER_CFLAGS", "").split()],
    py_limited_api=True,
)

setup(
    ext_modules=cythonize([kernel], language_level=3),
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
