"""What ``quicsteer stats`` reads: a service with its group and workers, or the sockets of any process.

Both know what they dropped, their advice, their metrics, and their form in JSON, which docs/stats.md describes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import advice
from .addresses import format_address
from .counters import GroupDifference, GroupStats
from .prometheus import Family, group_families, quic_families, socket_families, supervisor_families
from .quicstats import QuicStats
from .sockdiag import SocketStats

SCHEMA = 1
"""Number of the JSON schema: keys are added without a new one, never changed."""


@dataclass(frozen=True)
class ServiceReadout:
    """A running ``quicsteer run``: what its supervisor says of itself, its group, and the workers' QUIC connections.

    ``strangers`` are sockets of others on its ports, as text.
    """

    supervisor: Mapping[str, Any]
    group: GroupStats
    quic: Mapping[int, QuicStats]
    strangers: Sequence[str] = ()

    @property
    def title(self) -> str:
        """Where the service listens."""
        return ", ".join(format_address(address) for address in self.supervisor["addresses"])

    @property
    def ports(self) -> list[int]:
        return list(dict.fromkeys(port for _, port in self.supervisor["addresses"]))

    @property
    def drops(self) -> dict[str, int]:
        """Datagrams that were dropped so far, by what lost them."""
        return {f"{format_address(slot.address)} {slot.slot}": slot.dropped or 0 for slot in self.group.slots}

    @property
    def identity(self) -> str:
        """Names the run of the service: another one counts from zero."""
        return str(self.supervisor["pid"])

    @property
    def time(self) -> float:
        return self.group.time

    def since(self, earlier: "ServiceReadout") -> GroupDifference | None:
        """Return what happened since an earlier readout, or ``None`` when that was of another run of the service."""
        if self.identity != earlier.identity:
            return None
        try:
            return self.group - earlier.group
        except ValueError:
            return None

    def advice(self, span: GroupDifference | None = None) -> list[str]:
        """Return one sentence for each thing to know or to change, in a span or since the group opened."""
        sentences = advice.for_group(span or self.group, self.quic, self.strangers)
        return [f"Mode {self.group.mode}: {self.group.fallback}", *sentences] if self.group.fallback else sentences

    def families(self) -> list[Family]:
        return [*group_families(self.group), *supervisor_families(self.supervisor), *quic_families(self.quic)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "supervisor": dict(self.supervisor),
            "group": self.group.to_dict(),
            "quic": [{"worker": index, **figures.to_dict()} for index, figures in self.quic.items()],
            "strangers": list(self.strangers),
            "advice": self.advice(),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], strangers: Sequence[str] = ()) -> "ServiceReadout":
        """Return the readout that ``to_dict()`` made plain."""
        quic = {figures["worker"]: QuicStats.from_dict(figures) for figures in plain["quic"]}
        return cls(plain["supervisor"], GroupStats.from_dict(plain["group"]), quic, strangers)


@dataclass(frozen=True)
class SocketsReadout:
    """The sockets on a port, or those of a process. ``time`` is in seconds of the monotonic clock."""

    title: str
    time: float
    sockets: Sequence[SocketStats]

    @property
    def ports(self) -> list[int]:
        return list(dict.fromkeys(sock.address[1] for sock in self.sockets))

    @property
    def drops(self) -> dict[str, int]:
        """Datagrams that were dropped so far, by what lost them."""
        return {str(sock.cookie): sock.dropped for sock in self.sockets}

    @property
    def identity(self) -> str:
        """A socket's cookie names it for as long as the kernel runs."""
        return ""

    def advice(self) -> list[str]:
        """Return one sentence for each thing to know or to change."""
        return advice.for_sockets(self.sockets)

    def families(self) -> list[Family]:
        return socket_families(self.sockets)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "target": self.title,
            "time": self.time,
            "dropped": sum(sock.dropped for sock in self.sockets),
            "sockets": [sock.to_dict() for sock in self.sockets],
            "advice": self.advice(),
        }


Readout = ServiceReadout | SocketsReadout
