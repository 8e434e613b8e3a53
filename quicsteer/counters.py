"""What the kernel did with the datagrams of a group, as immutable snapshots."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from . import _kernel
from .abi import Outcome
from .modes import SteeringMode

_DROPS_MODULUS = 2**32


@dataclass(frozen=True)
class SlotStats:
    """One slot on one address. What the mode cannot know is ``None``.

    ``dropped`` are datagrams that the kernel dropped while the slot was open, for want of receive buffer;
    ``swallowed`` those sent to it while it was parked. ``routed`` and the other outcomes are what the program sent
    here. ``queued_bytes`` and ``buffer_bytes`` are in the kernel's accounting (a small datagram takes 832 bytes).
    """

    slot: int
    address: tuple[str, int]
    parked: bool
    dropped: int | None
    swallowed: int | None
    queued_bytes: int | None
    buffer_bytes: int | None
    routed: int | None
    dispatched: int | None
    unroutable: int | None
    malformed: int | None


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


@dataclass(frozen=True)
class GroupStats:
    """A group at one moment. ``time`` is in seconds of the monotonic clock.

    ``sink`` counts the datagrams that ``drop_invalid`` dropped, ``None`` in modes without a sink. ``fallback`` says
    why the mode is not the best one, ``None`` when it is.
    """

    mode: SteeringMode
    time: float
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
    def outcomes(self) -> Mapping[Outcome, int | None]:
        """Datagrams by outcome over all slots and the sink; ``None`` where the mode cannot know."""
        return {
            outcome: _sum([*(getattr(slot, outcome.name.lower()) for slot in self.slots), self.sink_outcomes[outcome]])
            for outcome in Outcome
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the snapshot as plain types for JSON."""
        return {
            "mode": str(self.mode),
            "time": self.time,
            "fallback": self.fallback,
            "outcomes": {outcome.name.lower(): count for outcome, count in self.outcomes.items()},
            "dropped": self.dropped,
            "sink": self.sink,
            "host": asdict(self.host) if self.host else None,
            "slots": [{**asdict(slot), "address": list(slot.address)} for slot in self.slots],
        }


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


def read_slot(
    slot: int, address: tuple[str, int], fd: int, counter: DropCounter, outcomes: tuple[int | None, ...]
) -> SlotStats:
    """Read the socket of a slot and bring its drop counter up to date."""
    queued: int | None
    buffer: int | None
    try:
        queued, buffer, raw = _kernel.read_meminfo(fd)
    except OSError:  # before Linux 4.12, and on other systems
        return SlotStats(slot, address, counter.parked, None, None, None, None, *outcomes)
    counter.update(raw)
    return SlotStats(slot, address, counter.parked, counter.dropped, counter.swallowed, queued, buffer, *outcomes)


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


def _sum(counts: Any) -> int | None:
    """Add up counts; what cannot be known of one part cannot be known of the whole."""
    values = list(counts)
    return None if None in values else sum(values)
