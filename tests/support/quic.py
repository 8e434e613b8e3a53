"""Real QUIC for the tests: aioquic clients that change ports, echo and HTTP/3 servers, workers as processes."""

import asyncio
import contextlib
import multiprocessing
import os
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import HandshakeCompleted, QuicEvent
from aioquic.quic.packet import QuicProtocolVersion

from quicsteer import SteeringGroup, Worker
from quicsteer.aioquic import SteeredQuicServer, serve
from quicsteer.demo import make_identity

TIMEOUT = 40.0
"""Seconds that anything may take on a busy machine; nothing waits that long unless it has failed."""

Address = tuple[Any, ...]
Serve = Callable[[Worker], Awaitable[SteeredQuicServer]]

IDENTITY = make_identity()  # before any worker process is forked


def server_configuration(**settings: Any) -> QuicConfiguration:
    """A server's configuration, with a self-signed certificate."""
    configuration = QuicConfiguration(is_client=False, **settings)
    configuration.certificate, configuration.private_key = IDENTITY.certificate, IDENTITY.key
    return configuration


def client_configuration(**settings: Any) -> QuicConfiguration:
    return QuicConfiguration(is_client=True, server_name="localhost", cadata=IDENTITY.pem, **settings)


def version_2() -> dict[str, Any]:
    """Settings of a client that speaks QUIC version 2 (RFC 9369) from its first packet."""
    return {"supported_versions": [QuicProtocolVersion.VERSION_2], "original_version": QuicProtocolVersion.VERSION_2}


class ClientProtocol(QuicConnectionProtocol):
    """Remembers what the handshake agreed on."""

    handshake: HandshakeCompleted | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            self.handshake = event
        super().quic_event_received(event)


class Client:
    """A QUIC client whose connection can move to another UDP port."""

    def __init__(self, configuration: QuicConfiguration | None = None, **arguments: Any) -> None:
        self.connection = QuicConnection(configuration=configuration or client_configuration(), **arguments)
        self.protocol = ClientProtocol(self.connection)
        self.transport: asyncio.DatagramTransport | None = None

    async def start(self, address: Address, transmit: bool = True) -> None:
        """Send the first flight, at once or together with early data."""
        self._family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        await self.change_port()
        self.protocol.connect((*address, 0, 0) if ":" in address[0] else address, transmit=transmit)

    async def connect(self, address: Address) -> None:
        await self.start(address)
        async with asyncio.timeout(TIMEOUT):
            await self.protocol.wait_connected()

    async def change_port(self) -> None:
        """Go on from a new UDP socket, as behind a NAT that rebinds: the client does not know it."""
        sock = socket.socket(self._family, socket.SOCK_DGRAM)
        sock.bind(("::1" if self._family == socket.AF_INET6 else "127.0.0.1", 0))
        previous = self.transport
        loop = asyncio.get_running_loop()
        self.transport, _ = await loop.create_datagram_endpoint(lambda: self.protocol, sock=sock)
        if previous:
            previous.close()

    async def migrate(self) -> None:
        """Go on from a new UDP socket under a new connection ID (RFC 9000, 9.5)."""
        previous = self.server_cid
        await self.change_port()
        self.protocol.change_connection_id()
        assert self.server_cid != previous

    @property
    def server_cid(self) -> bytes:
        """The DCID of the client's packets."""
        return self.connection._peer_cid.cid

    @property
    def server_cids(self) -> dict[bytes, bytes]:
        """The stateless reset token of each connection ID that the server gave this client, by connection ID."""
        known = [self.connection._peer_cid, *self.connection._peer_cid_available]
        return {each.cid: each.stateless_reset_token for each in known}

    async def exchange(self) -> int:
        """Have random bytes sent back, and return the index of the worker that did."""
        request = secrets.token_bytes(64)
        reader, writer = await self.protocol.create_stream()
        writer.write(request)
        writer.write_eof()
        async with asyncio.timeout(TIMEOUT):
            index, _, echo = (await reader.read()).partition(b":")
        assert echo == request
        return int(index)

    async def close(self, error_code: int = 0) -> None:
        """Close the connection, and wait until it is over."""
        self.protocol.close(error_code)
        async with asyncio.timeout(TIMEOUT):
            await self.protocol.wait_closed()
        self.drop()

    def drop(self) -> None:
        """Leave without a word."""
        if self.transport:
            self.transport.close()


@contextlib.asynccontextmanager
async def connected(address: Address, configuration: QuicConfiguration | None = None) -> AsyncIterator[Client]:
    """A client with a connection, which is closed at the end without waiting for the server."""
    client = Client(configuration)
    try:
        await client.connect(address)
        yield client
    finally:
        client.protocol.close()
        client.drop()


