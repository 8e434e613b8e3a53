"""Workers that count numbered datagrams, without a QUIC stack, and a sender that knows where each one belongs."""

import contextlib
import os
import secrets
import select
import socket
import threading
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from steer import long_header, short_header

from quicsteer import ConnectionIds, Worker
from quicsteer.abi import CID_LENGTH_DEFAULT
from quicsteer.cid import GroupKeys, Identity
from quicsteer.decision import Rules, decide

BATCH = 64
"""Datagrams that a worker reads at a time, and at most before it leaves a listener to the next worker."""

_NUMBER_LENGTH = 8
_LAST = 2**64 - 1
"""The number of the last datagram to a slot."""

_SLOT_BITS = 16


class Arrival(NamedTuple):
    number: int
    slot: int


class Reading(NamedTuple):
    """When somebody began (``True``) or stopped to read a listener, in seconds of the monotonic clock."""

    time: float
    slot: int
    begins: bool


class CountingWorker:
    """Reads its slots until it was told to stop, and the last datagram to its established slot has come."""

    def __init__(self, worker: Worker, directory: Path) -> None:
        self._worker = worker
        self._directory = directory
        # Written after each batch, since a worker may be killed.
        self._arrivals = os.open(directory / f"arrivals-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._readings: list[Reading] = []
        self._slots: dict[int, int] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._poll = select.poll()
        self._last_came = self._stopped = False

    async def serve(self) -> None:
        """Do it all. Nothing else runs in this process's event loop."""
        channel = self._worker.channel
        assert channel is not None
        self._poll.register(channel.socket, select.POLLIN)
        for sock in self._worker.established:
            self._read(sock, self._worker.slot)
        self._worker.ready()
        while not (self._last_came and self._stopped):
            for number, _ in self._poll.poll():
                if number in self._sockets:
                    self._receive(number)
                elif number == channel.socket.fileno():
                    for message in channel.receive() or ():
                        self._obey(message["say"])
        lines = [f"{time} {slot} {int(begins)}\n" for time, slot, begins in self._readings]
        (self._directory / f"readings-{os.getpid()}").write_text("".join(lines))
        channel.send("drained")

    def _read(self, sock: socket.socket, slot: int) -> None:
        self._slots[sock.fileno()] = slot
        self._sockets[sock.fileno()] = sock
        self._poll.register(sock, select.POLLIN)

    def _receive(self, number: int) -> None:
        sock, slot = self._sockets[number], self._slots[number]
        numbers = array("Q")
        with contextlib.suppress(BlockingIOError):
            for _ in range(BATCH):
                datagram = int.from_bytes(sock.recv(2048)[-_NUMBER_LENGTH:], "big")
                if datagram == _LAST:
                    self._last_came = True
                else:
                    numbers.append(datagram << _SLOT_BITS | slot)
        os.write(self._arrivals, numbers.tobytes())

    def _obey(self, order: str) -> None:
        channel, index = self._worker.channel, self._worker.index
        assert channel is not None
        if order == "listen":
            self._readings.append(Reading(time.monotonic(), index, True))
            for sock in self._worker.listeners:
                self._read(sock, index)
        elif order == "stop" and not self._stopped:
            self._stopped = True
            for sock in self._worker.listeners:
                if sock.fileno() in self._sockets:
                    self._receive(sock.fileno())
                    self._poll.unregister(sock)
                    del self._sockets[sock.fileno()]
                    self._readings.append(Reading(time.monotonic(), index, False))
            channel.send("stopped")
        elif order == "ping":
            channel.send("alive")


def read_arrivals(directory: Path) -> Iterator[Arrival]:
    """What all workers have read so far."""
    for path in directory.glob("arrivals-*"):
        numbers = array("Q")
        numbers.frombytes(path.read_bytes())
        for number in numbers:
            yield Arrival(number >> _SLOT_BITS, number & (1 << _SLOT_BITS) - 1)


def read_readings(directory: Path) -> list[Reading]:
    """In order of time, when workers that have ended began and stopped to read listeners."""
    readings = []
    for path in directory.glob("readings-*"):
        for line in path.read_text().splitlines():
            time, slot, begins = line.split()
            readings.append(Reading(float(time), int(slot), begins == "1"))
    return sorted(readings)


class Template(NamedTuple):
    """A datagram but for its number, and the slot where the model of the decision has it go."""

    start: bytes
    slot: int


class Sender(threading.Thread):
    """Sends numbered datagrams to listeners and to the established slots of one bank, at so many a second."""

    def __init__(self, address: tuple[str, int], key: bytes, workers: int, banks: int, rate: int) -> None:
        super().__init__(daemon=True)
        rules = Rules(key, CID_LENGTH_DEFAULT, workers, workers * (1 + banks))
        self._address = address
        self._rate = rate
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        newcomers = [long_header(secrets.token_bytes(length), 60) for length in (8, 9, 20) for _ in range(64)]
        self._newcomers = [self._template(datagram, rules) for datagram in newcomers]
        self._banks = [
            [
                self._template(short_header(cid, 40), rules)
                for slot in range(workers * (1 + bank), workers * (2 + bank))
                for cid in _issue(key, slot, rules.slots, 16)
            ]
            for bank in range(banks)
        ]
        self._order = threading.Lock()
        self._bank = 0
        self._finished = False
        self.expected: list[int] = []
        """The slot of each datagram that was sent, by number."""
        self.seconds = 0.0

    @staticmethod
    def _template(datagram: bytes, rules: Rules) -> Template:
        slot = decide(datagram + bytes(_NUMBER_LENGTH), rules).slot
        assert slot is not None
        return Template(datagram, slot)

    def run(self) -> None:
        start = time.monotonic()
        batch = self._rate // 100
        while not self._finished:
            with self._order:
                self.burst(batch)
            ahead = start + len(self.expected) / self._rate - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
        self.seconds = time.monotonic() - start

    def burst(self, count: int) -> None:
        """Send so many datagrams at once, shared out evenly among the slots; for a sender that is not started."""
        for number in range(len(self.expected), len(self.expected) + count):
            templates = (self._newcomers, self._banks[self._bank])[number & 1]
            self._send(templates[(number >> 1) % len(templates)], number)

    def change_bank(self, bank: int) -> None:
        """Send to another bank from now on, and a last datagram to each slot of the one before."""
        with self._order:
            self._send_last(self._bank)
            self._bank = bank

    def stop(self) -> None:
        """Stop, with a last datagram to each slot."""
        self._finished = True
        if self.is_alive():
            self.join()
        self._send_last(self._bank)
        self._socket.close()

    def _send_last(self, bank: int) -> None:
        for template in {template.slot: template for template in self._banks[bank]}.values():
            self._socket.sendto(template.start + _LAST.to_bytes(_NUMBER_LENGTH, "big"), self._address)

    def _send(self, template: Template, number: int) -> None:
        self._socket.sendto(template.start + number.to_bytes(_NUMBER_LENGTH, "big"), self._address)
        self.expected.append(template.slot)

    def judge(self, arrivals: Iterator[Arrival]) -> dict[str, int]:
        """Compare what was read with what was sent."""
        counts: Counter[int] = Counter()
        wrong = 0
        for number, slot in arrivals:
            counts[number] += 1
            wrong += self.expected[number] != slot
        return {
            "lost": len(self.expected) - len(counts),
            "duplicated": sum(counts.values()) - len(counts),
            "at a wrong slot": wrong,
        }


def _issue(key: bytes, slot: int, slots: int, count: int) -> list[bytes]:
    ids = ConnectionIds(GroupKeys.from_key(key), Identity(slot, slots, CID_LENGTH_DEFAULT, 0))
    return [ids.issue() for _ in range(count)]
