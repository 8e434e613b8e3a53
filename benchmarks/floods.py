"""``floods``: what established connections notice of a flood of junk, and of one of Initials."""

import contextlib
import logging
import math
import os
import random
import statistics
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from quicsteer import ForeignConnectionIdWarning, SteeringGroup, SteeringMode, SteeringUnavailable
from quicsteer.counters import GroupDifference
from quicsteer.demo import Identity, make_identity

from ._flood import INITIAL_SIZE, JUNK_SIZE, Kind, child, flooding, hear
from .report import RATIO, Bar, Report, Spread, Table, first_line, spread

if TYPE_CHECKING:
    from ._established import Service

WORKERS = 2
RECEIVE_BUFFER = 1 << 20
RETRY = 50
GOODPUT_SHARE = 0.9
SECONDS_MAX = 10.0  # a flood of Initials costs an aioquic server without Retry some 100 MB per second

_SEED = 1
_NOTES = (
    "The sender is pinned to the last CPU, workers and clients to the others. Without a flood it is as busy, and sends "
    "nothing: so a CPU that is taken, from whatever else the host does, is no part of the difference.",
    "On loopback the whole receive path runs in the sender's system call: the lookup, the steering program, the sink, "
    "and the drop at a full socket cost the sender's CPU, not the workers'. So the figures show what reaches the "
    "workers, and what the flood takes from them by way of memory and locks. On a host whose network card interrupts "
    "the CPUs of the workers, the cost per datagram that `cost` shows comes on top of it.",
    "`goodput` is bytes of uploads that a worker confirmed. Requests and DATAGRAM frames are sent at a steady pace, "
    "whatever becomes of the answers; a request without an answer counts with the time that it waited, and a frame "
    "that is not back one second after the last was sent is lost. A connection counts as lost when it ends; one that "
    "nobody serves ends after an idle minute, which is longer than a run. Each run has a group, workers and "
    "connections of its own.",
)


class Lane(NamedTuple):
    """What a run is about. The clients use DATAGRAM ``frames``, or streams."""

    name: str
    mode: SteeringMode
    flood: Kind
    frames: bool
    drop_invalid: bool = False
    split: bool = False
    retry: bool | int = False

    @property
    def flooded(self) -> bool:
        return self.flood is not Kind.NOTHING


class Sample(NamedTuple):
    """What a run saw: datagrams of the flood per second, what the group did meanwhile, and what the clients saw."""

    flood_rate: float
    group: GroupDifference
    service: "Service"


Runs = dict[Lane, list[Sample]]
"""All runs of each lane, a round each."""


class Setting(NamedTuple):
    """What all runs have in common: the CPU of the sender, those of the rest, and seconds of each measurement."""

    sender: int
    others: Collection[int]
    identity: Identity
    seconds: float


