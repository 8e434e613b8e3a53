"""``cost``: what one datagram costs with and without steering, on groups of the same size."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from quicsteer import SteeringGroup, SteeringMode, SteeringUnavailable

from ._capabilities import CAP_PERFMON, CAP_SYS_ADMIN, without
from ._native import Arrival
from .lanes import KEY, Lane, Load, Traffic, make_clients, make_datagrams, measure, pinned
from .report import RATIO, Bar, Report, Table, differences, first_line, ratio, spread


class Variant(NamedTuple):
    """A row of the table: a mode, what is sent, and the row that it is compared with.

    ``without`` are capabilities that are put aside while the group opens.
    """

    name: str
    mode: SteeringMode
    traffic: Traffic
    base: str
    without: tuple[int, ...] = ()

    @property
    def to_sink(self) -> bool:
        return self.traffic is Traffic.JUNK and self.mode.steers


HASH, CBPF, EBPF = SteeringMode.HASH, SteeringMode.CBPF, SteeringMode.EBPF

VARIANTS = (
    Variant("none", HASH, Traffic.OURS, "none"),
    Variant("none, another group", HASH, Traffic.OURS, "none"),
    Variant("ebpf", EBPF, Traffic.OURS, "none"),
    Variant("ebpf, loaded without CAP_PERFMON", EBPF, Traffic.OURS, "none", (CAP_PERFMON, CAP_SYS_ADMIN)),
    Variant("cbpf", CBPF, Traffic.OURS, "none"),
    Variant("none, Initials", HASH, Traffic.INITIALS, "none, Initials"),
    Variant("ebpf, Initials", EBPF, Traffic.INITIALS, "none, Initials"),
    Variant("cbpf, Initials", CBPF, Traffic.INITIALS, "none, Initials"),
    Variant("none, junk", HASH, Traffic.JUNK, "none, junk"),
    Variant("ebpf, junk to the sink", EBPF, Traffic.JUNK, "none, junk"),
    Variant("cbpf, junk to the sink", CBPF, Traffic.JUNK, "none, junk"),
)


class Limit(NamedTuple):
    """What a variant may cost more than its base, per datagram."""

    variant: str
    nanoseconds: float | None
    ratio: float | None


LIMITS = (Limit("ebpf", 130, 1.05), Limit("cbpf", 350, None))


def open_lane(stack: contextlib.ExitStack, variant: Variant, workers: int, load: Load, datagrams: list[bytes]) -> Lane:
    """Open the group of a variant.

    Raises: SteeringUnavailable when the mode does not work here.
    """
    with without(*variant.without):
        group = SteeringGroup.open(
            "127.0.0.1:0",
            workers,
            mode=variant.mode,
            cid_length=load.cid_length,
            key=KEY,
            drop_invalid=variant.to_sink,
        )
    stack.enter_context(group)
    arrival = Arrival.AT_NAMED_SOCKET if variant.mode.steers else Arrival.AT_ANY_SOCKET
    if variant.to_sink:
        arrival = Arrival.NOWHERE
    sockets = tuple(worker.socket for worker in group.workers)
    return Lane(variant.name, group.addresses[0][1], sockets, datagrams, arrival, lambda: group.stats().sink or 0)


def run(workers: int, load: Load, rounds: int, seed: int, cpu: int) -> Report:
    """Measure all variants.

    Raises: Astray when a datagram was lost or mis-steered.
    """
    notes: list[str] = []
    lanes: list[Lane] = []
    with contextlib.ExitStack() as stack:
        clients = stack.enter_context(make_clients())
        with SteeringGroup.open("127.0.0.1:0", workers, mode=CBPF, cid_length=load.cid_length, key=KEY) as issuer:
            datagrams = {traffic: make_datagrams(traffic, issuer, load) for traffic in Traffic}
        for variant in VARIANTS:
            try:
                lanes.append(open_lane(stack, variant, workers, load, datagrams[variant.traffic]))
            except SteeringUnavailable as error:
                notes.append(f"Left out: {variant.name}. {first_line(error)}")
        with pinned(cpu):
            samples = measure(lanes, clients, load.batches, rounds, seed)
    total = sum(sample.datagrams for sample in samples.values())
    late = sum(sample.late for sample in samples.values())
    notes.append(f"{total:,} datagrams, each where it belongs, none lost; {late} batches had to be waited for.")
    sends = {name: sample.send for name, sample in samples.items()}
    drains = {name: sample.drain for name, sample in samples.items()}
    return Report(
        "cost",
        {"workers": workers, "rounds": rounds, **load._asdict(), "seed": seed},
        [_table(sends, drains)],
        list(_bars(sends)),
        notes,
        sends,
    )


def _table(sends: dict[str, list[float]], drains: dict[str, list[float]]) -> Table:
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
                    spread(drains[variant.name]).median if not variant.to_sink else None,
                ]
            )
    columns = ("variant", "send and queue, ns/datagram", "more than none, ns", "ratio", "read, ns/datagram")
    return Table("Cost of a datagram, median [quartiles]", columns, rows)


def _bars(sends: dict[str, list[float]]) -> Sequence[Bar]:
    bars = []
    bases = {variant.name: variant.base for variant in VARIANTS}
    for limit in LIMITS:
        if limit.variant not in sends:
            continue
        mine, base = sends[limit.variant], sends[bases[limit.variant]]
        if limit.nanoseconds is not None:
            text = f"{limit.variant}: more per datagram of ours"
            bars.append(Bar(text, differences(mine, base).median, limit.nanoseconds, "ns"))
        if limit.ratio is not None:
            bars.append(Bar(f"{limit.variant}: ratio per datagram of ours", ratio(mine, base), limit.ratio, RATIO))
    return bars
