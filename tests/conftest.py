"""What all tests share: the vectors, the modes of this host, and the rule that CI may not skip kernel tests."""

import os
import socket
from collections.abc import Iterator

import pytest

from quicsteer import SteeringMode, capability

pytest_plugins = ["quicsteer.testing", "pytester"]

REQUIRE_KERNEL = os.environ.get("QUICSTEER_REQUIRE_KERNEL") == "1"


def need_mode(mode: SteeringMode) -> None:
    """Skip a test on a host that refuses the mode; fail it where the kernel tests are required."""
    refusal = capability.refusal(mode)
    if refusal is None:
        return
    reason = f"mode {mode}: {refusal.detail}"
    if REQUIRE_KERNEL:
        pytest.fail(f"QUICSTEER_REQUIRE_KERNEL is set, but {reason}")
    pytest.skip(reason)


@pytest.fixture(params=[SteeringMode.EBPF, SteeringMode.CBPF], ids=str)
def steering_mode(request: pytest.FixtureRequest) -> SteeringMode:
    """Each mode that steers by connection ID."""
    mode = SteeringMode(request.param)
    need_mode(mode)
    return mode


@pytest.fixture(params=list(SteeringMode), ids=str)
def any_mode(request: pytest.FixtureRequest) -> SteeringMode:
    """Each mode, steering or not."""
    mode = SteeringMode(request.param)
    need_mode(mode)
    return mode


@pytest.fixture
def ebpf() -> SteeringMode:
    need_mode(SteeringMode.EBPF)
    return SteeringMode.EBPF


@pytest.fixture
def client() -> Iterator[socket.socket]:
    """An IPv4 socket to send from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        yield sock
