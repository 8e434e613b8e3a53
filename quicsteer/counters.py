"""What the kernel did with the datagrams of a group, as immutable snapshots."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from . import _kernel
from .abi import Outcome
from .modes import SteeringMode

READ_INTERVAL = 60.0
"""Seconds between two readings, at most: in that time no socket drops 2^32 datagrams."""

_DROPS_MODULUS = 2**32
_OUTCOME_NAMES = {outcome: outcome.name.lower() for outcome in Outcome}
_SLOT_COUNTS = ("dropped", "swallowed", *_OUTCOME_NAMES.values())


class Place(NamedTuple):
    """Whose slot it is, and what for: ``"listener"``, ``"established"`` (then of a ``bank``) or ``"both"``."""

    worker: int
    role: str
    bank: int | None


@dataclass(frozen=True)
class SlotStats:
    """One slot on one address. What the mode cannot know is ``None``.

    ``role`` is ``"listener"`` (new connections), ``"established"`` (datagrams that carry connection IDs of the group;
    then ``bank`` says of which generation of workers) or ``"both"``. ``worker`` is the index of the worker that has it.
    ``dropped`` are datagrams that the kernel dropped while the slot was open, for want of receive buffer;
    ``swallowed`` those that came while it was parked, or waited when it was. ``routed`` and the other outcomes are what
    the program sent here. ``queued_bytes`` and ``buffer_bytes`` are in the kernel's accounting (a small datagram takes
    832 bytes).
    """

    slot: int
    address: tuple[str, int]
    worker: int
    role: str
    bank: int | None
    parked: bool
    dropped: int | None
    swallowed: int | None
    queued_bytes: int | None
    buffer_bytes: int | None
    routed: int | None
    dispatched: int | None
    unroutable: int | None
    malformed: int | None

    @property
    def steered(self) -> int | None:
        """Datagrams that the program sent here, whatever their outcome and whatever became of them then."""
        return _sum((self.routed, self.dispatched, self.unroutable, self.malformed))

    @property
    def fill(self) -> float | None:
        """How full the receive buffer is, from 0 to 1; the kernel lets the last datagram go a little over it."""
        if self.queued_bytes is None or not self.buffer_bytes:
            return None
        return min(self.queued_bytes / self.buffer_bytes, 1.0)

    def __sub__(self, earlier: "SlotStats") -> "SlotStats":
        counts: dict[str, Any] = {
            name: _difference(getattr(self, name), getattr(earlier, name)) for name in _SLOT_COUNTS
        }
        return SlotStats(**{**vars(self), **counts})


@dataclass(frozen=True)
class HostStats:
    """UDP counters of this network namespace since the group opened, IPv4 and IPv6 (/proc/net/snmp, snmp6).

    ``rcvbuf_errors``: no room in a receive buffer. ``mem_errors``: UDP memory of the host used up. ``no_ports``:
    nobody listened. ``in_csum_errors``: wrong checksums.
    """

    rcvbuf_errors: int
    mem_errors: int
    no_ports: int
    in_csum_errors: int

    def __sub__(self, earlier: "HostStats") -> "HostStats":
        return HostStats(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a group did with datagrams, up to a moment or between two.

    ``sink`` counts the datagrams that ``drop_invalid`` dropped, ``None`` in modes without a sink; ``sink_outcomes`` has
    them by outcome. ``fallback`` says why the mode is not the best one, ``None`` when it is.
    """

    mode: SteeringMode
    slots: tuple[SlotStats, ...]
    sink: int | None
    host: HostStats | None
    fallback: str | None
    sink_outcomes: Mapping[Outcome, int | None]

    @property
    def dropped(self) -> int | None:
        """Datagrams that the kernel dropped on open slots, for want of receive buffer."""
        return _sum(slot.dropped for slot in self.slots)

    @property
    def parked(self) -> int | None:
        """Datagrams that came for parked slots and were swallowed."""
        return _sum(slot.swallowed for slot in self.slots)

    @property
    def outcomes(self) -> Mapping[Outcome, int | None]:
        """Datagrams by outcome over all slots and the sink; ``None`` where the mode cannot know."""
        return {
            outcome: _sum([*map(attrgetter(name), self.slots), self.sink_outcomes[outcome]])
            for outcome, name in _OUTCOME_NAMES.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain types for JSON, as docs/stats.md describes them."""
        return {
            "mode": str(self.mode),
            "fallback": self.fallback,
            "outcomes": _by_name(self.outcomes),
            "dropped": self.dropped,
            "parked": self.parked,
            "sink": self.sink,
            "sink_outcomes": _by_name(self.sink_outcomes),
            "host": vars(self.host).copy() if self.host else None,
            "slots": [{**vars(slot), "address": list(slot.address)} for slot in self.slots],
        }


@dataclass(frozen=True, kw_only=True)
class GroupStats(Figures):
    """A group at one moment, counted since it opened. ``time`` is in seconds of the monotonic clock.

    ``later - earlier`` is what happened between two moments.
    """

    time: float

    def __sub__(self, earlier: "GroupStats") -> "GroupDifference":
        """Return what happened since an earlier moment.

        Raises:
            ValueError: that moment was later, or the snapshot is of another group.
        """
        places = [[(slot.slot, slot.address) for slot in stats.slots] for stats in (self, earlier)]
        if places[0] != places[1] or self.mode is not earlier.mode:
            raise ValueError("the snapshots are of different groups")
        if self.time < earlier.time:
            raise ValueError(f"the earlier snapshot is {earlier.time - self.time:.3f} s later")
        return GroupDifference(
            mode=self.mode,
            slots=tuple(slot - before for slot, before in zip(self.slots, earlier.slots, strict=True)),
            sink=_difference(self.sink, earlier.sink),
            host=self.host - earlier.host if self.host and earlier.host else None,
            fallback=self.fallback,
            sink_outcomes={
                outcome: _difference(count, earlier.sink_outcomes[outcome])
                for outcome, count in self.sink_outcomes.items()
            },
            seconds=self.time - earlier.time,
        )

    def to_dict(self) -> dict[str, Any]:
        return {"time": self.time, **super().to_dict()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "GroupStats":
        """Return the snapshot that ``to_dict()`` made plain; what an older release did not know is ``None``."""
        return cls(
            mode=SteeringMode(plain["mode"]),
            time=plain["time"],
            slots=tuple(
                SlotStats(**{**{field.name: slot.get(field.name) for field in fields(SlotStats)}, "address": address})
                for slot in plain["slots"]
                for address in [(slot["address"][0], slot["address"][1])]
            ),
            sink=plain["sink"],
            host=HostStats(*(plain["host"][field.name] for field in fields(HostStats))) if plain["host"] else None,
            fallback=plain["fallback"],
            sink_outcomes={outcome: plain["sink_outcomes"][outcome.name.lower()] for outcome in Outcome},
        )


@dataclass(frozen=True, kw_only=True)
class GroupDifference(Figures):
    """What happened to a group in a span of ``seconds``.

    Counts are those of the span; ``parked``, ``queued_bytes`` and ``buffer_bytes`` of a slot are as at its end.
    """

    seconds: float

    def rate(self, count: int | None) -> float | None:
        """Return a count of this span per second."""
        return None if count is None or not self.seconds else count / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, **super().to_dict()}


@dataclass
class DropCounter:
    """Extends a socket's 32-bit drop counter, and tells drops on an open slot from what a filter swallowed.

    It must be read at least once in 2^32 drops.
    """

    parked: bool = True
    dropped: int = 0
    swallowed: int = 0
    last: int = 0

    def update(self, raw: int) -> None:
        """Take over a new reading of the socket's counter."""
        new = (raw - self.last) % _DROPS_MODULUS
        self.last = raw
        if self.parked:
            self.swallowed += new
        else:
            self.dropped += new


def read_socket(fd: int, counter: DropCounter) -> tuple[bool, int | None, int | None, int | None, int | None]:
    """Read the socket of a slot and bring its drop counter up to date; return the figures in ``SlotStats``' order."""
    try:
        queued, buffer, raw = _kernel.read_meminfo(fd)
    except OSError:  # before Linux 4.12, and on other systems
        return counter.parked, None, None, None, None
    counter.update(raw)
    return counter.parked, counter.dropped, counter.swallowed, queued, buffer


def read_host() -> HostStats | None:
    """Return the host's UDP counters since boot, or ``None`` where /proc does not show them."""
    try:
        names, values = (
            line.split()[1:] for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Udp:")
        )
    except (OSError, ValueError):
        return None
    counts = dict(zip(names, map(int, values), strict=True))
    try:
        for line in Path("/proc/net/snmp6").read_text().splitlines():
            name, value = line.split()
            if name.startswith("Udp6"):
                counts[name[4:]] = counts.get(name[4:], 0) + int(value)
    except OSError:
        pass  # no IPv6
    return HostStats(*(counts.get(name, 0) for name in ("RcvbufErrors", "MemErrors", "NoPorts", "InCsumErrors")))


def read_udp_memory() -> tuple[int, int, int] | None:
    """Return the pages of memory that UDP uses, those at which pressure begins, and the most that it may use.

    ``None`` where /proc does not tell. The kernel counts in net.ipv4.udp_mem.
    """
    try:
        [line] = [line for line in Path("/proc/net/sockstat").read_text().splitlines() if line.startswith("UDP:")]
        words = line.split()
        _, pressure, most = map(int, Path("/proc/sys/net/ipv4/udp_mem").read_text().split())
        return int(words[words.index("mem") + 1]), pressure, most
    except (OSError, ValueError):
        return None


def _sum(counts: Iterable[int | None]) -> int | None:
    """Add up counts; what cannot be known of one part cannot be known of the whole."""
    values = list(counts)
    return None if None in values else sum(values)  # type: ignore[arg-type]  # there is no None


def _difference(count: int | None, earlier: int | None) -> int | None:
    return None if count is None or earlier is None else count - earlier


def _by_name(outcomes: Mapping[Outcome, int | None]) -> dict[str, int | None]:
    return {_OUTCOME_NAMES[outcome]: count for outcome, count in outcomes.items()}
