"""What ``servers`` starts: HTTP/3 workers with and without steering, and the clients that keep them busy."""

import asyncio
import contextlib
import os
import ssl
from collections.abc import Awaitable, Callable, Iterable
from multiprocessing.connection import Connection
from socket import socket
from typing import Any, NamedTuple

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, HandshakeCompleted, QuicEvent

from quicsteer import Worker
from quicsteer.aioquic import serve
from quicsteer.demo import Identity

CONNECTIONS = 8
IN_FLIGHT = 4
BODY = bytes(1000)
PATIENCE = 10.0
"""Seconds after which a handshake or an answer is not waited for any more."""

GO, STOP = "go", "stop"

ANSWERED, RECEIVED = 0, 1
"""Counters of a client process: requests answered, and datagrams received."""

_REQUEST = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/")]
_ANSWER = [(b":status", b"200"), (b"content-type", b"text/plain"), (b"content-length", b"%d" % len(BODY))]

Serve = Callable[[], Awaitable[object]]
"""Starts a server; what it returns is kept for as long as the process lives."""


class Tally(NamedTuple):
    """What became of all requests of a run. A connection that cannot be made leaves its first requests unanswered."""

    answered: int
    not_200: int
    unanswered: int


def add_up(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of one or more tallies."""
    return Tally(*(sum(column) for column in zip(*tallies, strict=True)))


class _Server(QuicConnectionProtocol):
    """Answers every request with the same body. What it sends leaves when aioquic transmits, after the datagram."""

    _http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            self._http = H3Connection(self._quic)
        if self._http:
            for found in self._http.handle_event(event):
                if isinstance(found, HeadersReceived):
                    self._http.send_headers(found.stream_id, _ANSWER)
                    self._http.send_data(found.stream_id, BODY, end_stream=True)


def _configuration(identity: Identity) -> QuicConfiguration:
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.certificate, configuration.private_key = identity.certificate, identity.key
    return configuration


async def serve_plain(sock: socket, identity: Identity) -> object:
    """Start aioquic's own server on a socket."""
    loop, configuration = asyncio.get_running_loop(), _configuration(identity)
    server = QuicServer(configuration=configuration, create_protocol=_Server)
    return await loop.create_datagram_endpoint(lambda: server, sock=sock)


async def serve_steered(worker: Worker, identity: Identity) -> object:
    """Start quicsteer's server on the sockets of a worker."""
    return await serve(worker, configuration=_configuration(identity), create_protocol=_Server)


def work(life: int, start: Serve, ready: int) -> None:
    """Be a worker process until nobody holds the other end of ``life`` any more."""
    asyncio.run(_work(life, start, ready))


async def _work(life: int, start: Serve, ready: int) -> None:
    server = await start()
    os.write(ready, b".")
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(life, ended.set)
    await ended.wait()
    del server


class _Client(QuicConnectionProtocol):
    """Keeps a number of requests in flight."""

    def __init__(self, counters: "memoryview[int]") -> None:
        configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, verify_mode=ssl.CERT_NONE)
        super().__init__(QuicConnection(configuration=configuration))
        self._counters = counters
        self._going = False
        self._waiting: dict[int, bool] = {}
        self._quiet = asyncio.Event()
        self._http: H3Connection | None = None
        self._tally = Tally(0, 0, 0)

    async def open(self, address: tuple[str, int]) -> None:
        """Shake hands, for a while; without success the connection makes no requests."""
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        self.connect(address, transmit=False)
        self._http = H3Connection(self._quic)
        self.transmit()
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(PATIENCE):
                await self.wait_connected()

    def go(self) -> None:
        """Make requests, one more for each answer, until ``stop()``."""
        self._going = True
        for _ in range(IN_FLIGHT):
            self._request()
        self.transmit()

    async def stop(self) -> Tally:
        """Make no more requests, wait for the answers to those that are on their way, and leave."""
        self._going = False
        if self._waiting:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    await self._quiet.wait()
        self.close()
        assert self._transport
        self._transport.close()
        return self._tally._replace(unanswered=len(self._waiting))

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        self._counters[RECEIVED] += 1
        super().datagram_received(data, addr)

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, ConnectionTerminated):
            self._quiet.set()
        for found in self._http.handle_event(event) if self._http else ():
            self._receive(found)

    def _request(self) -> None:
        assert self._http
        stream = self._quic.get_next_available_stream_id()
        self._waiting[stream] = False
        self._http.send_headers(stream, _REQUEST, end_stream=True)

    def _receive(self, event: H3Event) -> None:
        if not isinstance(event, (HeadersReceived, DataReceived)) or event.stream_id not in self._waiting:
            return
        if isinstance(event, HeadersReceived):
            self._waiting[event.stream_id] = (b":status", b"200") in event.headers
        if event.stream_ended:
            self._finish(self._waiting.pop(event.stream_id))

    def _finish(self, ok: bool) -> None:
        answered, not_200, _ = self._tally
        self._tally = Tally(answered + 1, not_200 + (not ok), 0)
        self._counters[ANSWERED] += 1
        if self._going:
            self._request()
        elif not self._waiting:
            self._quiet.set()


def keep_busy(life: int, commands: "Connection[Any, Any]", counters: "memoryview[int]") -> None:
    """Be a client process: for each address that comes, connect, ``go``, ``stop``, and send the tally."""
    asyncio.run(_keep_busy(life, commands, counters))


async def _keep_busy(life: int, commands: "Connection[Any, Any]", counters: "memoryview[int]") -> None:
    asyncio.get_running_loop().add_reader(life, os._exit, 0)
    while True:
        address = await _receive(commands)
        clients = [_Client(counters) for _ in range(CONNECTIONS)]
        await asyncio.gather(*(client.open(address) for client in clients))
        commands.send(True)
        assert await _receive(commands) == GO
        for client in clients:
            client.go()
        assert await _receive(commands) == STOP
        commands.send(add_up(await asyncio.gather(*(client.stop() for client in clients))))


async def _receive(commands: "Connection[Any, Any]") -> Any:
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(commands.fileno(), came.set)
    await came.wait()
    loop.remove_reader(commands.fileno())
    return commands.recv()
