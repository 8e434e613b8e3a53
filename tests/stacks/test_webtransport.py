"""WebTransport and datagrams over HTTP/3 (RFC 9297) on steered workers, whose clients change ports."""

import asyncio
from typing import Any

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DatagramReceived, H3Event, HeadersReceived, WebTransportStreamDataReceived
from aioquic.quic.events import HandshakeCompleted, QuicEvent
from http3 import H3Client, http3_configuration
from quic import TIMEOUT, Address, processes, server_configuration

from quicsteer import SteeringGroup, SteeringMode, Worker
from quicsteer.aioquic import SteeredQuicServer, serve

CLIENTS = 12
FRAME_MAX = 65536


class WebTransport(QuicConnectionProtocol):
    """Accepts sessions, and sends back datagrams, and streams on others, behind the worker's index."""

    index = 0
    http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            self.http = H3Connection(self._quic, enable_webtransport=True)
        for http_event in self.http.handle_event(event) if self.http else ():
            self._answer(http_event)
        self.transmit()

    def _answer(self, event: H3Event) -> None:
        assert self.http
        if isinstance(event, HeadersReceived):
            self.http.send_headers(
                event.stream_id, [(b":status", b"200"), (b"sec-webtransport-http3-draft", b"draft02")]
            )
        elif isinstance(event, DatagramReceived):
            self.http.send_datagram(event.stream_id, b"%d:" % self.index + event.data)
        elif isinstance(event, WebTransportStreamDataReceived) and event.stream_ended:
            stream = self.http.create_webtransport_stream(event.session_id, is_unidirectional=True)
            self._quic.send_stream_data(stream, b"%d:" % self.index + event.data, end_stream=True)


async def serve_webtransport(worker: Worker) -> SteeredQuicServer:
    class Protocol(WebTransport):
        index = worker.index

    configuration = server_configuration(alpn_protocols=H3_ALPN, max_datagram_frame_size=FRAME_MAX)
    return await serve(worker, configuration=configuration, create_protocol=Protocol)


class Session(H3Client):
    """A client with one WebTransport session."""

    def __init__(self) -> None:
        super().__init__(http3_configuration(max_datagram_frame_size=FRAME_MAX), enable_webtransport=True)

    async def open(self, address: Address) -> None:
        await self.connect(address)
        self.session = self.connection.get_next_available_stream_id()
        headers = [(b":method", b"CONNECT"), (b":scheme", b"https"), (b":authority", b"localhost"), (b":path", b"/")]
        self.h3.http.send_headers(self.session, [*headers, (b":protocol", b"webtransport")])
        self.protocol.transmit()
        answer = await self.wait_for(HeadersReceived)
        assert dict(answer.headers)[b":status"] == b"200"

    async def wait_for(self, kind: type[Any]) -> Any:
        """Wait for an event of a kind, and take it."""
        async with asyncio.timeout(TIMEOUT):
            while not (found := [event for event in self.h3.events if isinstance(event, kind)]):
                await self.protocol.ping()
        self.h3.events.remove(found[0])
        return found[0]

    async def exchange_datagram(self, data: bytes) -> int:
        self.h3.http.send_datagram(self.session, data)
        self.protocol.transmit()
        index, _, echoed = (await self.wait_for(DatagramReceived)).data.partition(b":")
        assert echoed == data
        return int(index)

    async def exchange_stream(self, data: bytes) -> int:
        stream = self.h3.http.create_webtransport_stream(self.session)
        self.connection.send_stream_data(stream, data, end_stream=True)
        self.protocol.transmit()
        index, _, echoed = (await self.wait_for(WebTransportStreamDataReceived)).data.partition(b":")
        assert echoed == data
        return int(index)


def test_sessions_stay_with_their_worker(steering_mode: SteeringMode) -> None:
    async def follow(address: Address) -> set[int]:
        session = Session()
        await session.open(address)
        answered_by = set()
        for number in range(3):
            answered_by.add(await session.exchange_datagram(b"datagram %d" % number))
            answered_by.add(await session.exchange_stream(b"stream %d" % number))
            await (session.migrate() if number % 2 else session.change_port())
        session.drop()
        return answered_by

    async def main(address: Address) -> list[set[int]]:
        return await asyncio.gather(*(follow(address) for _ in range(CLIENTS)))

    with (
        SteeringGroup.open("127.0.0.1:0", 4, mode=steering_mode, split=True) as group,
        processes(group, serve_webtransport),
    ):
        workers = asyncio.run(main(group.addresses[0]))
        assert [len(each) for each in workers] == [1] * CLIENTS
        assert len(set.union(*workers)) > 1
