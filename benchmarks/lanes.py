"""Lanes: a group, what is sent to it and where that must arrive; and measuring them in turns.

All lanes of one measurement are open from the start, get datagrams from the same client sockets and flows, and take
turns in shuffled order. A program is never replaced or detached on a living group.
"""

import contextlib
import os
import random
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from quicsteer import Outcome, SteeringGroup, Worker
from quicsteer.abi import CID_LENGTH_MAX, CID_LENGTH_MIN, KEY_LENGTH, LONG_DCID_OFFSET
from quicsteer.decision import Rules, decide

from ._native import BATCH, DATAGRAM_MAX, TAG_LENGTH, Arrival, Run, lockstep

SIZE_MIN = LONG_DCID_OFFSET + CID_LENGTH_MAX + TAG_LENGTH
CLIENTS = 16
KEY = bytes(range(KEY_LENGTH))
_SHORT_HEADER, _LONG_HEADER = b"\x40", b"\xc3\x00\x00\x00\x01"


class Traffic(StrEnum):
    """What the datagrams carry."""

    OURS = "our CIDs"
    INITIALS = "Initials"
    JUNK = "junk"


_OUTCOMES = {
    Traffic.OURS: Outcome.ROUTED,
    Traffic.INITIALS: Outcome.DISPATCHED,
    Traffic.JUNK: Outcome.UNROUTABLE,
}


class Load(NamedTuple):
    """What every lane of a measurement has in common. ``flows`` is a multiple of ``BATCH``."""

    flows: int
    size: int
    cid_length: int
    batches: int


class Lane(NamedTuple):
    """One thing to measure: sockets of a group in the order of their slots, and what is sent to them.

    ``swallowed`` reads how many datagrams the group's sink has taken so far.
    """

    name: str
    port: int
    sockets: tuple[socket.socket, ...]
    datagrams: list[bytes]
    arrival: Arrival
    swallowed: Callable[[], int] = int


class Samples(NamedTuple):
    """What a lane cost: nanoseconds per datagram in each round, to send and to drain."""

    send: list[float]
    drain: list[float]
    datagrams: int
    late: int


class Astray(Exception):
    """Datagrams were lost or went to the wrong socket, so no figure means anything."""


def make_load(flows: int, size: int, cid_length: int, batches: int) -> Load:
    """Round ``flows`` up to whole batches, and ``batches`` up to whole passes over the flows.

    Raises: ValueError for a size that cannot hold a datagram's head and its tag.
    """
    if not SIZE_MIN <= size <= DATAGRAM_MAX:
        raise ValueError(f"size is {size}, it must be {SIZE_MIN} to {DATAGRAM_MAX}")
    each = -(-flows // BATCH)
    return Load(each * BATCH, size, cid_length, -(-batches // each) * each)


def make_datagrams(traffic: Traffic, group: SteeringGroup, load: Load) -> list[bytes]:
    """Return one datagram for each flow; its last bytes name the socket that must get it.

    ``group`` has the mode ``ebpf`` or ``cbpf`` and the key ``KEY``: its workers issue the CIDs, and the model of the
    decision says where a client's DCID goes.
    """
    workers = len(group.workers)
    rules = Rules(KEY, load.cid_length, workers, workers, traffic is Traffic.JUNK)
    rng = random.Random(traffic)
    slots = [flow % workers for flow in range(load.flows)]
    rng.shuffle(slots)
    heads = [_make_head(traffic, group.workers[slot], load.cid_length, rng) for slot in slots]
    return [_add_tag(head, traffic, rules, load.size) for head in heads]


def _make_head(traffic: Traffic, worker: Worker, cid_length: int, rng: random.Random) -> bytes:
    if traffic is Traffic.OURS:
        return _SHORT_HEADER + worker.connection_ids.issue()
    if traffic is Traffic.JUNK:
        return _SHORT_HEADER + rng.randbytes(cid_length)
    dcid = rng.randbytes(rng.randint(CID_LENGTH_MIN, CID_LENGTH_MAX))
    return _LONG_HEADER + bytes([len(dcid)]) + dcid


def _add_tag(head: bytes, traffic: Traffic, rules: Rules, size: int) -> bytes:
    decision = decide(head.ljust(size, b"\0"), rules)
    if decision.outcome is not _OUTCOMES[traffic] or decision.slot is None:
        raise Astray(f"the model says {decision} for a datagram of {traffic}")
    return head.ljust(size - TAG_LENGTH, b"\0") + decision.slot.to_bytes(TAG_LENGTH, "little")


@contextlib.contextmanager
def make_clients() -> Iterator[list[socket.socket]]:
    """Open the sending sockets. Open them before any group: a lookup meets the sockets bound last first."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(CLIENTS):
            client = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            client.bind(("0.0.0.0", 0))
            clients.append(client)
        yield clients


@contextlib.contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """Keep this thread on one CPU."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(
    lanes: Sequence[Lane], clients: Sequence[socket.socket], batches: int, rounds: int, seed: int
) -> dict[str, Samples]:
    """Run the lanes in turns; a round is one run of each, in an order of its own. One round before them warms up.

    The figure of a run is the median of its batches: who shares the CPU costs some batches, not all.

    Raises: Astray
    """
    order = list(lanes)
    rng = random.Random(seed)
    samples = {lane.name: Samples([], [], 0, 0) for lane in lanes}
    for count in range(rounds + 1):
        rng.shuffle(order)
        for lane in order:
            sample = _run(lane, clients, batches)
            if count:
                samples[lane.name] = _add(samples[lane.name], sample)
    return samples


def _run(lane: Lane, clients: Sequence[socket.socket], batches: int) -> Samples:
    before = lane.swallowed()
    result = lockstep(
        Run(
            [client.fileno() for client in clients],
            [sock.fileno() for sock in lane.sockets],
            lane.datagrams,
            lane.port,
            lane.arrival,
            batches,
        )
    )
    sent = batches * BATCH
    swallowed = lane.swallowed() - before
    if result.lost or result.misplaced or result.received + swallowed != sent:
        raise Astray(
            f"{lane.name}: of {sent} datagrams {result.received} arrived, {result.misplaced} of them at the wrong "
            f"socket, and {swallowed} went to the sink"
        )
    per_datagram = statistics.median(result.send_ns) / BATCH
    return Samples([per_datagram], [result.drain_ns / sent], sent, result.late)


def _add(a: Samples, b: Samples) -> Samples:
    return Samples(a.send + b.send, a.drain + b.drain, a.datagrams + b.datagrams, a.late + b.late)
