"""``lockstep.c``, compiled when it is first needed and called through ctypes."""

import ctypes
import ipaddress
import os
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from ._compile import load_library

BATCH = 64
TAG_LENGTH = 4
DATAGRAM_MAX = 2048


class Arrival(IntEnum):
    """Who must get the datagrams of a run."""

    AT_NAMED_SOCKET = 0
    AT_ANY_SOCKET = 1
    NOWHERE = 2


class Run(NamedTuple):
    """What one run sends where. ``datagrams`` are one for each flow, all of one size, each ending with its tag.

    ``source`` is the address of the first flow; the others follow, each with one of its own. ``segments`` are how many
    datagrams of a flow are sent as one (UDP_SEGMENT). ``named_only`` reads after each batch those sockets only that its
    tags name: for very many sockets.
    """

    clients: Sequence[int]
    sockets: Sequence[int]
    datagrams: Sequence[bytes]
    host: str
    port: int
    source: str
    arrival: Arrival
    batches: int
    segments: int = 1
    named_only: bool = False


class Result(NamedTuple):
    """What a run saw: nanoseconds of each batch's sending, and how many datagrams went astray.

    ``counts`` are the datagrams that each socket got.
    """

    send_ns: list[int]
    received: int
    misplaced: int
    lost: int
    late: int
    counts: list[int]


class _Lockstep(ctypes.Structure):
    _fields_ = [
        ("clients", ctypes.POINTER(ctypes.c_int32)),
        ("sockets", ctypes.POINTER(ctypes.c_int32)),
        ("datagrams", ctypes.c_char_p),
        ("send_ns", ctypes.POINTER(ctypes.c_uint64)),
        ("counts", ctypes.POINTER(ctypes.c_uint64)),
        ("client_count", ctypes.c_uint32),
        ("socket_count", ctypes.c_uint32),
        ("flow_count", ctypes.c_uint32),
        ("datagram_size", ctypes.c_uint32),
        ("segments", ctypes.c_uint32),
        ("host", ctypes.c_uint32),
        ("port", ctypes.c_uint32),
        ("source", ctypes.c_uint32),
        ("batch_count", ctypes.c_uint32),
        ("arrival", ctypes.c_uint32),
        ("named_only", ctypes.c_uint32),
        ("late", ctypes.c_uint32),
        ("received", ctypes.c_uint64),
        ("misplaced", ctypes.c_uint64),
        ("lost", ctypes.c_uint64),
    ]


def lockstep(run: Run) -> Result:
    """Send and drain ``run.batches`` batches.

    Raises: OSError when a system call fails.
    """
    datagrams = b"".join(run.datagrams)
    send_ns = (ctypes.c_uint64 * run.batches)()
    counts = (ctypes.c_uint64 * len(run.sockets))()
    state = _Lockstep(
        clients=(ctypes.c_int32 * len(run.clients))(*run.clients),
        sockets=(ctypes.c_int32 * len(run.sockets))(*run.sockets),
        datagrams=datagrams,
        send_ns=send_ns,
        counts=counts,
        client_count=len(run.clients),
        socket_count=len(run.sockets),
        flow_count=len(run.datagrams),
        datagram_size=len(run.datagrams[0]),
        segments=run.segments,
        host=int(ipaddress.IPv4Address(run.host)),
        port=run.port,
        source=int(ipaddress.IPv4Address(run.source)),
        batch_count=run.batches,
        arrival=run.arrival,
        named_only=run.named_only,
    )
    error = -load_library("lockstep").lockstep(ctypes.byref(state))
    if error:
        raise OSError(error, f"lockstep: {os.strerror(error)}")
    return Result(list(send_ns), state.received, state.misplaced, state.lost, state.late, list(counts))
