"""Established aioquic connections: workers that answer, and clients that measure how well they are served.

A worker answers a stream, when it is complete, with how many bytes it brought, and sends DATAGRAM frames (RFC 9221)
back.
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, DatagramFrameReceived, QuicEvent, StreamDataReceived

from quicsteer import SteeringGroup, Worker
from quicsteer.aioquic import serve
from quicsteer.demo import Identity

from ._flood import child, hear

CONNECTIONS = 20
UPLOAD = 32768
"""Bytes of an upload; each connection has one after the other."""

REQUESTS = 200
"""Small requests per second, all connections together, however long the answers take."""

DATAGRAMS = 400
"""DATAGRAM frames per second, all connections together."""

GRACE = 1.0
"""Seconds that answers are waited for."""

_REQUEST, _DATAGRAM = 32, 100
_NUMBER = struct.Struct("!Q")
_FRAME_MAX = 65536
_CONNECT_TIMEOUT = 15.0
_CONNECTING_AT_ONCE = 5


class Service(NamedTuple):
    """What clients saw. Delays are in milliseconds; requests that were not answered have waited that long.

    ``goodput`` is in bytes per second of uploads that were confirmed.
    """

    goodput: float
    delays: list[float]
    sent: int
    answered: int
    lost_connections: int


class Answering(QuicConnectionProtocol):
    """A worker's side of a connection."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._received: dict[int, int] = {}

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            count = self._received.pop(event.stream_id, 0) + len(event.data)
            if event.end_stream:
                self._quic.send_stream_data(event.stream_id, _NUMBER.pack(count), end_stream=True)
            else:
                self._received[event.stream_id] = count
        elif isinstance(event, DatagramFrameReceived):
            self._quic.send_datagram_frame(event.data)


@contextlib.contextmanager
def serving(group: SteeringGroup, identity: Identity, cpus: Collection[int], retry: bool | int) -> Iterator[None]:
    """Run a process for each worker of a group.

    Raises: RuntimeError when one ended before the block.
    """
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(child(cpus, _work, worker, identity, retry)) for worker in group.workers]
        for pipe in pipes:
            hear(pipe)
        yield
        if any(pipe.poll() for pipe in pipes):
            raise RuntimeError("a worker process ended")


def _work(pipe: "Connection[Any, Any]", worker: Worker, identity: Identity, retry: bool | int) -> None:
    async def work() -> None:
        configuration = QuicConfiguration(
            is_client=False,
            connection_id_length=worker.connection_ids.length,
            max_datagram_frame_size=_FRAME_MAX,
            certificate=identity.certificate,
            private_key=identity.key,
        )
        server = await serve(worker, configuration=configuration, create_protocol=Answering, retry=retry)
        pipe.send("ready")
        await server.wait_closed()  # which nobody asks for: the process is killed

    asyncio.run(work())


@dataclass
class Tally:
    """What all connections of a process saw so far. ``pending`` has what waits for an answer, and since when."""

    delays: list[float] = field(default_factory=list)
    pending: dict[object, float] = field(default_factory=dict)
    uploading: bool = False
    uploaded: int = 0
    sent: int = 0
    answered: int = 0
    lost_connections: int = 0

    def send(self, key: object) -> None:
        self.sent += 1
        self.pending[key] = time.perf_counter()

    def answer(self, key: object) -> None:
        start = self.pending.pop(key, None)
        if start is not None:
            self.answered += 1
            self.delays.append((time.perf_counter() - start) * 1e3)


