"""Known numbers of datagrams, and the ways in which the kernel shows what became of them."""

import re
import socket
import struct
import subprocess
from pathlib import Path
from typing import NamedTuple

from steer import short_header

from quicsteer import GroupStats, SteeringGroup, Worker
from quicsteer.sockdiag import read_port

_SO_MEMINFO = 55  # include/uapi/asm-generic/socket.h
_MEMINFO = struct.Struct("=9I")
_SKMEM = re.compile(r"ino:(\d+).*skmem:\(r(\d+),rb(\d+),.*,d(\d+)\)")


class Memory(NamedTuple):
    """What a socket's receive queue is like."""

    queued: int
    buffer: int
    dropped: int


def overflow(group: SteeringGroup, worker: Worker, lost: int, client: socket.socket) -> int:
    """Fill a worker's queue, then send ``lost`` datagrams more; return how many the queue holds."""
    address = group.addresses[0]
    datagram = short_header(worker.connection_ids.issue(), 1200)
    held = 0
    before = dropped(group.stats(), worker.slot)
    while dropped(group.stats(), worker.slot) == before:
        client.sendto(datagram, address)
        held += 1
    for _ in range(lost - 1):
        client.sendto(datagram, address)
    return held - 1


def dropped(stats: GroupStats, slot: int) -> int:
    return sum(entry.dropped or 0 for entry in stats.slots if entry.slot == slot)


def by_socket_option(sockets: list[socket.socket]) -> list[Memory]:
    """What SO_MEMINFO says of sockets of this process."""
    read = [_MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)) for sock in sockets]
    return [Memory(words[0], words[1], words[8]) for words in read]


def by_ss(port: int) -> list[Memory]:
    """What iproute2's ``ss`` says of the sockets on a port, the oldest first."""
    listed = subprocess.run(["ss", "-HOunlaem", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
    found = [tuple(map(int, match.groups())) for match in map(_SKMEM.search, listed.splitlines()) if match]
    return [Memory(*figures[1:]) for figures in sorted(found)]


def by_sock_diag(port: int) -> list[Memory]:
    """What our own reader of sock_diag says."""
    return [Memory(sock.queued_bytes, sock.buffer_bytes, sock.dropped) for sock in read_port(port)]


def by_proc(port: int) -> list[tuple[int, int]]:
    """Queued bytes and drops that /proc/net/udp shows for the sockets on a port, the oldest first."""
    rows = [line.split() for line in Path("/proc/net/udp").read_text().splitlines()[1:]]
    ours = [row for row in rows if int(row[1].partition(":")[2], 16) == port]
    return [(int(row[4].partition(":")[2], 16), int(row[-1])) for row in sorted(ours, key=lambda row: int(row[9]))]
