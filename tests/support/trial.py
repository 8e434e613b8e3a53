"""Sends datagrams to a group and holds what becomes of each one against the model of the decision."""

import contextlib
import functools
import select
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from steer import all_workers

from quicsteer import SteeringGroup, SteeringMode
from quicsteer.abi import Outcome
from quicsteer.decision import Decision, Rules, decide

PATIENCE = 10.0
"""Seconds without a datagram after which one that is missing is lost."""

LARGEST = 65535
_PAUSE = 5  # milliseconds
_BYTES_AT_ONCE = 200_000
_DATAGRAMS_AT_ONCE = 64

RECEIVE_BUFFER = 1 << 20
"""What a group of a trial must have: room for all that is on its way at once, whichever slot it goes to."""


@functools.lru_cache(maxsize=100_000)
def _decide(datagram: bytes, rules: Rules) -> Decision:
    return decide(datagram, rules)


@contextlib.contextmanager
def open_group(
    address: str, rules: Rules, mode: SteeringMode, *, split: bool = True
) -> Iterator[tuple[SteeringGroup, list[socket.socket]]]:
    """Open a group for a trial; yield it with one socket of every slot, in the order of the slots."""
    banks = rules.slots // rules.listeners - 1 if split else 1
    with SteeringGroup.open(
        address,
        rules.listeners,
        split=split,
        banks=banks,
        mode=mode,
        cid_length=rules.cid_length,
        key=rules.key,
        drop_invalid=rules.drop_invalid,
        receive_buffer=RECEIVE_BUFFER,
    ) as group:
        workers = all_workers(group, banks)
        listeners = [worker.listeners[0] for worker in workers[: rules.listeners]] if split else []
        yield group, [*listeners, *(worker.established[0] for worker in workers)]


class Trial:
    """The datagrams sent to one group. Slots that the model leaves open (malformed ones) are any listener."""

    def __init__(self, group: SteeringGroup, rules: Rules, sockets: Sequence[socket.socket]) -> None:
        self.sent = 0
        self._group = group
        self.rules = rules
        self._due: Counter[tuple[int | None, bytes]] = Counter()
        self._sunk = 0
        self.outcomes: Counter[Outcome] = Counter()
        self._routed: Counter[int | None] = Counter()
        self._wrong: list[tuple[int, bytes]] = []
        self._sockets = {sock.fileno(): (slot, sock) for slot, sock in enumerate(sockets)}
        self._poll = select.poll()
        for number in self._sockets:
            self._poll.register(number, select.POLLIN)

    def send(self, client: socket.socket, datagrams: Iterable[bytes]) -> None:
        """Send datagrams, and wait for them so often that no queue overflows. The client is connected to the group."""
        size = count = 0
        for datagram in datagrams:
            self.expect(datagram)
            client.send(datagram)
            size, count = size + len(datagram), count + 1
            if size > _BYTES_AT_ONCE or count >= _DATAGRAMS_AT_ONCE:
                self.collect()
                size = count = 0
        self.collect()

    def send_train(self, client: socket.socket, segments: Sequence[bytes]) -> None:
        """Send segments of one size in one call of a client with UDP_SEGMENT: the first one decides for all."""
        decision = self.expect(segments[0])
        for segment in segments[1:]:
            self._expect_at(decision.slot, segment)
        client.send(b"".join(segments))
        self.collect()

    def expect(self, datagram: bytes) -> Decision:
        """Take note of a datagram that is sent alone."""
        decision = _decide(datagram, self.rules)
        self.outcomes[decision.outcome] += 1
        if decision.outcome is Outcome.ROUTED:
            self._routed[decision.slot] += 1
        self._expect_at(decision.slot, datagram)
        return decision

    def _expect_at(self, slot: int | None, datagram: bytes) -> None:
        self.sent += 1
        if slot == self.rules.slots:
            self._sunk += 1
        else:
            self._due[slot, datagram] += 1

    def collect(self) -> None:
        """Read until nothing is missing."""
        self._read_all()
        while self._due.total():
            arrives = self._poll.poll(PATIENCE * 1000)
            self._read_all()
            assert arrives, f"missing: {show(+self._due)}, at a wrong slot: {show(self._wrong)}"

    def _read_all(self) -> None:
        for slot, sock in self._sockets.values():
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._take(slot, sock.recv(LARGEST))

    def _take(self, slot: int, datagram: bytes) -> None:
        for place in (slot, None) if slot < self.rules.listeners else (slot,):
            if self._due[place, datagram]:
                self._due[place, datagram] -= 1
                return
        self._wrong.append((slot, datagram))

    def verify(self) -> None:
        """Require that each datagram arrived once where it should, or was swallowed, and that the counters say so."""
        self.collect()
        deadline = time.monotonic() + PATIENCE
        while (self._group.stats().sink or 0) < self._sunk and time.monotonic() < deadline:
            self._poll.poll(_PAUSE)
        self._read_all()
        assert show(self._wrong) == []
        stats = self._group.stats()
        assert (stats.sink, stats.dropped, stats.parked) == (self._sunk, 0, 0)
        if stats.mode is SteeringMode.EBPF:
            assert dict(stats.outcomes) == {outcome: self.outcomes[outcome] for outcome in Outcome}
            assert {slot.slot: slot.routed for slot in stats.slots if slot.routed} == dict(self._routed)


def show(datagrams: Iterable[tuple[int | None, bytes]]) -> list[str]:
    """The first few datagrams for an error message."""
    return [f"slot {slot}: {len(data)} bytes {data[:40].hex()}" for slot, data in list(datagrams)[:5]]
