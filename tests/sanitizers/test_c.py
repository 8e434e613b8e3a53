"""The C of the extension under sanitizers and valgrind, and function by function without growth."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_calls import CALLS
from steer import open_descriptors

from quicsteer import SteeringMode, _kernel

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
SOURCES = [HERE / "driver.c", *sorted((ROOT / "csrc").glob("*.c"))]
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g", "-O1", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'bpf'}"]
FAIL_ALLOCATIONS = "-Wl,--wrap=malloc,--wrap=calloc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
WARM_UP, ROUNDS = 60, 300
GROWTH = 192 << 10
"""Bytes that the allocator may take more for its own reasons: under one for each call."""


def build_driver(directory: Path, *options: str) -> Path:
    driver = directory / "driver"
    subprocess.run(["cc", *FLAGS, *options, *SOURCES, FAIL_ALLOCATIONS, "-o", driver], check=True)
    return driver


def run_clean(*command: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run a program that reports faults by its status."""
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
        cwd="/",
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"[-8000:]
    return done.stdout


def test_the_sources_under_sanitizers(ebpf: SteeringMode, tmp_path: Path) -> None:
    """Each function, each of its errors, each allocation and each descriptor that fails; leaks are errors."""
    assert run_clean(build_driver(tmp_path, *SANITIZERS), "5") == "5 rounds\n"


def test_the_sources_under_valgrind(ebpf: SteeringMode, tmp_path: Path) -> None:
    """Valgrind sees what sanitizers do not: values that were never written."""
    leaks = ("--leak-check=full", "--show-leak-kinds=all", "--errors-for-leak-kinds=all")
    children = "--child-silent-after-fork=yes"  # one that cannot execute its program ends with what its parent had
    options = ("-q", *leaks, children, f"--suppressions={HERE / 'valgrind.supp'}", "--error-exitcode=9")
    assert run_clean("valgrind", *options, build_driver(tmp_path), "1") == "1 rounds\n"


def test_the_extension_under_sanitizers(ebpf: SteeringMode, tmp_path: Path) -> None:
    """Built anew with its Cython part, and loaded into an ordinary interpreter."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("quicsteer", "csrc", "bpf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_kernel.c"))
    flags = " ".join((*SANITIZERS, "-g", "-O1"))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = {**os.environ, "QUICSTEER_CFLAGS": flags, "LDFLAGS": flags}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    libraries = [
        subprocess.run(["cc", f"-print-file-name=lib{name}.so"], check=True, capture_output=True, text=True).stdout
        for name in ("asan", "ubsan")
    ]
    sanitized = {
        "LD_PRELOAD": ":".join(path.strip() for path in libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter frees not everything at its end
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(tmp_path),
    }
    said = run_clean(sys.executable, ROOT / "tests/support/kernel_calls.py", "5", environment=sanitized)
    assert said == f"{len(CALLS)} functions, 5 rounds\n"


def test_every_function_of_the_extension_is_called() -> None:
    functions = {name for name in vars(_kernel) if callable(getattr(_kernel, name)) and not name.startswith("_")}
    assert functions - {"KernelError"} == set(CALLS)


def private_memory() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(size) << 10 for size in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.M))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_function_leaks_neither_memory_nor_descriptors(ebpf: SteeringMode, call: Callable[[], None]) -> None:
    for _ in range(WARM_UP):
        call()
    descriptors, memory = open_descriptors(), private_memory()
    for _ in range(ROUNDS):
        call()
    assert open_descriptors() == descriptors
    assert private_memory() - memory < GROWTH
    with contextlib.suppress(ChildProcessError):
        assert os.waitpid(-1, os.WNOHANG) == (0, 0)
