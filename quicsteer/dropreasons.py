"""Why the kernel drops datagrams: counts by its own drop reasons, for the sockets on a port.

A small program on the raw tracepoint ``kfree_skb`` reads the port of the socket at which a packet is dropped, and
counts by reason. It needs CAP_BPF and CAP_PERFMON, and a kernel that tells the socket (Linux 6.11) and describes its
own types (CONFIG_DEBUG_INFO_BTF): where the port lies in a socket is looked up there, not assumed.
"""

import contextlib
import errno
import os
import struct
from collections.abc import Iterable, Iterator

from . import _kernel
from .btf import KERNEL, Types
from .errors import KernelError, QuicSteerError

CORE_REASONS = 512
"""Reasons that are told apart; those of other subsystems have larger numbers, and are not for UDP."""

_TRACEPOINT = "kfree_skb"
_ARGUMENTS = ["sk_buff", "", "skb_drop_reason", "sock"]
_REASON, _SOCKET = 8 * 2, 8 * 3
_PREFIX = "SKB_DROP_REASON_"

MEANINGS = {
    "SOCKET_RCVBUFF": "no room in the receive buffer",
    "SOCKET_FILTER": "swallowed by a filter: the sink, or a parked slot",
    "PROTO_MEM": "the memory for UDP was used up",
    "UDP_CSUM": "wrong checksum",
    "SKB_UCOPY_FAULT": "the reader's memory could not be written to",
    "XFRM_POLICY": "an IPsec policy forbids it",
    "NOMEM": "no memory",
}
"""What reasons mean at a UDP socket."""

# Operation codes and helpers of include/uapi/linux/bpf.h and linux/bpf_common.h.
_LOAD64, _LOAD16, _STORE32, _ATOMIC64 = 0x79, 0x69, 0x63, 0xDB
_MOVE, _MOVE_IMMEDIATE, _ADD_IMMEDIATE = 0xBF, 0xB7, 0x07
_JUMP_EQUAL, _JUMP_NOT_EQUAL, _CALL, _EXIT = 0x15, 0x55, 0x85, 0x95
_LOAD_MAP, _MAP_DESCRIPTOR = 0x18, 1
_MAP_LOOKUP, _PROBE_READ_KERNEL = 1, 113


def _instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("=BBhi", code, source << 4 | target, offset, immediate)


def counting_program(counts: int, port: int, port_offset: int) -> bytes:
    """Return the program: ``port_offset`` is where a ``struct sock`` has its local port, in the host's byte order."""
    end = 20  # where the two instructions are that return 0
    steps = [
        (_MOVE, 6, 1),  # the arguments of the tracepoint
        (_LOAD64, 3, 6, _SOCKET),
        (_JUMP_EQUAL, 3, 0, end - 3),
        (_ADD_IMMEDIATE, 3, 0, 0, port_offset),
        (_MOVE, 1, 10),
        (_ADD_IMMEDIATE, 1, 0, 0, -8),
        (_MOVE_IMMEDIATE, 2, 0, 0, 2),
        (_CALL, 0, 0, 0, _PROBE_READ_KERNEL),
        (_LOAD16, 1, 10, -8),
        (_JUMP_NOT_EQUAL, 1, 0, end - 10, port),
        (_LOAD64, 1, 6, _REASON),
        (_STORE32, 10, 1, -8),
        (_MOVE, 2, 10),
        (_ADD_IMMEDIATE, 2, 0, 0, -8),
        (_LOAD_MAP, 1, _MAP_DESCRIPTOR, 0, counts),
        (0,),  # the second half of the one before
        (_CALL, 0, 0, 0, _MAP_LOOKUP),
        (_JUMP_EQUAL, 0, 0, end - 18),
        (_MOVE_IMMEDIATE, 1, 0, 0, 1),
        (_ATOMIC64, 0, 1),
        (_MOVE_IMMEDIATE, 0, 0, 0, 0),
        (_EXIT,),
    ]
    return b"".join(_instruction(*step) for step in steps)


class DropReasons:
    """Counts drops at the sockets on some ports, in all network namespaces, until ``close()``.

    Raises:
        QuicSteerError: this host cannot; the text says why.
    """

    def __init__(self, ports: Iterable[int]) -> None:
        types = _read_types()
        offset = types.offset("sock_common", "skc_num")
        if types.arguments(_TRACEPOINT)[:4] != _ARGUMENTS or offset is None:
            raise QuicSteerError("this kernel does not tell at which socket it drops: that needs Linux 6.11 or later")
        self._names = types.enumerators("skb_drop_reason")
        with contextlib.ExitStack() as stack:
            try:
                self._counts = _closing(stack, _kernel.make_counts(CORE_REASONS))
                for port in ports:
                    program = _closing(stack, _kernel.load_tracing(counting_program(self._counts, port, offset)))
                    _closing(stack, _kernel.open_tracepoint(program, _TRACEPOINT.encode()))
            except KernelError as error:
                if error.errno not in (errno.EPERM, errno.EACCES):
                    raise
                raise QuicSteerError(f"drop reasons need CAP_BPF and CAP_PERFMON: {error}") from error
            self._stack = stack.pop_all()

    def read(self) -> dict[str, int]:
        """Return how many packets were dropped so far, by reason; most first."""
        counts = {
            name.removeprefix(_PREFIX): _kernel.read_count(self._counts, number)
            for number, name in self._names.items()
            if 0 <= number < CORE_REASONS
        }
        return dict(sorted(((name, count) for name, count in counts.items() if count), key=lambda each: -each[1]))

    def close(self) -> None:
        """Count no more."""
        self._stack.close()


@contextlib.contextmanager
def counting(ports: Iterable[int]) -> Iterator[DropReasons]:
    """Count drops at the sockets on some ports meanwhile.

    Raises: as ``DropReasons``.
    """
    reasons = DropReasons(ports)
    try:
        yield reasons
    finally:
        reasons.close()


def _closing(stack: contextlib.ExitStack, descriptor: int) -> int:
    stack.callback(os.close, descriptor)
    return descriptor


def _read_types() -> Types:
    try:
        return Types(KERNEL.read_bytes())
    except (OSError, ValueError) as error:
        raise QuicSteerError(f"this kernel does not describe its types in {KERNEL}: {error}") from error
