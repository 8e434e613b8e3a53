"""Sending datagrams to a group and seeing where they arrive."""

import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from quicsteer import GroupStats, SteeringGroup, Worker
from quicsteer.abi import Outcome

VECTORS = Path(__file__).parent.parent / "vectors"


class Vector(NamedTuple):
    """One datagram of the shared table and what a group must do with it; ``slot`` None: any listener slot."""

    name: str
    datagram: bytes
    outcome: Outcome
    slot: int | None


class VectorGroup(NamedTuple):
    key: bytes
    cid_length: int
    listeners: int
    slots: int
    vectors: list[Vector]


def load_decisions() -> list[VectorGroup]:
    table = json.loads((VECTORS / "decide.json").read_text())
    return [
        VectorGroup(
            bytes.fromhex(group["key"]),
            group["cid_length"],
            group["listeners"],
            group["slots"],
            [
                Vector(row["name"], bytes.fromhex(row["datagram"]), Outcome[row["outcome"].upper()], row["slot"])
                for row in group["datagrams"]
            ],
        )
        for group in table["groups"]
    ]


def load_seals() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((VECTORS / "seal.json").read_text())
    return table


def receive_all(sock: socket.socket) -> list[bytes]:
    """Empty the queue of a non-blocking socket. On loopback a sent datagram is queued when send returns."""
    datagrams = []
    while True:
        try:
            datagrams.append(sock.recv(65535))
        except BlockingIOError:
            return datagrams


def arrivals(sockets: Iterable[socket.socket]) -> list[int]:
    """Return how many datagrams each socket has queued, and empty them."""
    return [len(receive_all(sock)) for sock in sockets]


def short_header(cid: bytes, size: int = 40) -> bytes:
    return (b"\x40" + cid).ljust(size, b"\0")


def long_header(dcid: bytes, size: int = 1200) -> bytes:
    return (b"\xc0\0\0\0\1" + bytes([len(dcid)]) + dcid).ljust(size, b"\0")


def outcomes(stats: GroupStats) -> dict[str, int | None]:
    """The counters of a whole group, by name, for asserting them all at once."""
    return {outcome.name.lower(): count for outcome, count in stats.outcomes.items()}


def open_descriptors() -> set[str]:
    """What this process has open, without the descriptor that reads the list."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except OSError:
            continue
    return found


def worker_sockets(group: SteeringGroup) -> list[socket.socket]:
    """The one socket of each worker of a plain group on one address."""
    return [worker.socket for worker in group.workers]


def all_workers(group: SteeringGroup, banks: int) -> list[Worker]:
    """The workers of all banks; opens every slot."""
    return [group.worker(index, bank) for bank in range(banks) for index in range(len(group.workers))]
