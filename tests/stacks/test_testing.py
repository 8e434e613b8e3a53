"""``quicsteer.testing``, as a user of pytest meets it."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from quic import TIMEOUT, Client, serving

from quicsteer import Outcome, SteeringMode
from quicsteer.relay import MAPPINGS_KEPT
from quicsteer.testing import OpenGroup, OpenRelay, UdpRelay


@pytest.fixture(params=["127.0.0.1", "::1"])
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def echo(host: str) -> Iterator[socket.socket]:
    """A server that says which port a datagram came from."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))

        def serve() -> None:
            while True:
                data, sender = sock.recvfrom(2000)
                if not data:
                    return
                sock.sendto(b"%d %s" % (sender[1], data), sender)

        thread = threading.Thread(target=serve)
        thread.start()
        yield sock
        with socket.socket(sock.family, socket.SOCK_DGRAM) as end:
            end.sendto(b"", sock.getsockname())
        thread.join()


def client_of(relay: UdpRelay) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in relay.address[0] else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(TIMEOUT)
    sock.connect(relay.address)
    return sock


def ask(client: socket.socket, data: bytes = b"hello") -> int:
    """Send a datagram, see that it is answered, and return the port that the server saw."""
    client.send(data)
    port, _, echoed = client.recv(2000).partition(b" ")
    assert echoed == data
    return int(port)


def test_each_client_has_a_port_until_it_is_rebound(echo: socket.socket, udp_relay: OpenRelay) -> None:
    relay = udp_relay(echo.getsockname()[:2])
    with client_of(relay) as one, client_of(relay) as two:
        first, second = ask(one), ask(two)
        assert (ask(one), ask(two)) == (first, second)
        assert first != second
        relay.rebind()
        third, fourth = ask(one), ask(two)
        assert (ask(one), ask(two)) == (third, fourth)
        assert len({first, second, third, fourth}) == 4
        assert relay.ports == (first, second, third, fourth)


def test_it_rebinds_by_itself(echo: socket.socket, udp_relay: OpenRelay) -> None:
    relay = udp_relay(echo.getsockname()[:2], rebind_every=0.01)
    with client_of(relay) as client:
        ports = {ask(client) for _ in range(2000)}
        assert len(ports) > 2


def test_it_keeps_a_bounded_number_of_sockets(echo: socket.socket, udp_relay: OpenRelay) -> None:
    relay = udp_relay(echo.getsockname()[:2])
    with client_of(relay) as client:
        for _ in range(MAPPINGS_KEPT + 20):
            relay.rebind()
            ask(client)
        assert len(relay._old) == MAPPINGS_KEPT
        assert len(relay._clients) == 1


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="rebind_every is 0"):
        UdpRelay(("127.0.0.1", 1), rebind_every=0)


def test_a_connection_survives_behind_the_relay(
    steering_mode: SteeringMode, udp_relay: OpenRelay, steered_group: OpenGroup
) -> None:
    async def visit(address: Any, relay: UdpRelay) -> int:
        client = Client()
        await client.connect(address)
        answered_by = {await client.exchange()}
        for _ in range(5):
            relay.rebind()
            answered_by.add(await client.exchange())
        client.drop()
        [worker] = answered_by
        return worker

    async def main() -> None:
        group = steered_group(4, mode=steering_mode)
        relay = udp_relay(group.addresses[0])
        async with serving(*group.workers):
            assert len({await visit(relay.address, relay) for _ in range(8)}) > 1
        assert len(relay.ports) >= 8 * 6
        if group.mode is SteeringMode.EBPF:
            outcomes = group.stats().outcomes
            assert (outcomes[Outcome.UNROUTABLE], outcomes[Outcome.MALFORMED]) == (0, 0)

    asyncio.run(main())


def test_the_fixtures_work_in_a_suite_of_somebody_else(pytester: pytest.Pytester) -> None:
    pytester.makeconftest('pytest_plugins = ["quicsteer.testing"]')
    pytester.makepyfile(
        """
        def test_group(steered_group, udp_relay):
            group = steered_group(3)
            assert group.mode.steers
            assert udp_relay(group.addresses[0]).address[1]

        def test_skips(steered_group, monkeypatch):
            from quicsteer import testing
            from quicsteer.capability import Probe
            monkeypatch.setattr(testing, "refusal", lambda mode: Probe("ebpf", False, "CAP_BPF is missing"))
            steered_group(2, mode="ebpf")
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1, skipped=1)