class Client(QuicConnectionProtocol):
    """A client's side of a connection."""

    def __init__(self, quic: QuicConnection, tally: Tally) -> None:
        super().__init__(quic)
        self._tally = tally
        self._uploads: set[int] = set()

    def upload(self) -> None:
        """Start an upload, and one more whenever one is confirmed while ``Tally.uploading``."""
        stream = self._quic.get_next_available_stream_id()
        self._uploads.add(stream)
        self._quic.send_stream_data(stream, bytes(UPLOAD), end_stream=True)
        self.transmit()

    @property
    def uploads(self) -> int:
        """Uploads that were not confirmed yet."""
        return len(self._uploads)

    def request(self) -> None:
        """Send a small request."""
        stream = self._quic.get_next_available_stream_id()
        self._tally.send((self, stream))
        self._quic.send_stream_data(stream, bytes(_REQUEST), end_stream=True)
        self.transmit()

    def send_datagram(self) -> None:
        """Send a numbered DATAGRAM frame."""
        number = self._tally.sent
        self._tally.send(number)
        self._quic.send_datagram_frame(_NUMBER.pack(number).ljust(_DATAGRAM, b"\0"))
        self.transmit()

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived) and event.end_stream:
            self._take_answer(event.stream_id, _NUMBER.unpack(event.data)[0])
        elif isinstance(event, DatagramFrameReceived):
            self._tally.answer(_NUMBER.unpack_from(event.data)[0])
        elif isinstance(event, ConnectionTerminated):
            self._tally.lost_connections += 1

    def _take_answer(self, stream: int, count: int) -> None:
        if stream not in self._uploads:
            self._tally.answer((self, stream))
            return
        self._uploads.remove(stream)
        if self._tally.uploading:
            self._tally.uploaded += count
            self.upload()


class Clients:
    """All connections of a process."""

    def __init__(self) -> None:
        self.tally = Tally()
        self._clients: list[Client] = []

    async def connect(self, address: tuple[str, int], pem: bytes) -> None:
        """Complete all handshakes."""
        gate = asyncio.Semaphore(_CONNECTING_AT_ONCE)

        async def connect_one() -> None:
            async with gate:
                self._clients.append(await _connect(address, pem, self.tally))

        await asyncio.gather(*(connect_one() for _ in range(CONNECTIONS)))

    async def use_streams(self, seconds: float) -> Service:
        """Upload as fast as can be, then send small requests at a steady pace; each for some seconds."""
        self.tally.uploading = True
        start = time.perf_counter()
        for client in self._clients:
            client.upload()
        await asyncio.sleep(seconds)
        self.tally.uploading = False
        goodput = self.tally.uploaded / (time.perf_counter() - start)
        await _wait_until(lambda: not any(client.uploads for client in self._clients))
        await self._pace(Client.request, REQUESTS, seconds)
        return self._sum_up(goodput, True)

    async def use_datagrams(self, seconds: float) -> Service:
        """Send DATAGRAM frames at a steady pace for some seconds."""
        await self._pace(Client.send_datagram, DATAGRAMS, seconds)
        return self._sum_up(0.0, False)

    async def _pace(self, send: Callable[[Client], None], rate: int, seconds: float) -> None:
        """Send from one connection after the other, then wait until all is answered or the grace is over."""
        start = time.perf_counter()
        for turn in range(round(rate * seconds)):
            await asyncio.sleep(start + turn / rate - time.perf_counter())
            send(self._clients[turn % CONNECTIONS])
        await _wait_until(lambda: not self.tally.pending)

    def _sum_up(self, goodput: float, with_unanswered: bool) -> Service:
        tally, now = self.tally, time.perf_counter()
        waiting = [(now - since) * 1e3 for since in tally.pending.values()] if with_unanswered else []
        return Service(goodput, [*tally.delays, *waiting], tally.sent, tally.answered, tally.lost_connections)


Use = Callable[[Clients, float], Awaitable[Service]]


async def _connect(address: tuple[str, int], pem: bytes, tally: Tally) -> Client:
    configuration = QuicConfiguration(
        is_client=True, server_name="localhost", cadata=pem, max_datagram_frame_size=_FRAME_MAX
    )
    client = Client(QuicConnection(configuration=configuration), tally)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: client, sock=sock)
    client.connect(address)
    await asyncio.wait_for(client.wait_connected(), _CONNECT_TIMEOUT)
    return client


async def _wait_until(done: Callable[[], bool]) -> None:
    """Wait until something is so, or the grace is over."""
    deadline = time.perf_counter() + GRACE
    while not done() and time.perf_counter() < deadline:
        await asyncio.sleep(0.01)


def be_clients(pipe: "Connection[Any, Any]", address: tuple[str, int], pem: bytes, use: Use, seconds: float) -> None:
    """Connect, say so, wait for the word, and say what the connections saw."""

    async def be() -> None:
        clients = Clients()
        await clients.connect(address, pem)
        pipe.send("connected")
        await asyncio.to_thread(pipe.recv)
        pipe.send(await use(clients, seconds))

    asyncio.run(be())
