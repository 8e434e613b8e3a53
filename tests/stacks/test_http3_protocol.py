"""An HTTP/3 connection of ``quicsteer.hypercorn`` between its datagrams and its application, by turns of the loop."""

import asyncio
from typing import Any

import pylsqpack
from aioquic.buffer import encode_uint_var
from aioquic.h3.connection import H3_ALPN, FrameType, encode_frame
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ProtocolNegotiated, StreamDataReceived
from hypercorn.asyncio.worker_context import WorkerContext
from hypercorn.config import Config
from quic import server_configuration

from quicsteer._hypercorn import PIECE_MAX, Http3Connections, Http3Protocol
from quicsteer._readers import ESTABLISHED_BATCH

PAYLOAD = 1100
HEADERS = [(b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"h"), (b":path", b"/")]


def request(size: int) -> bytes:
    """Return the head of a request, up to where its body of ``size`` bytes begins."""
    _, block = pylsqpack.Encoder().encode(0, HEADERS)
    return encode_frame(FrameType.HEADERS, block) + encode_uint_var(FrameType.DATA) + encode_uint_var(size)


def test_an_application_that_reads_keeps_up_with_whole_batches_of_datagrams() -> None:
    """What it has not read stays far below where datagrams are refused, however little time this process gets."""
    turns = 400
    size = turns * ESTABLISHED_BATCH * PAYLOAD
    read: list[int] = []

    async def app(scope: Any, receive: Any, send: Any, sync_spawn: Any, call_soon: Any) -> None:
        more = True
        while more:
            message = await receive()
            read.append(len(message["body"]))
            more = message["more_body"]
        await asyncio.Event().wait()

    async def main() -> int:
        shared = Http3Connections(app, Config(), WorkerContext(None), {})
        quic = QuicConnection(
            configuration=server_configuration(alpn_protocols=H3_ALPN),
            original_destination_connection_id=bytes(8),
        )
        protocol = Http3Protocol(quic, shared=shared)
        protocol.quic_event_received(ProtocolNegotiated(alpn_protocol="h3"))
        head = StreamDataReceived(data=request(size), end_stream=False, stream_id=0)
        protocol.quic_event_received(head)
        unread = 0
        for turn in range(turns):
            for number in range(ESTABLISHED_BATCH):
                last = turn == turns - 1 and number == ESTABLISHED_BATCH - 1
                protocol.quic_event_received(StreamDataReceived(data=bytes(PAYLOAD), end_stream=last, stream_id=0))
            unread = max(unread, protocol._unread)
            await asyncio.sleep(0)
        while sum(read) < size:
            await asyncio.sleep(0)
        await shared.close()
        return unread

    unread = asyncio.run(main())
    assert unread <= 2 * PIECE_MAX
    assert sum(read) == size
    assert max(read) <= PIECE_MAX + PAYLOAD
