"""``groups``: what grows with the number of workers: opening, closing, reading counters, and the cost of a datagram."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from quicsteer import SteeringGroup, SteeringMode, SteeringUnavailable

from .cost import CBPF, EBPF, HASH
from .lanes import Lane, Load, Path, Plan, Traffic, measure, open_lane, pinned
from .report import RATIO, Bar, Report, Spread, Table, differences, first_line, ratio, spread
from .rules import ours

WORKERS = (4, 64, 256)
FEW, MANY = WORKERS[0], WORKERS[-1]
MODES = (HASH, CBPF, EBPF)
OPEN_LIMIT_MS = 100.0
GROWTH_LIMIT = 1.25

_Result = TypeVar("_Result")


class Times(NamedTuple):
    """Milliseconds of each repetition."""

    opening: list[float]
    closing: list[float]
    stats: list[float]


def run(load: Load, path: Path, plan: Plan) -> Report:
    """Measure groups of all sizes in all modes.

    Raises: Astray when a datagram was lost or mis-steered.
    """
    notes: list[str] = []
    with pinned(plan.cpu):
        times = _measure_times(plan.rounds, notes)
    modes = [mode for mode in MODES if (mode, FEW) in times]
    sends = _measure_sends(load, path, plan, modes)
    notes.append("Every datagram went where it belongs, none was lost.")
    return Report(
        "groups",
        {"rounds": plan.rounds, **load._asdict(), "seed": plan.seed},
        [_times_table(times), _sends_table(sends)],
        _bars(times, sends),
        notes,
        {_name(mode, workers): values for (mode, workers), values in sends.items()},
    )


def _name(mode: SteeringMode, workers: int) -> str:
    return f"{'none' if mode is HASH else mode}, {workers} workers"


def _measure_times(rounds: int, notes: list[str]) -> dict[tuple[SteeringMode, int], Times]:
    times: dict[tuple[SteeringMode, int], Times] = {}
    for mode in MODES:
        try:
            SteeringGroup.open("127.0.0.1:0", 1, mode=mode).close()  # the probes of a process run once
        except SteeringUnavailable as error:
            notes.append(f"Left out: {mode}. {first_line(error)}")
            continue
        times.update({(mode, workers): Times([], [], []) for workers in WORKERS})
    for _ in range(rounds):
        for (mode, workers), spent in times.items():
            opening, group = _timed(functools.partial(SteeringGroup.open, "127.0.0.1:0", workers, mode=mode))
            stats, _ = _timed(group.stats)
            closing, _ = _timed(group.close)
            for values, value in zip(spent, (opening, closing, stats), strict=True):
                values.append(value)
    return times


def _timed(call: Callable[[], _Result]) -> tuple[float, _Result]:
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def _measure_sends(
    load: Load, path: Path, plan: Plan, modes: list[SteeringMode]
) -> dict[tuple[SteeringMode, int], list[float]]:
    lanes: list[Lane] = []
    with contextlib.ExitStack() as stack:
        for workers in (FEW, MANY):
            for mode in modes:
                name = _name(mode, workers)
                lanes.append(open_lane(stack, name, ours(mode), Traffic.OURS, workers=workers, load=load, path=path))
        samples = measure(lanes, path, load.batches, plan)
    return {(mode, workers): samples[_name(mode, workers)].send for workers in (FEW, MANY) for mode in modes}


def _times_table(times: dict[tuple[SteeringMode, int], Times]) -> Table:
    rows = [
        ["none" if mode is HASH else str(mode), workers, *(spread(values) for values in spent)]
        for (mode, workers), spent in times.items()
    ]
    return Table("Opening, closing and reading a group, ms", ("mode", "workers", "open", "close", "stats()"), rows)


def _sends_table(sends: dict[tuple[SteeringMode, int], list[float]]) -> Table:
    rows: list[list[Any]] = []
    for mode in MODES:
        if (mode, FEW) not in sends:
            continue
        few, many = sends[mode, FEW], sends[mode, MANY]
        rows.append(
            [
                "none" if mode is HASH else str(mode),
                spread(few),
                spread(many),
                differences(many, few),
                ratio(many, few),
                *(_more_than_none(sends, mode, workers) for workers in (FEW, MANY)),
            ]
        )
    columns = (
        "mode",
        f"{FEW} workers, ns/datagram",
        f"{MANY} workers",
        "difference, ns",
        "ratio",
        f"more than none, {FEW} workers",
        f"{MANY} workers",
    )
    return Table("Cost of a datagram of ours by size of the group, median [quartiles]", columns, rows)


def _more_than_none(
    sends: dict[tuple[SteeringMode, int], list[float]], mode: SteeringMode, workers: int
) -> Spread | None:
    return None if mode is HASH else differences(sends[mode, workers], sends[HASH, workers])


def _bars(
    times: dict[tuple[SteeringMode, int], Times], sends: dict[tuple[SteeringMode, int], list[float]]
) -> list[Bar]:
    bars = []
    for mode in (CBPF, EBPF):
        if (mode, MANY) not in times:
            continue
        opening = statistics.median(times[mode, MANY].opening)
        bars.append(Bar(f"{mode}: opening {MANY} workers", opening, OPEN_LIMIT_MS, "ms"))
        growth = ratio(sends[mode, MANY], sends[mode, FEW])
        bars.append(Bar(f"{mode}: a datagram with {MANY} workers over one with {FEW}", growth, GROWTH_LIMIT, RATIO))
    return bars
