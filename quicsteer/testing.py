"""Fixtures for tests of QUIC software: a relay that changes ports under any client, and steered groups.

Load them in ``conftest.py``::

    pytest_plugins = ["quicsteer.testing"]

``udp_relay(server)`` puts a ``UdpRelay`` in front of a server; ``steered_group(workers)`` opens a ``SteeringGroup`` on
a free port of the loopback. Both are closed when the test is over. ``UdpRelay`` needs no pytest (``quicsteer.relay``).
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from .capability import refusal
from .group import SteeringGroup
from .modes import SteeringMode
from .relay import UdpRelay

__all__ = ["OpenGroup", "OpenRelay", "UdpRelay", "steered_group", "udp_relay"]


class OpenRelay(Protocol):
    """What the fixture ``udp_relay`` is."""

    def __call__(
        self, server: tuple[str, int], listen: tuple[str, int] | None = None, *, rebind_every: float | None = None
    ) -> UdpRelay:
        """Start a relay in front of a server; the arguments are those of ``UdpRelay``."""


class OpenGroup(Protocol):
    """What the fixture ``steered_group`` is."""

    def __call__(
        self, workers: int, *, address: str = "127.0.0.1:0", mode: str = "auto", **options: Any
    ) -> SteeringGroup:
        """Open a group; the options are those of ``SteeringGroup.open``.

        A mode that this host does not allow skips the test, and so does "auto" where nothing steers.
        """


@pytest.fixture
def udp_relay() -> Iterator[OpenRelay]:
    """Starts relays in front of servers, and closes them when the test is over."""
    with contextlib.ExitStack() as relays:

        def start(
            server: tuple[str, int], listen: tuple[str, int] | None = None, *, rebind_every: float | None = None
        ) -> UdpRelay:
            return relays.enter_context(UdpRelay(server, listen, rebind_every=rebind_every))

        yield start


@pytest.fixture
def steered_group() -> Iterator[OpenGroup]:
    """Opens groups, and closes them when the test is over."""
    with contextlib.ExitStack() as groups:

        def start(workers: int, *, address: str = "127.0.0.1:0", mode: str = "auto", **options: Any) -> SteeringGroup:
            wanted = mode
            if mode == "auto":
                steering = [each for each in SteeringMode if each.steers and refusal(each) is None]
                wanted = steering[0] if steering else SteeringMode.CBPF
            found = refusal(SteeringMode(wanted))
            if found is not None:
                pytest.skip(f"mode {wanted}: {found.detail}")
            return groups.enter_context(SteeringGroup.open(address, workers, mode=wanted, **options))

        yield start
