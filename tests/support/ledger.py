"""Keeps account of numbered datagrams in memory that the sender and all workers share, so that no kill loses a line.

A worker looks at a datagram before it takes it, and says which one it has in hand. So of each datagram that was taken
and not entered it is known which killed process had it.
"""

import contextlib
import math
import mmap
import os
import random
import secrets
import select
import socket
import struct
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from steer import long_header, short_header

from quicsteer import ConnectionIds, Worker
from quicsteer.abi import CID_LENGTH_DEFAULT
from quicsteer.cid import GroupKeys, Identity
from quicsteer.decision import Rules, decide

BATCH = 64
_NUMBER = struct.Struct(">Q")
_NOTHING = 2**64 - 1
_SLOT_LENGTH = 2
_FLOOD_EVERY, _FLOOD = 1.0, 3000
_TICK = 0.01


class Memory:
    """A file that several processes map: unsigned integers of some bytes each."""

    def __init__(self, path: Path, count: int, length: int) -> None:
        self._length = length
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, count * length)
        self._map = mmap.mmap(descriptor, count * length)
        os.close(descriptor)

    def __getitem__(self, index: int) -> int:
        start = index * self._length
        return int.from_bytes(self._map[start : start + self._length], "big")

    def __setitem__(self, index: int, value: int) -> None:
        start = index * self._length
        self._map[start : start + self._length] = value.to_bytes(self._length, "big")

    def read(self, count: int) -> bytes:
        return self._map[: count * self._length]


class Ledger:
    """What was sent and what became of it. ``most`` is how many datagrams there is room for."""

    def __init__(self, directory: Path, most: int) -> None:
        self._directory = directory
        self.most = most
        self.expected = Memory(directory / "expected", most, _SLOT_LENGTH)
        """The slot of each datagram plus one."""
        self.arrived = Memory(directory / "arrived", most, _SLOT_LENGTH)
        """The slot where each was read plus one."""
        self.times = Memory(directory / "times", most, 1)
        """How often each was read."""
        self.orders = Memory(directory / "orders", 2, 8)
        """To the sender: the bank that clients use, and whether to stop."""

    def hand(self) -> Memory:
        """What this process has in hand."""
        hand = Memory(self._directory / f"hand-{os.getpid()}", 1, 8)
        hand[0] = _NOTHING
        return hand

    def in_hand(self) -> set[int]:
        """What processes had in hand when they ended."""
        held = {int.from_bytes(path.read_bytes(), "big") for path in self._directory.glob("hand-*")}
        return held - {_NOTHING}


class LedgerWorker:
    """Reads its slots like a server; told to stop it empties its listeners and, at once, its established slot.

    ``capacity`` is how many workers the group has room for.
    """

    def __init__(self, worker: Worker, ledger: Ledger, capacity: int) -> None:
        self._worker = worker
        self._capacity = capacity
        self._ledger = ledger
        self._hand = ledger.hand()
        self._poll = select.poll()
        self._sockets: dict[int, tuple[socket.socket, int]] = {}
        self._stopped = False

    async def serve(self) -> None:
        """Do it all. Nothing else runs in this process's event loop."""
        channel = self._worker.channel
        assert channel is not None
        self._poll.register(channel.socket, select.POLLIN)
        for sock in self._worker.established:
            self._open(sock, self._worker.slot)
        self._worker.ready()
        while not self._stopped:
            for number, _ in self._poll.poll():
                if self._stopped:
                    break  # the listeners have another reader now
                if number in self._sockets:
                    self._read(*self._sockets[number])
                else:
                    for message in channel.receive() or ():
                        self._obey(message["say"])
        for sock in self._worker.established:
            self._read(sock, self._worker.slot)
        channel.send("drained")

    def _listeners(self) -> Iterator[tuple[socket.socket, int]]:
        """The listeners with their slots: of several workers that are not there, this one has every so many-th."""
        sockets, index = self._worker.listeners, self._worker.index
        step = math.ceil((self._capacity - index) / len(sockets))
        return zip(sockets, range(index, self._capacity, step), strict=True)

    def _open(self, sock: socket.socket, slot: int) -> None:
        self._sockets[sock.fileno()] = sock, slot
        self._poll.register(sock, select.POLLIN)

    def _obey(self, order: str) -> None:
        channel = self._worker.channel
        assert channel is not None
        if order == "listen":
            for sock, slot in self._listeners():
                self._open(sock, slot)
        elif order == "stop" and not self._stopped:
            self._stopped = True
            for sock, slot in self._listeners():
                if sock.fileno() in self._sockets:
                    self._read(sock, slot)
            channel.send("stopped")
        elif order == "ping":
            channel.send("alive")

    def _read(self, sock: socket.socket, slot: int) -> None:
        hand, times, arrived = self._hand, self._ledger.times, self._ledger.arrived
        with contextlib.suppress(BlockingIOError):
            for _ in range(BATCH):
                [number] = _NUMBER.unpack(sock.recv(2048, socket.MSG_PEEK)[-_NUMBER.size :])
                hand[0] = number
                sock.recv(2048)
                times[number] += 1
                arrived[number] = slot + 1
                hand[0] = _NOTHING


