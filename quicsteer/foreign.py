"""Notices servers that issue connection IDs which are not the group's. No I/O.

A group whose workers issue others is worse than none: each datagram of an established connection goes where a hash of
its connection ID says, which with four workers is wrong three times in four. What gives it away: new connections come,
and yet nothing ever arrives under a connection ID of the group. A flood of junk does not look like that while there is
any client, and neither does a restart, since every client that completes a handshake is heard from under ours.

Mode ``cbpf`` counts no outcomes. There only the sink is known (``drop_invalid``), and a flood fills it as well.
"""

from collections.abc import Mapping
from typing import NamedTuple

from .abi import Outcome
from .counters import GroupStats

SPAN = 10.0
"""Seconds that are judged together."""

NEW, LOST = 10, 20
"""Datagrams of new connections, and datagrams without a connection ID of the group, that are enough to judge by."""

ROUTED_SHARE = 0.02
"""Share of the datagrams of established connections that carry connection IDs of the group, below which they seem to be
no server's work."""

SUNK = 100
"""Datagrams in the sink of mode ``cbpf``, in one span, that are worth a warning."""

_CAUSE = (
    "does the server issue connection IDs of its own? Each one that it issues must come from "
    "worker.connection_ids.issue(), or connections end at the wrong worker"
)


class _Totals(NamedTuple):
    """What is compared: no more, because each reading of a group is looked at."""

    time: float
    outcomes: Mapping[Outcome, int | None]
    sink: int | None


class ForeignIds:
    """Looks at one snapshot after the other."""

    def __init__(self) -> None:
        self._first: _Totals | None = None
        self._told = False

    def look(self, stats: GroupStats) -> str | None:
        """Return a warning, once, when a server seems to issue other connection IDs."""
        if self._told or not stats.mode.steers:
            return None
        now = _Totals(stats.time, stats.outcomes, stats.sink)
        first = self._first or now
        seconds = now.time - first.time
        if self._first is None or seconds >= SPAN:
            self._first = now
        outcomes = {outcome: _difference(now.outcomes[outcome], first.outcomes[outcome]) for outcome in Outcome}
        if outcomes[Outcome.ROUTED] is None:
            text = _judge_sink(_difference(now.sink, first.sink))
        else:
            text = _judge(outcomes, seconds)
        self._told = text is not None
        return text


def _difference(count: int | None, earlier: int | None) -> int | None:
    return None if count is None or earlier is None else count - earlier


def _judge(outcomes: dict[Outcome, int | None], seconds: float) -> str | None:
    routed, new = outcomes[Outcome.ROUTED] or 0, outcomes[Outcome.DISPATCHED] or 0
    lost = outcomes[Outcome.UNROUTABLE] or 0
    if new < NEW or lost < LOST or routed > ROUTED_SHARE * (routed + lost):
        return None
    return (
        f"of {routed + lost} datagrams of established connections in {seconds:.0f} s, {routed} carry a connection ID "
        f"of this group, while new connections come: {_CAUSE}"
    )


def _judge_sink(sink: int | None) -> str | None:
    if sink is None or sink < SUNK:
        return None
    return (
        f"{sink} datagrams without a connection ID of this group were dropped within {SPAN:.0f} s. Unless that is a "
        f"flood: {_CAUSE}. Mode ebpf could tell"
    )
