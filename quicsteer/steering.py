"""The modes as objects with one interface: how a mode claims an address, steers, and counts.

One object serves the sockets of one address. It owns the descriptors of its program and maps, not the sockets.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from typing import Any

from . import _kernel
from .classic import steering_program
from .decision import Rules
from .errors import KernelError
from .modes import SteeringMode


class Steering:
    """One address without a program: sockets that share it by the kernel's hash, or a single one."""

    mode: SteeringMode
    has_sink = False

    def __init__(self, rules: Rules, descriptors: Sequence[int] = ()) -> None:
        self._rules = rules

    def bind_first(self, sock: socket.socket, address: Any) -> None:
        """Bind the first socket so that it claims the address: it fails with EADDRINUSE when anybody has it."""
        raise NotImplementedError

    def bind_next(self, sock: socket.socket, address: Any) -> None:
        """Bind another socket to the claimed address."""
        _share_port(sock)
        sock.bind(address)

    def fill(self, sockets: Sequence[socket.socket]) -> None:
        """Tell the program which socket is which slot; the sink comes last."""

    def read_counters(self, slot: int) -> tuple[int, ...] | None:
        """Return the datagrams of a slot by outcome, or ``None`` when this mode cannot know."""
        return None

    def set_listener(self, index: int, slot: int) -> None:
        """Write an entry of the dispatch table.

        Raises: NotImplementedError unless this mode has one.
        """
        raise NotImplementedError

    @property
    def descriptors(self) -> list[int]:
        """The descriptors of programs and maps that this object owns."""
        return []

    def close(self) -> None:
        """Close what this object owns."""


class SingleSteering(Steering):
    """One socket that shares its address with nobody."""

    mode = SteeringMode.SINGLE

    def bind_first(self, sock: socket.socket, address: Any) -> None:
        sock.bind(address)


class HashSteering(Steering):
    """The kernel's hash of addresses and ports over the sockets."""

    mode = SteeringMode.HASH

    def bind_first(self, sock: socket.socket, address: Any) -> None:
        # Bound without SO_REUSEPORT it meets no other socket; the kernel lets others join once it is set.
        sock.bind(address)
        _share_port(sock)


class ClassicSteering(Steering):
    """The decision as a classic BPF program, attached once and never replaced (CVE-2026-52910)."""

    mode = SteeringMode.CBPF
    has_sink = True

    def bind_first(self, sock: socket.socket, address: Any) -> None:
        # A socket that has its program before it is bound cannot join a group: that makes the claim atomic.
        _share_port(sock)
        rules = self._rules
        program = steering_program(rules.key, rules.cid_length, rules.listeners, rules.slots, rules.drop_invalid)
        _kernel.attach_classic(sock.fileno(), program)
        sock.bind(address)


class ExtendedSteering(Steering):
    """The decision as an eBPF program with a socket map, a dispatch table and counters."""

    mode = SteeringMode.EBPF
    has_sink = True

    def __init__(self, rules: Rules, descriptors: Sequence[int] = ()) -> None:
        super().__init__(rules)
        if descriptors:
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
        else:
            descriptors = _kernel.load_program(
                rules.key, rules.cid_length, rules.listeners, rules.slots, rules.drop_invalid
            )
        self._program, self._sockets, self._table, self._counters = descriptors

    @property
    def descriptors(self) -> list[int]:
        return [self._program, self._sockets, self._table, self._counters]

    def bind_first(self, sock: socket.socket, address: Any) -> None:
        _share_port(sock)
        _kernel.attach_program(sock.fileno(), self._program)
        sock.bind(address)

    def fill(self, sockets: Sequence[socket.socket]) -> None:
        for slot, sock in enumerate(sockets):
            _kernel.set_socket(self._sockets, slot, sock.fileno())

    def read_counters(self, slot: int) -> tuple[int, ...]:
        return _kernel.read_counters(self._counters, slot)

    def set_listener(self, index: int, slot: int) -> None:
        _kernel.set_listener(self._table, index, slot)

    def close(self) -> None:
        for name in ("_program", "_sockets", "_table", "_counters"):
            fd, nothing = getattr(self, name), -1
            setattr(self, name, nothing)
            if fd >= 0:
                os.close(fd)


_CLASSES: dict[SteeringMode, type[Steering]] = {
    cls.mode: cls for cls in (ExtendedSteering, ClassicSteering, HashSteering, SingleSteering)
}


def make_steering(mode: SteeringMode, rules: Rules, descriptors: Sequence[int] = ()) -> Steering:
    """Return the steering of one address; ``descriptors`` are those of one that is in the kernel already.

    Raises: KernelError when the kernel does not take the program.
    """
    return _CLASSES[mode](rules, descriptors)


def is_refusal(error: KernelError) -> bool:
    """Whether an error says that the mode does not work here, and not that the address or a limit is the trouble."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return False
    return error.call.startswith(("bpf(", "setsockopt(SO_ATTACH_REUSEPORT"))


def _share_port(sock: socket.socket) -> None:
    with contextlib.suppress(AttributeError):  # systems without it have no mode that shares
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
