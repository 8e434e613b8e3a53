"""Who else has a UDP port on this host, read from /proc."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SOCKET_LINK = "socket:["
_UDP_TABLES = ("/proc/net/udp", "/proc/net/udp6")


class Holder(NamedTuple):
    """A UDP socket on a port: the uid that owns it, and where /proc allows, the process that has it open."""

    uid: int
    inode: int
    pid: int | None = None
    name: str | None = None

    def __str__(self) -> str:
        if self.pid is None:
            return f"a process of uid {self.uid}"
        return f"{self.name} (pid {self.pid}, uid {self.uid})"


def holders(port: int) -> list[Holder]:
    """Return the UDP sockets of this network namespace on a port; empty when there are none or /proc is hidden."""
    sockets = {inode: uid for local_port, uid, inode in _udp_sockets() if local_port == port}
    owners = _owners(set(sockets)) if sockets else {}
    return [Holder(uid, inode, *owners.get(inode, (None, None))) for inode, uid in sockets.items()]


def describe_holders(port: int) -> str:
    """Return who holds a port, each process once, or an empty string when nobody can be seen."""
    return ", ".join(dict.fromkeys(str(holder) for holder in holders(port)))


def _udp_sockets() -> Iterator[tuple[int, int, int]]:
    """Yield port, uid and inode of each UDP socket (columns of net/ipv4/udp.c, udp4_format_sock)."""
    for table in _UDP_TABLES:
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            yield int(fields[1].rpartition(":")[2], 16), int(fields[7]), int(fields[9])


def _owners(inodes: set[int]) -> dict[int, tuple[int, str]]:
    """Find a process for each socket inode; only processes whose descriptors this one may see."""
    found: dict[int, tuple[int, str]] = {}
    for directory in Path("/proc").glob("[0-9]*"):
        for inode in inodes & _open_sockets(directory / "fd"):
            with contextlib.suppress(OSError):  # it ended
                found.setdefault(inode, (int(directory.name), (directory / "comm").read_text().strip()))
    return found


def _open_sockets(descriptors: Path) -> set[int]:
    """Return the inodes of the sockets that a process has open; none when this one may not look."""
    inodes: set[int] = set()
    try:
        numbers = os.listdir(descriptors)
    except OSError:
        return inodes
    for number in numbers:
        with contextlib.suppress(OSError):  # closed meanwhile
            target = os.readlink(descriptors / number)
            if target.startswith(_SOCKET_LINK):
                inodes.add(int(target[len(_SOCKET_LINK) : -1]))
    return inodes
