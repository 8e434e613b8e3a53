"""Floods: ``flood.c``, compiled when it is first needed and run in a process on a CPU of its own."""

import contextlib
import ctypes
import mmap
import multiprocessing
import os
import secrets
import signal
import socket
from collections.abc import Callable, Collection, Iterator
from enum import StrEnum
from multiprocessing.connection import Connection
from typing import Any

from quicsteer.abi import LONG_DCID_OFFSET

from ._compile import load_library

JUNK_SIZE = 64
INITIAL_SIZE = 1200  # the least that opens a connection (RFC 9000, 14.1)
CID_LENGTH = 8
SOURCES = 8
"""Sockets that a flood comes from."""

_PATIENCE = 40.0
_PR_SET_PDEATHSIG = 1


class Kind(StrEnum):
    """What a flood consists of. With ``NOTHING`` the sender is as busy as with the others, but sends none of it."""

    NOTHING = "nothing"
    JUNK = "junk"
    INITIALS = "Initials"


class _State(ctypes.Structure):
    _fields_ = [
        ("sockets", ctypes.POINTER(ctypes.c_int32)),
        ("datagram", ctypes.c_char_p),
        ("seed", ctypes.c_uint64),
        ("sent", ctypes.c_uint64),
        ("stop", ctypes.c_uint32),
        ("socket_count", ctypes.c_uint32),
        ("datagram_size", ctypes.c_uint32),
        ("cid_offset", ctypes.c_uint32),
        ("milliseconds", ctypes.c_uint32),
    ]


@contextlib.contextmanager
def flooding(kind: Kind, address: tuple[str, int], cpu: int, seconds: float) -> Iterator[Callable[[], int]]:
    """Flood an address from one CPU while the block runs, for ``seconds`` at most; yields what counts what was sent.

    Raises: OSError when a system call of the sender fails, TimeoutError when the flood ended before the block.
    """
    datagram, cid_offset = make_datagram(kind)
    library = load_library("flood")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(SOURCES)]
        for sock in sockets:
            sock.connect(address)
        state = _State.from_buffer(mmap.mmap(-1, mmap.PAGESIZE))  # shared with the process that is forked now
        state.sockets = (ctypes.c_int32 * SOURCES)(*(sock.fileno() for sock in sockets))
        state.datagram, state.datagram_size, state.cid_offset = datagram, len(datagram), cid_offset
        state.socket_count = 0 if kind is Kind.NOTHING else SOURCES
        state.milliseconds = round(seconds * 1000)
        state.seed = secrets.randbits(64)
        pipe = stack.enter_context(child({cpu}, _flood, library, state))
        hear(pipe)
        yield lambda: int(state.sent)
        early = pipe.poll()
        state.stop = 1
        error = -hear(pipe)
        if error:
            raise OSError(error, f"flood: {os.strerror(error)}")
        if early:
            raise TimeoutError(f"the flood ended after {seconds:g} s, before what it was to disturb")


def make_datagram(kind: Kind) -> tuple[bytes, int]:
    """Return a datagram and where its DCID begins.

    Junk looks like that of an established connection (RFC 9000, 17.3.1). An Initial has a true header (17.2.2), and
    nothing that could be decrypted.
    """
    if kind is not Kind.INITIALS:
        return b"\x40" + secrets.token_bytes(JUNK_SIZE - 1), 1
    head = b"\xc0\0\0\0\1" + (bytes([CID_LENGTH]) + secrets.token_bytes(CID_LENGTH)) * 2 + b"\0"
    rest = INITIAL_SIZE - len(head) - 2
    return head + (0x4000 | rest).to_bytes(2, "big") + secrets.token_bytes(rest), LONG_DCID_OFFSET


@contextlib.contextmanager
def child(cpus: Collection[int], target: Callable[..., None], *arguments: Any) -> Iterator["Connection[Any, Any]"]:
    """Run ``target(pipe, *arguments)`` in a forked process on some CPUs, with the other end of a pipe.

    It is killed when the block ends, and by the kernel when this process ends.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_enter, args=(cpus, os.getpid(), target, theirs, *arguments))
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def _enter(cpus: Collection[int], parent: int, target: Callable[..., None], *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:  # it may have ended before the kernel was told
        os.sched_setaffinity(0, cpus)
        target(*arguments)


def hear(pipe: "Connection[Any, Any]") -> Any:
    """Return what a child says next.

    Raises: TimeoutError when it says nothing, EOFError when it ended.
    """
    if not pipe.poll(_PATIENCE):
        raise TimeoutError(f"a process says nothing for {_PATIENCE:g} s")
    return pipe.recv()


def _flood(pipe: "Connection[Any, Any]", library: ctypes.CDLL, state: _State) -> None:
    pipe.send("started")
    pipe.send(library.flood(ctypes.byref(state)))
