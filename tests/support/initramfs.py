"""An initramfs in which a Python program runs: the host's interpreter, the built wheel, and files of the tests.

All lies in memory of the guest. It needs no disk, no network, and no module of the kernel.
"""

import gzip
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PROGRAM_DIRECTORY = Path("/srv/tests")

_LEFT_OUT = {"test", "idlelib", "tkinter", "ensurepip", "lib2to3", "turtledemo", "pydoc_data", "dist-packages"}
_OLDEST = (3, 11)
_COMPRESSION = 1  # unpacking is emulated

_INIT = """#!/bin/busybox sh
export PATH=/bin HOME=/ PYTHONPATH={path} PYTHONDONTWRITEBYTECODE=1
busybox mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
busybox mount -t proc none /proc
busybox mount -t sysfs none /sys
busybox mount -t tmpfs none /tmp
busybox ip link set lo up
{python} {program}
busybox poweroff -f
"""

_ASK = """
import importlib.machinery, json, os, sys, sysconfig
print(json.dumps([sys.version_info[:2], os.path.realpath(sys.executable), sysconfig.get_path("stdlib")]))
"""


class Interpreter:
    """A CPython of this host that can be packed: the distribution's own, or this one."""

    def __init__(self) -> None:
        for candidate in ("/usr/bin/python3", sys.executable):
            if Path(candidate).exists():
                answer = subprocess.run([candidate, "-I", "-c", _ASK], capture_output=True, text=True, check=True)
                version, executable, library = json.loads(answer.stdout)
                if tuple(version) >= _OLDEST:
                    self.executable, self.library = Path(executable), Path(library)
                    return
        raise RuntimeError("no Python 3.11 or later to pack")


def build(output: Path, wheel: Path, files: Iterable[Path], program: str) -> None:
    """Write an initramfs that runs ``program``, one of ``files``, and powers the machine off.

    Files of the tests keep their place: those of ``support`` lie beside ``vectors``.
    """
    staging = output.with_suffix(".d")
    interpreter = Interpreter()
    packages = staging / "srv/packages"
    packages.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    tests = staging / PROGRAM_DIRECTORY.relative_to("/")
    for file in files:
        target = tests / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, target)
    _stage_system(staging, interpreter, packages)
    path = ":".join(map(str, ("/srv/packages", PROGRAM_DIRECTORY / "support", PROGRAM_DIRECTORY / "kernels")))
    init = staging / "init"
    init.write_text(
        _INIT.format(path=path, python=interpreter.executable, program=PROGRAM_DIRECTORY / "kernels" / program)
    )
    init.chmod(0o755)
    with gzip.open(output, "wb", compresslevel=_COMPRESSION) as packed:
        for part in _archive(staging):
            packed.write(part)


def _stage_system(staging: Path, interpreter: Interpreter, packages: Path) -> None:
    for directory in ("dev", "proc", "sys", "tmp", "bin"):
        (staging / directory).mkdir()
    shutil.copy2(shutil.which("busybox") or "busybox", staging / "bin/busybox")
    library = staging / interpreter.library.relative_to("/")
    shutil.copytree(interpreter.library, library, symlinks=False, ignore=_left_out, ignore_dangling_symlinks=True)
    programs = [interpreter.executable, *library.glob("lib-dynload/*.so"), *packages.glob("*/*.so")]
    needed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    libraries = {Path(word) for line in needed.splitlines() for word in line.split() if word.startswith("/")}
    libraries = {path for path in libraries if path.suffix != ":" and not str(path).endswith(":")}
    for path in {interpreter.executable, *libraries}:
        target = staging / str(path).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def _left_out(directory: str, names: list[str]) -> set[str]:
    return {name for name in names if name in _LEFT_OUT or name.startswith("config-") or name.endswith(".a")}


def _archive(root: Path) -> Iterator[bytes]:
    """Yield a directory as a cpio archive of the format "newc" (Documentation/driver-api/early-userspace)."""
    paths = sorted(path for path in root.rglob("*"))
    for number, path in enumerate(paths, 1):
        status = path.stat()
        data = path.read_bytes() if path.is_file() else b""
        yield _entry(str(path.relative_to(root)), number, status, data)
    console = os.stat_result((stat.S_IFCHR | 0o600, 0, 0, 1, 0, 0, 0, 0, 0, 0))
    yield _entry("dev/console", len(paths) + 1, console, b"", device=(5, 1))
    yield _entry("TRAILER!!!", 0, os.stat_result((0,) * 10), b"")


def _entry(name: str, number: int, status: os.stat_result, data: bytes, device: tuple[int, int] = (0, 0)) -> bytes:
    encoded = name.encode() + b"\0"
    fields = (number, status.st_mode, 0, 0, 1, int(status.st_mtime), len(data), 0, 0, *device, len(encoded), 0)
    header = b"070701" + b"".join(b"%08x" % value for value in fields)
    return _pad(header + encoded) + _pad(data)


def _pad(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
