"""What ``lifecycle`` starts: the program of a worker that echoes QUIC datagrams, and the clients that number them.

As a program: ``python -m benchmarks._echo IDENTITY [ENVOY_WORKERS]``. Under ``quicsteer run`` it serves the worker that
it inherits. Otherwise it reads a port from standard input, joins the sockets there with one of its own (0: the first
socket, at a port that it makes up), says which port it is, and serves until SIGTERM or the end of its standard input.
With ENVOY_WORKERS above 0 the group has Envoy's filter for so many, and connection IDs as Envoy issues them.
"""

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, DatagramFrameReceived, QuicEvent
from cryptography.hazmat.primitives import serialization
from cryptography.x509 import load_pem_x509_certificate

import quicsteer.aioquic
from quicsteer import Worker
from quicsteer.demo import Identity

from . import _quic
from .rules import attach_envoy, envoy_cid, set_buffer

PER_SECOND = 20
"""Datagrams that a client sends per second."""

PATIENCE = 10.0
"""Seconds for a handshake and one echo, before the event."""

FRESH_PATIENCE = 3.0
"""The same, for connections that are opened around the event."""

_SETTINGS: dict[str, Any] = {"alpn_protocols": ["echo"], "max_datagram_frame_size": 1200}
_NUMBER, _PID = struct.Struct("!I"), struct.Struct("!I")
_TICK = 0.005
_HANDSHAKES_AT_ONCE = 20


class _Echo(QuicConnectionProtocol):
    """Sends each datagram back, with the number of this process behind it."""

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, DatagramFrameReceived):
            self._quic.send_datagram_frame(event.data + _PID.pack(os.getpid()))


def write_identity(identity: Identity, path: Path) -> None:
    """Write a certificate and its key where workers read them."""
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.touch(mode=0o600)
    path.write_bytes(identity.key.private_bytes(*form) + identity.pem)


def _read_identity(path: Path) -> Identity:
    pem = path.read_bytes()
    key = serialization.load_pem_private_key(pem, None)
    return Identity(load_pem_x509_certificate(pem), key, pem)


async def _serve_steered(worker: Worker, identity: Identity) -> None:
    configuration = QuicConfiguration(is_client=False, **_SETTINGS)
    configuration.certificate, configuration.private_key = identity.certificate, identity.key
    server = await quicsteer.aioquic.serve(worker, configuration=configuration, create_protocol=_Echo)
    await server.wait_closed()


async def _serve_alone(port: int, identity: Identity, envoy_workers: int) -> None:
    """Serve with aioquic's own server, and close all connections at the end."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    sock = _join(port, envoy_workers)
    issue = (lambda dcid: envoy_cid(dcid or b"")) if envoy_workers else None
    server = await _quic.serve(sock, identity, _Echo, issue, **_SETTINGS)
    print(sock.getsockname()[1], flush=True)
    loop.add_reader(sys.stdin.fileno(), ended.set)
    await ended.wait()
    server.close()


def _join(port: int, envoy_workers: int) -> socket.socket:
    """Open a socket that shares a port; the one that makes the port up brings Envoy's filter, if there is to be one.

    No other may: replacing a classic program on a living group crashes kernels without the fix for CVE-2026-52910.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    set_buffer(sock)
    if envoy_workers and port == 0:
        attach_envoy(sock, envoy_workers)
    sock.bind(("127.0.0.1", port))
    return sock


class Client(QuicConnectionProtocol):
    """Sends numbered datagrams, and takes down when each left and which process echoed it."""

    def __init__(self) -> None:
        configuration = QuicConfiguration(is_client=True, verify_mode=ssl.CERT_NONE, **_SETTINGS)
        super().__init__(QuicConnection(configuration=configuration))
        self.sent: list[float] = []
        self.echoes: dict[int, int] = {}
        self.ended = False
        self._began = False
        self._echoed = asyncio.Event()

    async def open(self, address: tuple[str, int], patience: float) -> bool:
        """Shake hands and have one datagram echoed; returns whether that worked in time."""
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        try:
            async with asyncio.timeout(patience):
                self._began = True
                self.connect(address)
                await self.wait_connected()
                while not self.echoes and not self.ended:
                    self.send()  # a datagram frame that is lost is not sent again
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._echoed.wait(), 0.5)
        except (TimeoutError, ConnectionError):
            return False
        return bool(self.echoes)

    @property
    def worker(self) -> int:
        """The process that answered last."""
        return next(reversed(self.echoes.values()))

    def send(self) -> None:
        """Send the next number."""
        self._quic.send_datagram_frame(_NUMBER.pack(len(self.sent)))
        self.sent.append(time.monotonic())
        if not self.ended:
            self.transmit()

    def lost(self, start: float, end: float) -> tuple[int, int]:
        """Return how many datagrams left between two moments, and how many of them were not echoed."""
        numbers = [number for number, moment in enumerate(self.sent) if start <= moment < end]
        return len(numbers), sum(number not in self.echoes for number in numbers)

    def leave(self) -> None:
        """Close the connection, and do not wait for the server."""
        if self._began:
            self.close()
        if self._transport:
            self._transport.close()

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, DatagramFrameReceived):
            self.echoes[_NUMBER.unpack_from(event.data)[0]] = _PID.unpack_from(event.data, _NUMBER.size)[0]
            self._echoed.set()
        elif isinstance(event, ConnectionTerminated):
            self.ended = True
            self._echoed.set()


async def open_all(address: tuple[str, int], count: int) -> list[Client]:
    """Open connections.

    Raises: ConnectionError when one of them cannot be opened.
    """
    gate = asyncio.Semaphore(_HANDSHAKES_AT_ONCE)
    clients = [Client() for _ in range(count)]

    async def open_one(client: Client) -> bool:
        async with gate:
            return await client.open(address, PATIENCE)

    opened = await asyncio.gather(*map(open_one, clients))
    if not all(opened):
        for client in clients:
            client.leave()
        raise ConnectionError(f"{opened.count(False)} of {count} connections cannot be opened")
    return clients


async def pace(clients: Sequence[Client]) -> None:
    """Have the clients send in turns, at the rate of all together, until this is cancelled."""
    start, sent = time.monotonic(), 0
    while True:
        due = int((time.monotonic() - start) * PER_SECOND * len(clients))
        for number in range(sent, due):
            clients[number % len(clients)].send()
        sent = due
        await asyncio.sleep(_TICK)


async def open_fresh(address: tuple[str, int], count: int, interval: float) -> int:
    """Open connections one after the other, have one datagram of each echoed; return how many failed."""

    async def open_one(number: int) -> bool:
        await asyncio.sleep(number * interval)
        client = Client()
        try:
            return await client.open(address, FRESH_PATIENCE)
        finally:
            client.leave()

    return (await asyncio.gather(*(open_one(number) for number in range(count)))).count(False)


def _main() -> None:
    identity = _read_identity(Path(sys.argv[1]))
    worker = Worker.inherited()
    if worker:
        with worker:
            asyncio.run(_serve_steered(worker, identity))
    elif line := sys.stdin.readline():
        asyncio.run(_serve_alone(int(line), identity, int(sys.argv[2])))


if __name__ == "__main__":
    _main()
