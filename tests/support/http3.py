"""HTTP/3 clients for the tests, whose connections can change ports."""

import asyncio
import json
from typing import Any

from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent, StreamDataReceived
from quic import TIMEOUT, Client, ClientProtocol, client_configuration

_FIRST_SERVER_STREAM = 3  # unidirectional (RFC 9000, 2.1)


class H3ClientProtocol(ClientProtocol):
    """Collects the answers to requests."""

    http: H3Connection
    answers: dict[int, "asyncio.Future[bytes]"]
    bodies: dict[int, bytes]
    events: list[H3Event]
    control = b""
    """What the server sent on its control stream (RFC 9114, 6.2.1)."""

    def quic_event_received(self, event: QuicEvent) -> None:
        if not isinstance(event, StreamDataReceived):
            super().quic_event_received(event)
        elif event.stream_id == _FIRST_SERVER_STREAM:
            self.control += event.data
        for http_event in self.http.handle_event(event):
            self.events.append(http_event)
            if isinstance(http_event, DataReceived):
                self.bodies[http_event.stream_id] = self.bodies.get(http_event.stream_id, b"") + http_event.data
            if isinstance(http_event, (HeadersReceived, DataReceived)) and http_event.stream_ended:
                answer = self.answers.get(http_event.stream_id)
                if answer and not answer.done():
                    answer.set_result(self.bodies.pop(http_event.stream_id, b""))


def http3_configuration(**settings: Any) -> QuicConfiguration:
    return client_configuration(alpn_protocols=H3_ALPN, **settings)


class H3Client(Client):
    """A client that sends HTTP/3 requests."""

    def __init__(
        self, configuration: QuicConfiguration | None = None, enable_webtransport: bool = False, **arguments: Any
    ) -> None:
        super().__init__(configuration or http3_configuration(), **arguments)
        self.protocol = self.h3 = H3ClientProtocol(self.connection)
        self.h3.answers, self.h3.bodies, self.h3.events = {}, {}, []
        self._enable_webtransport = enable_webtransport

    async def start(self, address: tuple[Any, ...], transmit: bool = True) -> None:
        await super().start(address, transmit=False)
        self.h3.http = H3Connection(self.connection, enable_webtransport=self._enable_webtransport)
        if transmit:
            self.protocol.transmit()

    def send_request(self, path: str, body: bytes | None = None) -> int:
        """Send a request, and return its stream."""
        stream = self.connection.get_next_available_stream_id()
        headers = [(b":scheme", b"https"), (b":authority", b"localhost"), (b":path", path.encode())]
        method = b"GET" if body is None else b"POST"
        self.h3.answers[stream] = asyncio.get_running_loop().create_future()
        self.h3.http.send_headers(stream, [(b":method", method), *headers], end_stream=body is None)
        if body is not None:
            self.h3.http.send_data(stream, body, end_stream=True)
        self.protocol.transmit()
        return stream

    async def fetch(self, path: str, body: bytes | None = None, timeout: float = TIMEOUT) -> bytes:
        """Send a request and return the body of its answer."""
        async with asyncio.timeout(timeout):
            return await self.h3.answers[self.send_request(path, body)]

    async def get(self, path: str = "/", body: bytes | None = None, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Ask the application what it knows."""
        answer: dict[str, Any] = json.loads(await self.fetch(path, body, timeout))
        return answer
