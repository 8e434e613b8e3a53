"""``cost``: what one datagram costs under each rule, on groups of the same size."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from quicsteer import SteeringMode, SteeringUnavailable

from . import rules
from ._capabilities import CAP_PERFMON, CAP_SYS_ADMIN
from ._libbpf import ProgramUnavailable
from .lanes import Lane, Load, Path, Plan, Traffic, measure, open_lane
from .report import RATIO, Bar, Report, Table, differences, first_line, ratio, spread
from .rules import Rule


class Variant(NamedTuple):
    """A row of the table: a rule, what is sent, and the row that it is compared with."""

    name: str
    rule: Rule
    traffic: Traffic
    base: str


HASH, CBPF, EBPF = SteeringMode.HASH, SteeringMode.CBPF, SteeringMode.EBPF
_BARE = rules.ours(EBPF, without=(CAP_PERFMON, CAP_SYS_ADMIN))
_NONE, _NONE_INITIALS, _NONE_JUNK = "none", "none, Initials", "none, junk"

VARIANTS = (
    Variant(_NONE, rules.NONE, Traffic.OURS, _NONE),
    Variant("none, another group", rules.NONE, Traffic.OURS, _NONE),
    Variant(rules.PASS.name, rules.PASS, Traffic.OURS, _NONE),
    Variant("ebpf", rules.EBPF, Traffic.OURS, _NONE),
    Variant("ebpf, loaded without CAP_PERFMON", _BARE, Traffic.OURS, _NONE),
    Variant("cbpf", rules.CBPF, Traffic.OURS, _NONE),
    *(Variant(rule.name, rule, Traffic.OURS, _NONE) for rule in (*rules.OTHERS, rules.CONNECTED)),
    Variant(_NONE_INITIALS, rules.NONE, Traffic.INITIALS, _NONE_INITIALS),
    *(
        Variant(f"{rule.name}, Initials", rule, Traffic.INITIALS, _NONE_INITIALS)
        for rule in (rules.EBPF, rules.CBPF, *rules.OTHERS)
    ),
    Variant(_NONE_JUNK, rules.NONE, Traffic.JUNK, _NONE_JUNK),
    *(
        Variant(f"{mode}, junk to the sink", rules.ours(mode, drop_invalid=True), Traffic.JUNK, _NONE_JUNK)
        for mode in (EBPF, CBPF)
    ),
)


class Limit(NamedTuple):
    """What a variant may cost more than another per datagram, in nanoseconds or as a ratio of the whole."""

    variant: str
    base: str
    nanoseconds: float | None
    ratio: float | None


LIMITS = (
    Limit("ebpf", _NONE, 130, 1.05),
    Limit("ebpf", rules.PASS.name, 80, None),
    Limit("ebpf", rules.NGINX.name, None, 1.0),
    Limit("ebpf", rules.NGHTTPX.name, None, 1.0),
    Limit("cbpf", _NONE, 350, None),
)


def run(workers: int, load: Load, path: Path, plan: Plan, name: str = "cost") -> Report:
    """Measure all variants.

    Raises: Astray when a datagram was lost or mis-steered.
    """
    notes: list[str] = []
    lanes: list[Lane] = []
    with contextlib.ExitStack() as stack:
        for each in VARIANTS:
            try:
                lanes.append(
                    open_lane(stack, each.name, each.rule, each.traffic, workers=workers, load=load, path=path)
                )
            except (SteeringUnavailable, ProgramUnavailable) as error:
                notes.append(f"Left out: {each.name}. {first_line(error)}")
        samples = measure(lanes, path, load.batches, plan)
    total = sum(sample.datagrams for sample in samples.values())
    late = sum(sample.late for sample in samples.values())
    notes.append(f"{total:,} datagrams, each where it belongs, none lost; {late} batches had to be waited for.")
    notes += [f"Simpler than the original: {rule.name}, {rule.simpler}." for rule in rules.OTHERS if rule.simpler]
    sends = {lane: sample.send for lane, sample in samples.items()}
    return Report(
        name,
        {"workers": workers, "rounds": plan.rounds, **load._asdict(), "seed": plan.seed},
        [_table(sends)],
        list(_bars(sends)),
        notes,
        sends,
    )


def _table(sends: dict[str, list[float]]) -> Table:
    rows: list[list[Any]] = []
    for variant in VARIANTS:
        if variant.name in sends:
            mine, base = sends[variant.name], sends[variant.base]
            compared = variant.name != variant.base
            rows.append(
                [
                    variant.name,
                    spread(mine),
                    differences(mine, base) if compared else None,
                    ratio(mine, base) if compared else None,
                ]
            )
    columns = ("variant", "send and queue, ns/datagram", "more than none, ns", "ratio")
    return Table("Cost of a datagram, median [quartiles]", columns, rows)


def _bars(sends: dict[str, list[float]]) -> Sequence[Bar]:
    bars = []
    for limit in LIMITS:
        if limit.variant not in sends or limit.base not in sends:
            continue
        mine, base = sends[limit.variant], sends[limit.base]
        text = f"{limit.variant} against {limit.base}, per datagram"
        if limit.nanoseconds is not None:
            bars.append(Bar(text, differences(mine, base).median, limit.nanoseconds, "ns"))
        if limit.ratio is not None:
            bars.append(Bar(text, ratio(mine, base), limit.ratio, RATIO))
    return bars
