"""QUIC servers on sockets that a rule steers, and clients whose addresses change: plain aioquic on both sides."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aioquic.asyncio.server
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection, QuicConnectionId
from aioquic.quic.events import QuicEvent, StreamDataReceived

from quicsteer.demo import Identity

Issue = Callable[[bytes | None], bytes]
"""Makes a connection ID; it is given the DCID that a connection had before."""

_HOST = "127.0.0.1"


@dataclass
class IssuingConfiguration(QuicConfiguration):
    """A configuration whose server connections take their connection IDs from a function."""

    issue: Issue | None = None


class IssuedConnection(QuicConnection):
    """A connection that takes its connection IDs from its configuration, if that issues any."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._issue: Issue | None = getattr(arguments["configuration"], "issue", None)
        self._latest = arguments.get("original_destination_connection_id")
        if self._issue:
            self._rename(self._host_cids[0])
            self.host_cid = self._local_initial_source_connection_id = self._host_cids[0].cid

    def _replenish_connection_ids(self) -> None:
        known = len(self._host_cids)
        super()._replenish_connection_ids()
        for connection_id in self._host_cids[known:]:
            self._rename(connection_id)

    def _rename(self, connection_id: QuicConnectionId) -> None:
        if self._issue:
            self._latest = connection_id.cid = self._issue(self._latest)


# aioquic's server names the class of its connections nowhere else.
aioquic.asyncio.server.QuicConnection = IssuedConnection  # type: ignore[attr-defined]


async def serve(
    sock: socket.socket,
    identity: Identity,
    create_protocol: Callable[..., QuicConnectionProtocol],
    issue: Issue | None = None,
    **settings: Any,
) -> QuicServer:
    """Serve connections on a bound socket, which is closed with the server. ``settings`` are the configuration's."""
    configuration = IssuingConfiguration(is_client=False, issue=issue, **settings)
    configuration.certificate, configuration.private_key = identity.certificate, identity.key
    loop = asyncio.get_running_loop()
    _, server = await loop.create_datagram_endpoint(
        lambda: QuicServer(configuration=configuration, create_protocol=create_protocol), sock=sock
    )
    return server


class _ClientProtocol(QuicConnectionProtocol):
    """Keeps what each stream has got."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.answers: dict[int, asyncio.Future[bytes]] = {}

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived) and event.end_stream:
            answer = self.answers.pop(event.stream_id, None)
            if answer and not answer.done():
                answer.set_result(event.data)


class Client:
    """A connection of a client."""

    def __init__(self, protocol: _ClientProtocol) -> None:
        self._protocol = protocol

    async def ask(self, patience: float) -> bytes:
        """Send a byte on a stream of its own, and return what comes back.

        Raises: TimeoutError
        """
        stream = self._protocol._quic.get_next_available_stream_id()
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._protocol.answers[stream] = answer
        self._protocol._quic.send_stream_data(stream, b"?", end_stream=True)
        self._protocol.transmit()
        async with asyncio.timeout(patience):
            return await answer

    async def change_address(self, new_cid: bool) -> None:
        """Go on from another port, as behind a NAT that rebinds, or as a migration under another connection ID."""
        previous = self._protocol._transport
        await _attach(self._protocol)
        if previous:
            previous.close()
        if new_cid:
            self._protocol.change_connection_id()


@contextlib.asynccontextmanager
async def connect(port: int, identity: Identity, patience: float, **settings: Any) -> AsyncIterator[Client]:
    """Yield a connection to a server on loopback.

    Raises: TimeoutError, ConnectionError
    """
    configuration = QuicConfiguration(is_client=True, server_name="localhost", cadata=identity.pem, **settings)
    protocol = _ClientProtocol(QuicConnection(configuration=configuration))
    await _attach(protocol)
    try:
        protocol.connect((_HOST, port))
        async with asyncio.timeout(patience):
            await protocol.wait_connected()
        yield Client(protocol)
        protocol.close()
    finally:
        if protocol._timer:
            protocol._timer.cancel()
        if protocol._transport:
            protocol._transport.close()


async def _attach(protocol: QuicConnectionProtocol) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((_HOST, 0))
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: protocol, sock=sock)
