"""``growth``: how the cost of a datagram grows with sockets, flows, the dispatch table, sizes and GSO trains."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from quicsteer import SteeringUnavailable
from quicsteer.abi import TABLE_SIZE

from . import rules
from ._libbpf import ProgramUnavailable
from .lanes import Lane, Load, Path, Plan, Traffic, make_load, measure, open_lane
from .report import RATIO, Bar, Report, Table, differences, first_line, spread
from .rules import Rule

SOCKETS = (2, 8, 64, 256, 1024)
SOCKET_FLOWS = 4096
FLOWS = (1, 16, 64, 1024, 10_240, 100_032)
SIZES = (64, 300, 1200, 1472)
TRAINS = (1, 4, 16)
TRAIN_SIZE = 1200
TABLES = (256, 1024, 16_384, 1_048_576)
TABLE_FLOWS = 16_384
CONNECTED_FLOWS_MAX = 10_240
UDPGRM_SOCKETS_MAX = 256
GROWTH_LIMIT = 1.5

_BATCHES = 128
_WORKERS = 4
_FEW_SOCKETS, _MANY_SOCKETS = SOCKETS[0], SOCKETS[-1]

_Rules = Sequence[Rule]
_OURS = (rules.EBPF, rules.CBPF)
_ALL = (rules.PASS, *_OURS, *rules.OTHERS)


class Point(NamedTuple):
    """A rule at one place of an axis."""

    rule: Rule
    at: int

    def __str__(self) -> str:
        return f"{self.rule.name}, {self.at:,}"


class Axis(NamedTuple):
    """What grows, over which values, and how a lane is opened at one of them."""

    title: str
    unit: str
    values: Sequence[int]
    rules: _Rules
    workers: Callable[[int], int]
    load: Callable[[int], Load]
    fits: Callable[[Rule, int], bool] = lambda _rule, _value: True
    traffic: Traffic = Traffic.OURS
    variant: Callable[[Rule, int], Rule] = lambda rule, _value: rule


AXES = (
    Axis(
        f"Sockets of a group, {SOCKET_FLOWS:,} flows",
        "sockets",
        SOCKETS,
        _ALL,
        lambda value: value,
        lambda _: make_load(SOCKET_FLOWS, 64, _BATCHES),
        fits=lambda rule, value: rule is not rules.UDPGRM or value <= UDPGRM_SOCKETS_MAX,
    ),
    Axis(
        f"Flows, {_WORKERS} sockets",
        "flows",
        FLOWS,
        (rules.PASS, *_OURS, rules.NGINX, rules.CONNECTED),
        lambda _: _WORKERS,
        lambda value: make_load(value, 64, _BATCHES),
        fits=lambda rule, value: rule is not rules.CONNECTED or value <= CONNECTED_FLOWS_MAX,
    ),
    Axis(
        "Bytes of a datagram",
        "bytes",
        SIZES,
        (rules.PASS, *_OURS, rules.NGINX),
        lambda _: _WORKERS,
        lambda value: make_load(1024, value, _BATCHES),
    ),
    Axis(
        f"Datagrams of {TRAIN_SIZE} bytes sent as one (UDP_SEGMENT)",
        "in a train",
        TRAINS,
        (rules.PASS, *_OURS, rules.UDPGRM),
        lambda _: _WORKERS,
        lambda value: make_load(1024, TRAIN_SIZE, _BATCHES, value),
    ),
    Axis(
        f"Entries of the dispatch table, Initials of {TABLE_FLOWS:,} flows; a group has {TABLE_SIZE:,}",
        "entries",
        TABLES,
        (rules.PASS, rules.EBPF),
        lambda _: _WORKERS,
        lambda _: make_load(TABLE_FLOWS, 64, _BATCHES),
        traffic=Traffic.INITIALS,
        variant=lambda rule, value: rules.ours_with_table(value) if rule is rules.EBPF else rule,
    ),
)


def run(path: Path, plan: Plan, quick: bool = False) -> Report:
    """Measure along all axes; ``quick`` takes the ends of each.

    Raises: Astray when a datagram was lost or mis-steered.
    """
    notes: list[str] = []
    tables: list[Table] = []
    bars: list[Bar] = []
    samples: dict[str, list[float]] = {}
    for axis in AXES:
        values = (axis.values[0], axis.values[-1]) if quick else axis.values
        sends: dict[Point, list[float]] = {}
        for value in values:
            sends |= _measure(axis, value, path, plan, notes)
        tables.append(_table(axis, values, sends))
        bars += _bars(axis, sends)
        samples |= {f"{axis.unit}: {point}": taken for point, taken in sends.items()}
    notes.append(
        "nginx's rule is not in the table of trains: it reads what lies in the linear part of a packet, where a train "
        "from a local sender has its UDP header alone, so it steers none of them."
    )
    notes.append("Every datagram went where it belongs, none was lost.")
    return Report("growth", {"rounds": plan.rounds, "seed": plan.seed}, tables, bars, notes, samples)


def _measure(axis: Axis, value: int, path: Path, plan: Plan, notes: list[str]) -> dict[Point, list[float]]:
    """Measure at one value: what is compared lies in the same rounds."""
    lanes: list[Lane] = []
    points: dict[str, Point] = {}
    load, workers = axis.load(value), axis.workers(value)
    with contextlib.ExitStack() as stack:
        for rule in (rules.NONE, *axis.rules):
            if not axis.fits(rule, value):
                continue
            point = Point(rule, value)
            try:
                opened = axis.variant(rule, value)
                lane = open_lane(stack, str(point), opened, axis.traffic, workers=workers, load=load, path=path)
            except (SteeringUnavailable, ProgramUnavailable) as error:
                notes.append(f"Left out: {point}. {first_line(error)}")
                continue
            lanes.append(lane)
            points[lane.name] = point
        here = plan._replace(progress=lambda text: plan.progress(f"{value:,} {axis.unit}: {text}"))
        taken = measure(lanes, path, load.batches, here)
    return {points[name]: sample.send for name, sample in taken.items()}


def _table(axis: Axis, values: Iterable[int], sends: dict[Point, list[float]]) -> Table:
    rows: list[list[Any]] = []
    for value in values:
        base = sends[Point(rules.NONE, value)]
        row: list[Any] = [value, spread(base)]
        for rule in axis.rules:
            mine = sends.get(Point(rule, value))
            row.append(differences(mine, base) if mine else None)
        rows.append(row)
    columns = (axis.unit, "none, ns/datagram", *(rule.name for rule in axis.rules))
    return Table(f"{axis.title}: more than none, ns per datagram", columns, rows)


def _bars(axis: Axis, sends: dict[Point, list[float]]) -> Iterable[Bar]:
    if axis is not AXES[0]:
        return
    for rule in _OURS:
        few, many = (_more(sends, rule, at) for at in (_FEW_SOCKETS, _MANY_SOCKETS))
        if few and many:
            text = f"{rule.name}: what {_MANY_SOCKETS:,} sockets cost over what {_FEW_SOCKETS} cost"
            yield Bar(text, many / few, GROWTH_LIMIT, RATIO)


def _more(sends: dict[Point, list[float]], rule: Rule, at: int) -> float | None:
    if Point(rule, at) not in sends:
        return None
    return differences(sends[Point(rule, at)], sends[Point(rules.NONE, at)]).median
