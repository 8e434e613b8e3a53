"""The UDP sockets of all processes of this network namespace, as the kernel's sock_diag shows them.

Needs pyroute2 (the extra ``stats``) and no privilege; which process has a socket is only known where /proc tells.
"""

import importlib
import importlib.util
import socket
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from .errors import KernelError, QuicSteerError
from .ports import find_owners, open_sockets

_PACKAGE = "pyroute2"

# include/uapi/linux/inet_diag.h, include/net/tcp_states.h, include/uapi/linux/sock_diag.h
_SKMEMINFO = "INET_DIAG_SKMEMINFO"
_EXTENSIONS = 1 << 6
_CONNECTED, _UNCONNECTED = 1, 7
_STATES = 1 << _CONNECTED | 1 << _UNCONNECTED
_MEMINFO = struct.Struct("=9I")
_RECEIVED, _BUFFER, _DROPS = 0, 1, 8


class Process(NamedTuple):
    """A process that has a socket open."""

    pid: int
    name: str


@dataclass(frozen=True)
class SocketStats:
    """One UDP socket of this host.

    ``dropped`` counts the datagrams that the kernel dropped at this socket since it was made, modulo 2^32: for want of
    receive buffer, by a filter, or for a wrong checksum. ``queued_bytes`` and ``buffer_bytes`` are in the kernel's
    accounting. ``peer`` is set on a connected socket. ``cookie`` is the kernel's number of the socket, never used
    twice. ``processes`` has those that this process may see. ``grouped``: other sockets share the address, as
    in a group (SO_REUSEPORT).
    """

    address: tuple[str, int]
    peer: tuple[str, int] | None
    uid: int
    inode: int
    cookie: int
    dropped: int
    queued_bytes: int
    buffer_bytes: int
    grouped: bool
    processes: tuple[Process, ...]

    @property
    def fill(self) -> float:
        """How full the receive buffer is, from 0 to 1."""
        return min(self.queued_bytes / self.buffer_bytes, 1.0) if self.buffer_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain types for JSON, as docs/stats.md describes them."""
        return {
            **vars(self),
            "address": list(self.address),
            "peer": list(self.peer) if self.peer else None,
            "processes": [process._asdict() for process in self.processes],
        }


def read_port(port: int) -> list[SocketStats]:
    """Return the UDP sockets on a port by address, the oldest first: in a group, in the order of the slots.

    Raises:
        QuicSteerError: pyroute2 is not installed.
        KernelError: the kernel does not answer.
    """
    return _describe(_dump(port))


def read_process(pid: int) -> list[SocketStats]:
    """Return the bound UDP sockets that a process has open.

    Raises: as ``read_port``.
    """
    inodes = open_sockets(pid)
    return _describe(message for message in _dump(0) if message["idiag_inode"] in inodes)


def _dump(port: int) -> list[Any]:
    """Ask the kernel for the sockets on a port; 0 stands for all ports."""
    diag, exceptions = _import_pyroute2("netlink.diag", "netlink.exceptions")
    try:
        with diag.DiagSocket() as sock:
            return [
                message
                for family in (socket.AF_INET, socket.AF_INET6)
                for message in sock.get_sock_stats(
                    family=family, protocol=socket.IPPROTO_UDP, states=_STATES, extensions=_EXTENSIONS, sport=port
                )
                if message["idiag_sport"] == port or not port
            ]
    except OSError as error:
        raise KernelError(error.errno or 0, "socket(NETLINK_SOCK_DIAG)") from error
    except exceptions.NetlinkError as error:
        raise KernelError(error.code, "netlink(SOCK_DIAG_BY_FAMILY)") from error


def _describe(messages: Iterable[Any]) -> list[SocketStats]:
    found = sorted(messages, key=lambda message: (*_local(message), message["idiag_inode"]))
    sharing = Counter(_local(message) for message in found if not _peer(message))
    owners = find_owners({message["idiag_inode"] for message in found})
    return [
        SocketStats(
            address=_local(message),
            peer=_peer(message),
            uid=message["idiag_uid"],
            inode=message["idiag_inode"],
            cookie=message["idiag_cookie"],
            dropped=memory[_DROPS],
            queued_bytes=memory[_RECEIVED],
            buffer_bytes=memory[_BUFFER],
            grouped=sharing[_local(message)] > 1,
            processes=tuple(Process(*owner) for owner in owners.get(message["idiag_inode"], ())),
        )
        for message, memory in _with_memory(found)
    ]


def _with_memory(messages: Iterable[Any]) -> Iterator[tuple[Any, tuple[int, ...]]]:
    for message in messages:
        memory = dict(message["attrs"]).get(_SKMEMINFO)
        if memory is not None:  # absent where a socket ended meanwhile
            yield message, _MEMINFO.unpack(bytes.fromhex(memory.replace(":", "")))


def _local(message: Any) -> tuple[str, int]:
    return message["idiag_src"], message["idiag_sport"]


def _peer(message: Any) -> tuple[str, int] | None:
    return (message["idiag_dst"], message["idiag_dport"]) if message["idiag_state"] == _CONNECTED else None


def _import_pyroute2(*modules: str) -> list[ModuleType]:
    """Import the few modules that are needed of pyroute2.

    Its ``__init__`` loads all of its parts, which takes 0.1 s, half of what ``quicsteer stats`` may take. So they are
    loaded under an empty package, which then makes room for the real one.
    """
    names = [f"{_PACKAGE}.{module}" for module in modules]
    if _PACKAGE in sys.modules:
        return [importlib.import_module(name) for name in names]
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise QuicSteerError("sockets of other processes are read with pyroute2: pip install 'quicsteer[stats]'")
    package = ModuleType(_PACKAGE)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[_PACKAGE] = package
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        for loaded in [each for each in sys.modules if each.partition(".")[0] == _PACKAGE]:
            del sys.modules[loaded]