def run(rounds: int, seconds: float = 2.0, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure both floods; a round runs each lane once, in an order of its own.

    Raises:
        ValueError: ``seconds`` is out of range, or there is one CPU only.
        SteeringUnavailable: no mode steers here.
    """
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) == 1:
        raise ValueError("there is one CPU only: a flood needs one for itself")
    if rounds < 1 or not 0 < seconds <= SECONDS_MAX:
        raise ValueError(f"rounds is {rounds} and seconds {seconds}, at least 1 and at most {SECONDS_MAX:g} are right")
    setting = Setting(cpus[-1], cpus[:-1], make_identity(), seconds)
    notes = list(_NOTES)
    modes = _find_modes(notes)
    junk, initials = make_junk_lanes(modes), make_initial_lanes(modes[0])
    runs = _measure([*junk, *initials], rounds, setting, progress)
    junk_runs, initial_runs = ({lane: runs[lane] for lane in lanes} for lanes in (junk, initials))
    return Report(
        "floods",
        {
            "rounds": rounds,
            "seconds": seconds,
            "workers": WORKERS,
            **_describe_load(),
            "receive buffer": RECEIVE_BUFFER,
        },
        [_tabulate_junk(junk_runs), _tabulate_initials(initial_runs)],
        [*_judge_junk(junk_runs), _judge_initials(initial_runs)],
        notes,
        _list_samples(runs),
    )


def _find_modes(notes: list[str]) -> list[SteeringMode]:
    """Return the modes that steer here, the best one first."""
    found, refusal = [], None
    for mode in (SteeringMode.EBPF, SteeringMode.CBPF):
        try:
            SteeringGroup.open("127.0.0.1:0", WORKERS, mode=mode).close()
            found.append(mode)
        except SteeringUnavailable as error:
            refusal = error
            notes.append(f"Left out: {mode}. {first_line(error)}")
    if refusal and not found:
        raise refusal
    return found


def make_junk_lanes(modes: Sequence[SteeringMode]) -> list[Lane]:
    """Return the lanes of the first table; all are compared with the first."""
    return [
        Lane("no flood", modes[0], Kind.NOTHING, False, drop_invalid=True),
        *(Lane(f"junk, drop_invalid, {mode}", mode, Kind.JUNK, False, drop_invalid=True) for mode in modes),
        Lane(f"junk, not dropped, {modes[0]}", modes[0], Kind.JUNK, False),
    ]


def make_initial_lanes(mode: SteeringMode) -> list[Lane]:
    """Return the lanes of the second table."""
    return [
        Lane("split, no flood", mode, Kind.NOTHING, True, split=True),
        *(
            Lane(f"{form}, {word}", mode, Kind.INITIALS, True, split=form == "split", retry=retry)
            for form in ("plain", "split")
            for retry, word in ((False, "no Retry"), (RETRY, f"retry={RETRY}"))
        ),
    ]


def _describe_load() -> dict[str, Any]:
    from ._established import CONNECTIONS, DATAGRAMS, REQUESTS, UPLOAD

    return {
        "connections": CONNECTIONS,
        "bytes of an upload": UPLOAD,
        "requests/s": REQUESTS,
        "DATAGRAM frames/s": DATAGRAMS,
        "bytes of junk": JUNK_SIZE,
        "bytes of an Initial": INITIAL_SIZE,
    }


def _measure(lanes: Sequence[Lane], rounds: int, setting: Setting, progress: Callable[[str], None]) -> Runs:
    runs: Runs = {lane: [] for lane in lanes}
    order = list(lanes)
    shuffle = random.Random(_SEED).shuffle
    with _without_advice():
        for number in range(1, rounds + 1):
            shuffle(order)
            for lane in order:
                progress(f"round {number} of {rounds}: {lane.name}")
                runs[lane].append(_run(lane, setting))
    return runs


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Have no warnings that a flood of junk looks like a server with connection IDs of its own."""
    logger = logging.getLogger("quicsteer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ForeignConnectionIdWarning)
            yield
    finally:
        logger.setLevel(level)


def _run(lane: Lane, setting: Setting) -> Sample:
    """Open a group, connect, start the flood, and have the clients measure."""
    from ._established import GRACE, Clients, be_clients, serving

    use = Clients.use_datagrams if lane.frames else Clients.use_streams
    longest = 2 * (setting.seconds + GRACE) + 10.0
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(
            SteeringGroup.open(
                "127.0.0.1:0",
                WORKERS,
                mode=lane.mode,
                split=lane.split,
                drop_invalid=lane.drop_invalid,
                receive_buffer=RECEIVE_BUFFER,
            )
        )
        address = group.addresses[0]
        stack.enter_context(serving(group, setting.identity, setting.others, lane.retry))
        clients = stack.enter_context(
            child(setting.others, be_clients, address, setting.identity.pem, use, setting.seconds)
        )
        hear(clients)
        sent = stack.enter_context(flooding(lane.flood, address, setting.sender, longest))
        before, sent_before, start = group.stats(), sent(), time.perf_counter()
        clients.send("go")
        service = hear(clients)
        rate = (sent() - sent_before) / (time.perf_counter() - start)
        return Sample(rate, group.stats() - before, service)


def _tabulate_junk(runs: Runs) -> Table:
    rows: list[list[Any]] = []
    base = _goodputs(_without_flood(runs))
    for lane, samples in runs.items():
        shares = [100 * mine / most for mine, most in zip(_goodputs(samples), base, strict=True)]
        rows.append(
            [
                lane.name,
                _spread([goodput / 1e6 for goodput in _goodputs(samples)]),
                _spread(shares) if lane.flooded else None,
                *_spread_delays(samples),
                _lost_connections(samples),
                _spread([sample.flood_rate for sample in samples]) if lane.flooded else None,
                _spread([sample.group.rate(sample.group.sink) for sample in samples]) if lane.drop_invalid else None,
                _spread([sample.group.rate(sample.group.dropped) for sample in samples]),
            ]
        )
    columns = ("goodput, MB/s", "% of no flood", "p50, ms", "p99, ms", "connections lost")
    flood = ("junk/s", "to the sink/s", "dropped at sockets/s")
    title = "Junk at full rate: goodput, and latency of small requests, median [quartiles]"
    return Table(title, ("lane", *columns, *flood), rows)


def _tabulate_initials(runs: Runs) -> Table:
    rows: list[list[Any]] = [
        [
            lane.name,
            _spread([100 * _lost_share(sample) for sample in samples]),
            *_spread_delays(samples),
            _lost_connections(samples),
            _spread([sample.flood_rate for sample in samples]) if lane.flooded else None,
            _spread([sample.group.rate(_dropped(sample, "established", "both")) for sample in samples]),
            _spread([sample.group.rate(_dropped(sample, "listener")) for sample in samples]) if lane.split else None,
        ]
        for lane, samples in runs.items()
    ]
    columns = ("frames lost, %", "p50, ms", "p99, ms", "connections lost")
    flood = ("Initials/s", "dropped at sockets of established connections/s", "dropped at listeners/s")
    title = f"Initials at full rate, {next(iter(runs)).mode}: DATAGRAM frames that are echoed, median [quartiles]"
    return Table(title, ("lane", *columns, *flood), rows)


def _judge_junk(runs: Runs) -> Iterator[Bar]:
    for lane, samples in runs.items():
        if lane.flooded and lane.drop_invalid:
            pairs = zip(_goodputs(_without_flood(runs)), _goodputs(samples), strict=True)
            value = statistics.median(most / mine if mine else math.inf for most, mine in pairs)
            yield Bar(f"goodput without a flood over that with {lane.name}", value, 1 / GOODPUT_SHARE, RATIO)


def _judge_initials(runs: Runs) -> Bar:
    split = [sample for lane, samples in runs.items() if lane.split for sample in samples]
    dropped = sum(_dropped(sample, "established") for sample in split)
    return Bar("Initials: dropped at the established sockets of split groups, all rounds", dropped, 0, "datagrams")


def _without_flood(runs: Runs) -> list[Sample]:
    [samples] = [samples for lane, samples in runs.items() if not lane.flooded]
    return samples


def _lost_connections(samples: Sequence[Sample]) -> int:
    return sum(sample.service.lost_connections for sample in samples)


def _goodputs(samples: Sequence[Sample]) -> list[float]:
    return [sample.service.goodput for sample in samples]


def _lost_share(sample: Sample) -> float:
    return 1 - sample.service.answered / sample.service.sent


def _dropped(sample: Sample, *roles: str) -> int:
    return sum(slot.dropped or 0 for slot in sample.group.slots if slot.role in roles)


def _spread_delays(samples: Sequence[Sample]) -> list[Spread | None]:
    """Return the median and the 99th percentile, of each round and then over the rounds."""
    return [_spread([_percentile(sample.service.delays, share) for sample in samples]) for share in (0.5, 0.99)]


def _percentile(values: Sequence[float], share: float) -> float | None:
    """Return the least value that a share of all is not above, ``None`` when there is none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else None


def _spread(values: Sequence[float | None]) -> Spread | None:
    """Return the spread of what is known; a single round has none, and stands for all."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return spread(known) if len(known) > 1 else Spread(known[0], known[0], known[0])


def _list_samples(runs: Runs) -> dict[str, list[float]]:
    listed: dict[str, list[float]] = {}
    for lane, samples in runs.items():
        if lane.frames:
            listed[f"{lane.name}: frames lost, %"] = [100 * _lost_share(sample) for sample in samples]
        else:
            listed[f"{lane.name}: goodput, bytes/s"] = _goodputs(samples)
        for share in (0.5, 0.99):
            delays = [_percentile(sample.service.delays, share) for sample in samples]
            listed[f"{lane.name}: p{100 * share:.0f}, ms"] = [delay for delay in delays if delay is not None]
    return listed
