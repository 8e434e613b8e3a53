"""Lanes: a group under a rule, what is sent to it and where that must arrive; and measuring them in turns.

All lanes of one measurement are open from the start, get datagrams from the same client sockets and flows, and take
turns in shuffled order. A program is never replaced or detached on a living group.
"""

import contextlib
import ipaddress
import os
import random
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from quicsteer.abi import CID_LENGTH_MAX, CID_LENGTH_MIN, LONG_DCID_OFFSET

from ._native import BATCH, DATAGRAM_MAX, TAG_LENGTH, Arrival, Result, Run, lockstep
from .rules import CONNECTED, Place, Rule, Steered

SIZE_MIN = LONG_DCID_OFFSET + CID_LENGTH_MAX + TAG_LENGTH
CLIENTS = 16
SHORT_HEADER, LONG_HEADER = b"\x40", b"\xc3\x00\x00\x00\x01"


class Traffic(StrEnum):
    """What the datagrams carry."""

    OURS = "its own CIDs"
    INITIALS = "Initials"
    JUNK = "junk"


class Load(NamedTuple):
    """What every lane of a measurement has in common. ``flows`` divides ``BATCH`` or is a multiple of it."""

    flows: int
    size: int
    batches: int
    segments: int = 1


class Plan(NamedTuple):
    """How to measure: ``seed`` is that of the order of the lanes, ``cpu`` where all runs."""

    rounds: int
    seed: int
    cpu: int
    progress: Callable[[str], None] = lambda _: None