def echo_from(index: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
    """A stream handler that sends back what comes, behind the worker's index."""
    tasks = set()

    def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def echo() -> None:
            writer.write(b"%d:" % index + await reader.read())
            writer.write_eof()

        task = asyncio.ensure_future(echo())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    return handle


async def serve_echo(worker: Worker, **arguments: Any) -> SteeredQuicServer:
    """Start an echo server on a worker."""
    if "configuration" not in arguments:
        arguments["configuration"] = server_configuration(connection_id_length=worker.connection_ids.length)
    return await serve(worker, stream_handler=echo_from(worker.index), **arguments)


@contextlib.asynccontextmanager
async def serving(*workers: Worker, **arguments: Any) -> AsyncIterator[list[SteeredQuicServer]]:
    """Echo servers of workers in this event loop."""
    servers = [await serve_echo(worker, **arguments) for worker in workers]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()
            server.worker.close()


class H3Protocol(QuicConnectionProtocol):
    """Answers each HTTP/3 request when it is complete, with the index of the worker."""

    index = 0

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            self._http = H3Connection(self._quic)
        for http_event in self._http.handle_event(event) if self._http else []:
            if isinstance(http_event, (HeadersReceived, DataReceived)) and http_event.stream_ended:
                self._answer(http_event.stream_id)

    def _answer(self, stream_id: int) -> None:
        assert self._http
        self._http.send_headers(stream_id, [(b":status", b"200"), (b"content-type", b"text/plain")])
        self._http.send_data(stream_id, b"worker %d\n" % self.index, end_stream=True)


async def serve_h3(worker: Worker, protocol: type[H3Protocol] = H3Protocol, **arguments: Any) -> SteeredQuicServer:
    """Start an HTTP/3 server on a worker."""

    class Protocol(protocol):  # type: ignore[valid-type, misc]
        index = worker.index

    configuration = server_configuration(alpn_protocols=H3_ALPN)
    return await serve(worker, configuration=configuration, create_protocol=Protocol, **arguments)


class Processes:
    """Processes of workers, which live until ``stop()`` or the end of this process, whatever ends it."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("fork")
        self._life, self._alive = os.pipe()
        self._processes: list[BaseProcess] = []

    def start(self, worker: Worker, serve: Serve) -> BaseProcess:
        """Start a process that serves a worker, and wait until it does."""
        waiting, ready = os.pipe()
        process = self._context.Process(target=self._work, args=(worker, serve, ready, waiting))
        process.start()
        self._processes.append(process)
        os.close(ready)
        try:
            assert os.read(waiting, 1), "the worker process did not start"
        finally:
            os.close(waiting)
        return process

    def stop(self) -> None:
        os.close(self._alive)
        os.close(self._life)
        for process in self._processes:
            process.join(TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join()

    def _work(self, worker: Worker, serve: Serve, ready: int, waiting: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.close(waiting)
        os.close(self._alive)
        with worker:
            asyncio.run(self._serve(worker, serve, ready))

    async def _serve(self, worker: Worker, serve: Serve, ready: int) -> None:
        server = await serve(worker)
        os.write(ready, b".")
        os.close(ready)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._life, ended.set)
        await ended.wait()
        server.close()


@contextlib.contextmanager
def processes(group: SteeringGroup, serve: Serve = serve_echo) -> Iterator[Processes]:
    """A process for each worker of a group."""
    started = Processes()
    try:
        for worker in group.workers:
            started.start(worker, serve)
        yield started
    finally:
        started.stop()


class Wire:
    """A UDP socket without a QUIC stack, and a client's side of QUIC without a socket."""

    def __init__(self) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.setblocking(False)

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    def send(self, datagrams: list[bytes], address: Address) -> None:
        for datagram in datagrams:
            self.sock.sendto(datagram, address)

    async def receive(self) -> tuple[bytes, Address]:
        received = asyncio.get_running_loop().sock_recvfrom(self.sock, 65536)
        async with asyncio.timeout(TIMEOUT):
            return await received

    async def settle(self, worker: Worker, address: Address) -> list[bytes]:
        """Wait until the worker has read all that was sent to an address; return what it answered until then.

        The wait ends with a stateless reset, which answers a datagram for a connection that never was.
        """
        gone = worker.connection_ids.issue()
        self.send([short_header(gone)], address)
        answers: list[bytes] = []
        while True:
            answer, _ = await self.receive()
            if answer.endswith(worker.connection_ids.reset_token(gone)):
                return answers
            answers.append(answer)

    async def handshake(self, connection: QuicConnection, address: Address) -> None:
        """Go on with a handshake until it is complete."""
        while not any(isinstance(event, HandshakeCompleted) for event in iter(connection.next_event, None)):
            self.send(pending(connection), address)
            hear(connection, (await self.receive())[0])
        self.send(pending(connection), address)


def first_flight(address: Address, dcid: bytes | None = None, **settings: Any) -> tuple[QuicConnection, list[bytes]]:
    """A client that starts, and what it sends first; ``dcid`` is the connection ID that it makes up."""
    connection = QuicConnection(configuration=client_configuration(**settings))
    if dcid is not None:
        connection._peer_cid.cid = connection._original_destination_connection_id = dcid
    connection.connect(address, time.monotonic())
    return connection, pending(connection)


def pending(connection: QuicConnection) -> list[bytes]:
    """What a connection wants to send now."""
    return [datagram for datagram, _ in connection.datagrams_to_send(time.monotonic())]


def hear(connection: QuicConnection, datagram: bytes) -> None:
    """Give a datagram to a client, as from the address that it sends to."""
    connection.receive_datagram(datagram, connection._network_paths[0].addr, time.monotonic())


def short_header(dcid: bytes, length: int = 60) -> bytes:
    """A datagram that looks like one of an established connection (RFC 9000, 17.3.1)."""
    return (b"\x40" + dcid).ljust(length, b"\xaa")
