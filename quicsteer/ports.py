"""Who else has a UDP port on this host, read from /proc."""

import contextlib
import os
import socket
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

_SOCKET_LINK = "socket:["
_READS = 3
"""How often the tables are read: the kernel skips entries when others go while it lists them."""

_LISTENS = 1 << 16
"""Flag of a listening socket in /proc/net/unix (__SO_ACCEPTCON)."""

_UDP_TABLES = {socket.AF_INET: "/proc/net/udp", socket.AF_INET6: "/proc/net/udp6"}


class Holder(NamedTuple):
    """A UDP socket on a port: its host, the uid that owns it, and where /proc allows, a process that has it open."""

    host: str
    uid: int
    inode: int
    pid: int | None = None
    name: str | None = None

    def __str__(self) -> str:
        if self.pid is None:
            return f"a process of uid {self.uid}"
        return f"{self.name} (pid {self.pid}, uid {self.uid})"


def holders(port: int, besides: Collection[int] = ()) -> list[Holder]:
    """Return the UDP sockets of this network namespace on a port; empty when there are none or /proc is hidden.

    ``besides`` are inodes of sockets that are left out.
    """
    sockets = [
        Holder(host, uid, inode)
        for host, local_port, uid, inode in _udp_sockets()
        if local_port == port and inode not in besides
    ]
    owners = find_owners({holder.inode for holder in sockets})
    return [Holder(*holder[:3], *owners.get(holder.inode, ((None, None),))[0]) for holder in sockets]


def describe_holders(port: int) -> str:
    """Return who holds a port that is known to be held, each process once; an empty string when nobody can be seen."""
    for _ in range(_READS):
        found = holders(port)
        if found:
            return ", ".join(dict.fromkeys(map(str, found)))
    return ""


def _udp_sockets() -> Iterator[tuple[str, int, int, int]]:
    """Yield host, port, uid and inode of each UDP socket (columns of net/ipv4/udp.c, udp4_format_sock)."""
    for family, table in _UDP_TABLES.items():
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            host, _, port = fields[1].rpartition(":")
            yield _read_host(family, host), int(port, 16), int(fields[7]), int(fields[9])


def _read_host(family: int, text: str) -> str:
    """Read an address that the kernel prints as 32-bit words in the byte order of the machine."""
    words = (int(text[start : start + 8], 16) for start in range(0, len(text), 8))
    return socket.inet_ntop(family, b"".join(word.to_bytes(4, sys.byteorder) for word in words))


def find_owners(inodes: set[int]) -> dict[int, list[tuple[int, str]]]:
    """Return pid and name of the processes that have each socket inode open, as far as this one may see them."""
    found: dict[int, list[tuple[int, str]]] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()) if inodes else []:
        for inode in inodes & open_sockets(pid):
            with contextlib.suppress(OSError):  # it ended
                found.setdefault(inode, []).append((pid, _read_name(Path(f"/proc/{pid}/comm"))))
    return found


def open_sockets(pid: int) -> set[int]:
    """Return the inodes of the sockets that a process has open; none when this one may not look."""
    inodes: set[int] = set()
    descriptors = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(descriptors)
    except OSError:
        return inodes
    for number in numbers:
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(f"{descriptors}/{number}")
            if target.startswith(_SOCKET_LINK):
                inodes.add(int(target[len(_SOCKET_LINK) : -1]))
    return inodes


def find_control_socket(pid: int) -> Path | None:
    """Return the Unix socket on which a supervisor listens; ``None`` when it is none, or may not be looked at."""
    try:
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        lines = Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
    except OSError:
        return None
    if b"run" not in command_line or not any(b"quicsteer" in word for word in command_line):
        return None
    ours = open_sockets(pid)
    for line in lines:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and int(fields[3], 16) & _LISTENS and int(fields[6]) in ours:
            return Path(fields[7])
    return None


def _read_name(comm: Path) -> str:
    """Read what a process calls itself: any bytes, which must not reach a terminal as they are."""
    text = comm.read_bytes().decode(errors="replace").rstrip("\n")
    return "".join(character if character.isprintable() else "?" for character in text)
