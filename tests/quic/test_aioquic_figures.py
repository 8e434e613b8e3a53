"""What a server counts of its connections and streams, by error code, in and out."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.events import QuicEvent, StreamDataReceived
from quic import TIMEOUT, Client, client_configuration, server_configuration

from quicsteer import SteeringGroup
from quicsteer.aioquic import ConnectionEnd, SteeredQuicServer, StreamReset, serve
from quicsteer.quicstats import QuicStats

NO_APPLICATION_PROTOCOL = 0x100 + 120  # a TLS alert (RFC 8446, 6) as RFC 9001, 4.8 carries it


class Protocol(QuicConnectionProtocol):
    """Does what the client's words ask for."""

    def quic_event_received(self, event: QuicEvent) -> None:
        if not isinstance(event, StreamDataReceived):
            return
        if event.data == b"reset":
            self._quic.reset_stream(event.stream_id, 0x11)
        elif event.data == b"stop":
            self._quic.stop_stream(event.stream_id, 0x12)
        elif event.data == b"close":
            self.close(0x13, "as you wish")
        self.transmit()


def with_server(test: Callable[[SteeredQuicServer, tuple[str, int]], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        with SteeringGroup.open("127.0.0.1:0", 1, mode="hash") as group:
            [worker] = group.workers
            server = await serve(worker, configuration=server_configuration(**settings), create_protocol=Protocol)
            await test(server, group.addresses[0])
            server.close()
            figures = server.figures()
            assert figures.opened == sum(figures.ends.values())
            assert (figures.connections, figures.handshakes) == (0, 0)
            worker.close()

    asyncio.run(main())


async def until(server: SteeredQuicServer, good: Callable[[QuicStats], bool]) -> QuicStats:
    """Let the loop turn until the server's figures are as they should be."""
    deadline = time.monotonic() + TIMEOUT
    while not good(figures := server.figures()):
        assert time.monotonic() < deadline, figures
        await asyncio.sleep(0)
    return figures


def say(client: Client, words: bytes) -> int:
    stream = client.connection.get_next_available_stream_id()
    client.connection.send_stream_data(stream, words)
    client.protocol.transmit()
    return stream


def test_streams_are_counted_by_who_gave_them_up_and_why() -> None:
    async def test(server: SteeredQuicServer, address: tuple[str, int]) -> None:
        client = Client()
        await client.connect(address)
        say(client, b"reset")
        say(client, b"stop")
        first, second = say(client, b"nothing"), say(client, b"nothing")
        await until(server, lambda figures: sum(figures.stream_resets.values()) >= 2)
        client.connection.reset_stream(first, 0x21)
        client.connection.stop_stream(second, 0x22)
        client.protocol.transmit()
        figures = await until(server, lambda figures: sum(figures.stream_resets.values()) >= 4)
        expected = {
            StreamReset("server", "RESET_STREAM", 0x11): 1,
            StreamReset("server", "STOP_SENDING", 0x12): 1,
            StreamReset("client", "RESET_STREAM", 0x21): 1,
            StreamReset("client", "STOP_SENDING", 0x22): 1,
        }
        answered = StreamReset("client", "RESET_STREAM", 0x12)  # what STOP_SENDING asks for
        figures = await until(server, lambda figures: answered in figures.stream_resets)
        assert figures.stream_resets == {**expected, answered: 1}
        client.drop()

    with_server(test)


def test_connections_are_counted_by_who_ended_them_and_why() -> None:
    async def test(server: SteeredQuicServer, address: tuple[str, int]) -> None:
        by_client, by_server, silent = Client(), Client(), Client()
        for client in (by_client, by_server, silent):
            await client.connect(address)
        assert server.figures().connections == 3
        await by_client.close(0x31)
        say(by_server, b"close")
        await asyncio.wait_for(by_server.protocol.wait_closed(), TIMEOUT)
        silent.drop()
        figures = await until(server, lambda figures: sum(figures.ends.values()) == 3)
        assert figures.ends == {
            ConnectionEnd("client", True, 0x31): 1,
            ConnectionEnd("server", True, 0x13): 1,
            ConnectionEnd("nobody", False, 1): 1,
        }

    with_server(test, idle_timeout=1.0)


def test_a_handshake_that_fails_has_the_name_of_its_alert() -> None:
    async def test(server: SteeredQuicServer, address: tuple[str, int]) -> None:
        client = Client(client_configuration(alpn_protocols=["nothing we speak"]))
        with pytest.raises(ConnectionError):
            await client.connect(address)
        figures = await until(server, lambda figures: bool(figures.ends))
        assert figures.ends == {ConnectionEnd("server", False, NO_APPLICATION_PROTOCOL): 1}
        [row] = figures.to_dict()["ends"]
        assert row["name"] == "CRYPTO_ERROR(no_application_protocol)"
        client.drop()

    with_server(test, alpn_protocols=["echo"])


def test_what_is_open_when_a_server_closes_is_counted_as_closed_by_it() -> None:
    async def test(server: SteeredQuicServer, address: tuple[str, int]) -> None:
        clients = [Client() for _ in range(3)]
        for client in clients:
            await client.connect(address)
        server.close()
        assert server.figures().ends == {ConnectionEnd("server", True, 0): 3}
        for client in clients:
            await asyncio.wait_for(client.protocol.wait_closed(), TIMEOUT)
            client.drop()
        assert server.figures().ends == {ConnectionEnd("server", True, 0): 3}

    with_server(test)