class Path(NamedTuple):
    """The way from clients to servers: who sends, the address of the first flow, and the servers' address.

    Each flow has an address of its own: those that follow the first one's.
    """

    clients: list[socket.socket]
    source: str
    host: str

    def sources(self, flows: int) -> list[tuple[str, int]]:
        """Return the addresses of all flows."""
        first = int(ipaddress.IPv4Address(self.source))
        ports = [client.getsockname()[1] for client in self.clients]
        return [(str(ipaddress.IPv4Address(first + flow)), ports[flow // BATCH % len(ports)]) for flow in range(flows)]


class Lane(NamedTuple):
    """One thing to measure: a group, and what is sent to it."""

    name: str
    steered: Steered
    datagrams: list[bytes]
    arrival: Arrival
    segments: int = 1
    named_only: bool = False


class Samples(NamedTuple):
    """What a lane cost: nanoseconds per datagram in each round, to send and queue it."""

    send: list[float]
    datagrams: int
    late: int


class Astray(Exception):
    """Datagrams were lost or went to the wrong socket, so no figure means anything."""


def make_load(flows: int, size: int, batches: int, segments: int = 1) -> Load:
    """Round ``flows`` up to whole batches or down to a part of one, and ``batches`` up to whole passes over them.

    Raises: ValueError for a size that cannot hold a datagram's head and its tag.
    """
    if not SIZE_MIN <= size <= DATAGRAM_MAX:
        raise ValueError(f"size is {size}, it must be {SIZE_MIN} to {DATAGRAM_MAX}")
    if flows < BATCH:
        return Load(1 << flows.bit_length() - 1, size, batches, segments)
    each = -(-flows // BATCH)
    return Load(each * BATCH, size, -(-batches // each) * each, segments)


def open_lane(
    stack: contextlib.ExitStack, name: str, rule: Rule, traffic: Traffic, *, workers: int, load: Load, path: Path
) -> Lane:
    """Open a group, and make one datagram for each flow, whose last bytes name the socket that must get it.

    Raises: SteeringUnavailable, ProgramUnavailable when the rule does not work here.
    """
    steered = rule.open(stack, Place(path.host, path.sources(load.flows)), workers)
    rng = random.Random(traffic)
    slots = [flow % workers for flow in range(load.flows)]
    rng.shuffle(slots)
    heads = [_make_head(traffic, steered, slot, rule.cid_length, rng) for slot in slots]
    named, arrival = slots, Arrival.AT_NAMED_SOCKET if rule.steers else Arrival.AT_ANY_SOCKET
    if rule is CONNECTED:
        named, arrival = list(range(load.flows)), Arrival.AT_NAMED_SOCKET
    if traffic is Traffic.INITIALS:
        reached = [steered.initial(head[LONG_DCID_OFFSET:]) for head in heads]
        named = [slot for slot in reached if slot is not None]
        if len(named) < len(reached):
            named, arrival = slots, Arrival.AT_ANY_SOCKET
    if traffic is Traffic.JUNK and rule.steers:
        arrival = Arrival.NOWHERE
    datagrams = [
        head.ljust(load.size - TAG_LENGTH, b"\0") + number.to_bytes(TAG_LENGTH, "little")
        for head, number in zip(heads, named, strict=True)
    ]
    return Lane(name, steered, datagrams, arrival, load.segments, rule is CONNECTED)


def _make_head(traffic: Traffic, steered: Steered, slot: int, cid_length: int, rng: random.Random) -> bytes:
    if traffic is Traffic.OURS:
        return SHORT_HEADER + steered.issue(slot, None)
    if traffic is Traffic.JUNK:
        return SHORT_HEADER + rng.randbytes(cid_length)
    dcid = rng.randbytes(rng.randint(CID_LENGTH_MIN, CID_LENGTH_MAX))
    return LONG_HEADER + bytes([len(dcid)]) + dcid


@contextlib.contextmanager
def loopback() -> Iterator[Path]:
    """Open the sending sockets. Open them before any group: a lookup meets the sockets bound last first."""
    with contextlib.ExitStack() as stack:
        yield Path(make_clients(stack), "127.1.0.1", "127.0.0.1")


def make_clients(stack: contextlib.ExitStack) -> list[socket.socket]:
    clients = []
    for _ in range(CLIENTS):
        client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        client.bind(("0.0.0.0", 0))
        clients.append(client)
    return clients


@contextlib.contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Keep this thread on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(lanes: Sequence[Lane], path: Path, batches: int, plan: Plan) -> dict[str, Samples]:
    """Run the lanes in turns; a round is one run of each, in an order of its own. One round before them warms up.

    The figure of a run is the median of its batches: who shares the CPU costs some batches, not all.

    Raises: Astray
    """
    order = list(lanes)
    rng = random.Random(plan.seed)
    samples = {lane.name: Samples([], 0, 0) for lane in lanes}
    with pinned(plan.cpu):
        for count in range(plan.rounds + 1):
            plan.progress(f"round {count} of {plan.rounds}, {len(order)} variants")
            rng.shuffle(order)
            for lane in order:
                sample = _measure_once(lane, path, batches)
                if count:
                    samples[lane.name] = _add(samples[lane.name], sample)
    return samples


def send(lane: Lane, path: Path, batches: int) -> Result:
    """Send batches to a lane and read them, once."""
    steered = lane.steered
    return lockstep(
        Run(
            [client.fileno() for client in path.clients],
            [sock.fileno() for sock in steered.sockets],
            lane.datagrams,
            path.host,
            steered.port,
            path.source,
            lane.arrival,
            batches,
            lane.segments,
            lane.named_only,
        )
    )


def _measure_once(lane: Lane, path: Path, batches: int) -> Samples:
    before = lane.steered.swallowed()
    result = send(lane, path, batches)
    sent = batches * BATCH
    swallowed = lane.steered.swallowed() - before
    if result.lost or result.misplaced or result.received + swallowed != sent:
        raise Astray(
            f"{lane.name}: of {sent} datagrams {result.received} arrived, {result.misplaced} of them at the wrong "
            f"socket, and {swallowed} went to the sink"
        )
    per_datagram = statistics.median(result.send_ns) / BATCH
    return Samples([per_datagram], sent, result.late)


def _add(a: Samples, b: Samples) -> Samples:
    return Samples(a.send + b.send, a.datagrams + b.datagrams, a.late + b.late)
