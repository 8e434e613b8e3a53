"""Made-up figures for tests that need no kernel."""

from dataclasses import replace
from typing import Any

from quicsteer import GroupStats, HostStats, Outcome, SlotStats, SteeringMode
from quicsteer.quicstats import ConnectionEnd, QuicStats, StreamReset
from quicsteer.sockdiag import Process, SocketStats

ADDRESS = ("192.0.2.1", 443)
SLOT = SlotStats(
    slot=0,
    address=ADDRESS,
    worker=0,
    role="both",
    bank=None,
    parked=False,
    dropped=0,
    swallowed=0,
    queued_bytes=0,
    buffer_bytes=425_984,
    routed=0,
    dispatched=0,
    unroutable=0,
    malformed=0,
)
SOCKET = SocketStats(ADDRESS, None, 33, 1, 1, 0, 0, 212_992, False, (Process(7, "nginx"),))


def slots(**columns: list[Any]) -> tuple[SlotStats, ...]:
    """Slots of workers 0, 1, ... that differ in these columns."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return tuple(replace(SLOT, slot=number, worker=number, **row) for number, row in enumerate(rows))


def group(slots: tuple[SlotStats, ...] = (SLOT,), **changes: Any) -> GroupStats:
    stats = GroupStats(
        mode=SteeringMode.EBPF,
        time=1.0,
        slots=slots,
        sink=0,
        host=HostStats(0, 0, 0, 0),
        fallback=None,
        sink_outcomes=dict.fromkeys(Outcome, 0),
    )
    return replace(stats, **changes)


FIGURES = QuicStats(
    connections=2,
    handshakes=1,
    opened=9,
    retries=3,
    invalid_tokens=1,
    stateless_resets=4,
    unanswered_resets=1,
    unsent=5,
    ends={ConnectionEnd("client", True, 0x100): 4, ConnectionEnd("nobody", False, 0): 3},
    stream_resets={StreamReset("client", "STOP_SENDING", 0x10C): 2},
)
