"""Where the time of a process goes: py-spy's samples, by the part of the program that they fall into."""

import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

RATE = 200
"""Samples per second."""

OTHER = "everything else"

_SOCKETS = "kernel: sockets and epoll"
_MEMORY = "kernel: memory"
_PROTECTION = "packet protection: aioquic.quic.crypto, cryptography"

_SYSTEM_CALLS = {
    **dict.fromkeys(("sendto", "sendmsg", "recvfrom", "recvmsg", "recv", "epoll_wait", "epoll_ctl"), _SOCKETS),
    **dict.fromkeys(("mmap", "mmap64", "munmap", "mremap", "madvise", "brk", "sbrk"), _MEMORY),
}

_PARTS = (
    ("aioquic/_crypto", _PROTECTION),
    ("aioquic/quic/crypto", _PROTECTION),
    ("cryptography/", _PROTECTION),
    ("libcrypto", _PROTECTION),
    ("aioquic/tls", "TLS: aioquic.tls"),
    ("aioquic/h3/", "HTTP/3: aioquic.h3, pylsqpack"),
    ("pylsqpack", "HTTP/3: aioquic.h3, pylsqpack"),
    ("aioquic/quic/recovery", "recovery: aioquic.quic.recovery, congestion"),
    ("aioquic/quic/congestion", "recovery: aioquic.quic.recovery, congestion"),
    ("aioquic/quic/packet", "packets: aioquic.quic.packet, packet_builder, buffer"),
    ("aioquic/buffer", "packets: aioquic.quic.packet, packet_builder, buffer"),
    ("aioquic/_buffer", "packets: aioquic.quic.packet, packet_builder, buffer"),
    ("aioquic/quic/stream", "streams: aioquic.quic.stream, rangeset"),
    ("aioquic/quic/rangeset", "streams: aioquic.quic.stream, rangeset"),
    ("aioquic/quic/", "connection: aioquic.quic.connection"),
    ("aioquic/asyncio/", "server: aioquic.asyncio"),
    ("quicsteer/", "server: quicsteer"),
    ("asyncio/", "event loop: asyncio"),
    ("selectors.py", "event loop: asyncio"),
    ("uvloop", "event loop: uvloop"),
    ("benchmarks/", "application"),
)
"""What a frame's file begins or is named with, and the part that it belongs to; the first that fits."""


class Frame(NamedTuple):
    """A function, and the file or library that it is in."""

    function: str
    file: str

    def __str__(self) -> str:
        return f"{self.function} ({self.file})"

    @property
    def part(self) -> str | None:
        """The part of the program, or ``None`` for what works for whoever calls it."""
        if self.file.startswith("libc"):
            called = _SYSTEM_CALLS.get(self.function.lstrip("_"))
            if called:
                return called
        return next((part for name, part in _PARTS if name in self.file), None)


class Profile(NamedTuple):
    """Shares of the time, from 0 to 1, that sum up to 1: by part, and by function without what it calls.

    What belongs to no part, like ``enum`` or ``malloc``, counts for the function that called it.
    """

    parts: dict[str, float]
    functions: dict[str, float]
    samples: int


class ProfileFailed(Exception):
    """py-spy did not do it; the text says why."""


def find_py_spy() -> str | None:
    """Return the path of py-spy, of this Python's environment first."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")


def record(py_spy: str, pid: int, seconds: int) -> Profile:
    """Watch a process.

    Raises: ProfileFailed.
    """
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "stacks")
        command = [py_spy, "record", "--native", "--function", "--format", "raw", "--output", str(output)]
        command += ["--pid", str(pid), "--duration", str(seconds), "--rate", str(RATE)]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode or not output.exists():
            raise ProfileFailed(done.stderr.strip().partition("\n")[0] or f"exit status {done.returncode}")
        return add_up(_read_stacks(output.read_text().splitlines()))


def add_up(stacks: Iterable[tuple[list[Frame], int]]) -> Profile:
    """Return the shares of stacks, each with its innermost frame first and how often it was seen.

    Raises: ProfileFailed when there are none.
    """
    parts: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for frames, count in stacks:
        frame = next((frame for frame in frames if frame.part), None)
        parts[frame.part or OTHER if frame else OTHER] += count
        functions[str(frame or OTHER)] += count
    total = parts.total()
    if not total:
        raise ProfileFailed("no samples")
    return Profile(_shares(parts, total), _shares(functions, total), total)


def _shares(counts: Counter[str], total: int) -> dict[str, float]:
    return {name: count / total for name, count in counts.most_common()}


def _read_stacks(lines: Iterable[str]) -> Iterator[tuple[list[Frame], int]]:
    """Read py-spy's raw format: ``outermost (file:line);...;innermost (file:line) count``."""
    for line in lines:
        text, _, count = line.rpartition(" ")
        yield [_read_frame(frame) for frame in reversed(text.split(";"))], int(count)


def _read_frame(text: str) -> Frame:
    function, _, place = text.removesuffix(")").rpartition(" (")
    return Frame(function, place.partition(":")[0])
