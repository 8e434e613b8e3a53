"""Kernel-level UDP datagram steering by connection ID for Python QUIC servers on Linux."""

from typing import TYPE_CHECKING, Any

from .abi import Outcome
from .capability import Capabilities, Probe, detect
from .cid import ConnectionIds
from .counters import GroupDifference, GroupStats, HostStats, SlotStats
from .errors import (
    ForeignConnectionIdWarning,
    KernelError,
    QuicSteerError,
    ReceiveBufferWarning,
    SteeringFallbackWarning,
    SteeringUnavailable,
)
from .group import SteeringGroup
from .modes import SteeringMode
from .worker import Worker

if TYPE_CHECKING:
    from .supervisor import Limits, ReloadFailed, StartFailed, Supervisor

__all__ = [
    "Capabilities",
    "ConnectionIds",
    "ForeignConnectionIdWarning",
    "GroupDifference",
    "GroupStats",
    "HostStats",
    "KernelError",
    "Limits",
    "Outcome",
    "Probe",
    "QuicSteerError",
    "ReceiveBufferWarning",
    "ReloadFailed",
    "SlotStats",
    "StartFailed",
    "SteeringFallbackWarning",
    "SteeringGroup",
    "SteeringMode",
    "SteeringUnavailable",
    "Supervisor",
    "Worker",
    "detect",
]


def __getattr__(name: str) -> Any:
    """Load the supervisor when it is asked for: it brings asyncio, which a look at a group's figures does not need."""
    if name in ("Limits", "ReloadFailed", "StartFailed", "Supervisor"):
        from . import supervisor

        return getattr(supervisor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