class Template(NamedTuple):
    """A datagram but for its number, and where the model has it go."""

    start: bytes
    slot: int


class Source:
    """A process that sends datagrams of all kinds: of clients old and new, junk, and floods."""

    def __init__(self, address: tuple[str, int], ledger: Ledger, rules: Rules, rate: int) -> None:
        self._address = address
        self._ledger = ledger
        self._rules = rules
        self._rate = rate
        self._banks = rules.slots // rules.listeners - 1
        self._sent = 0

    def run(self) -> int:
        """Send until the ledger says stop, or is full; returns how many were sent."""
        newcomers = self._templates(long_header(secrets.token_bytes(n), 60) for n in (8, 9, 20) for _ in range(64))
        junk = self._templates(short_header(secrets.token_bytes(CID_LENGTH_DEFAULT), 40) for _ in range(16))
        banks = [self._clients_of(bank) for bank in range(self._banks)]
        start = time.monotonic()
        next_flood = start + _FLOOD_EVERY
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(self._address)
            while not self._ledger.orders[1] and self._sent + 2 * _FLOOD < self._ledger.most:
                current = banks[self._ledger.orders[0]]
                late = random.choice(banks)
                for kind in (current, current, current, newcomers, newcomers, late, junk):
                    self._send(sock, kind, int(self._rate * _TICK / 7) + 1)
                if time.monotonic() > next_flood:
                    self._send(sock, newcomers, _FLOOD)
                    next_flood += _FLOOD_EVERY
                time.sleep(_TICK)
        return self._sent

    def _templates(self, datagrams: Iterator[bytes]) -> list[Template]:
        found = []
        for datagram in datagrams:
            slot = decide(datagram + bytes(_NUMBER.size), self._rules).slot
            assert slot is not None
            found.append(Template(datagram, slot))
        return found

    def _clients_of(self, bank: int) -> list[Template]:
        first = self._rules.listeners * (1 + bank)
        return self._templates(
            short_header(cid, 40)
            for slot in range(first, first + self._rules.listeners)
            for cid in issue(self._rules, slot, 16)
        )

    def _send(self, sock: socket.socket, templates: Sequence[Template], count: int) -> None:
        for _ in range(count):
            template = templates[random.randrange(len(templates))]
            self._ledger.expected[self._sent] = template.slot + 1
            sock.send(template.start + _NUMBER.pack(self._sent))
            self._sent += 1


def issue(rules: Rules, slot: int, count: int) -> list[bytes]:
    ids = ConnectionIds(GroupKeys.from_key(rules.key), Identity(slot, rules.slots, rules.cid_length, 0))
    return [ids.issue() for _ in range(count)]


class Account(NamedTuple):
    """What became of the datagrams, by the ledger alone."""

    sent: int
    read: int
    doubled: int
    misled: int
    lost_in_hand: int


def judge(ledger: Ledger, sent: int) -> Account:
    """Add up the ledger."""
    times = ledger.times.read(sent)
    counts = Counter(times)
    expected, arrived = (array("H", memory.read(sent)) for memory in (ledger.expected, ledger.arrived))
    misled = sum(1 for want, got in zip(expected, arrived, strict=True) if got and want != got)
    lost = sum(1 for number in ledger.in_hand() if number < sent and not times[number])
    return Account(sent, sent - counts[0], sum(count for often, count in counts.items() if often > 1), misled, lost)
