"""Kernel-level UDP datagram steering by connection ID for Python QUIC servers on Linux."""

from .abi import Outcome
from .capability import Capabilities, Probe, detect
from .cid import ConnectionIds
from .counters import GroupStats, HostStats, SlotStats
from .errors import (
    KernelError,
    QuicSteerError,
    ReceiveBufferWarning,
    SteeringFallbackWarning,
    SteeringUnavailable,
)
from .group import SteeringGroup
from .modes import SteeringMode
from .worker import Worker

__all__ = [
    "Capabilities",
    "ConnectionIds",
    "GroupStats",
    "HostStats",
    "KernelError",
    "Outcome",
    "Probe",
    "QuicSteerError",
    "ReceiveBufferWarning",
    "SlotStats",
    "SteeringFallbackWarning",
    "SteeringGroup",
    "SteeringMode",
    "SteeringUnavailable",
    "Worker",
    "detect",
]
