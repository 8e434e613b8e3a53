"""aioquic's connection under connection IDs of ours, and all that this package uses of aioquic.

aioquic has no hook for connection IDs. The few undocumented names that this takes stand in ``PRIVATE_NAMES``; they are
looked for when the module is imported, and nothing is replaced in aioquic itself.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from ._readers import Endpoint
from .cid import ConnectionIds
from .quicstats import ConnectionEnd, StreamReset

try:
    import aioquic
    import aioquic.asyncio.server as aioquic_server
    from aioquic.asyncio.protocol import QuicConnectionProtocol, QuicStreamHandler
    from aioquic.asyncio.server import QuicServer
    from aioquic.buffer import Buffer  # type: ignore[attr-defined]  # it exports by import
    from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
    from aioquic.quic.connection import QuicConnection, QuicConnectionId
    from aioquic.quic.events import (
        ConnectionIdRetired,
        ConnectionTerminated,
        HandshakeCompleted,
        QuicEvent,
        StopSendingReceived,
    )
    from aioquic.quic.events import StreamReset as StreamResetReceived
    from aioquic.quic.packet import (
        QuicErrorCode,
        QuicHeader,
        QuicPacketType,
        encode_quic_retry,
        encode_quic_version_negotiation,
        pull_quic_header,
    )
    from aioquic.tls import SessionTicketFetcher, SessionTicketHandler
except ImportError as error:
    raise ImportError(
        f"quicsteer.aioquic needs aioquic 1.2 or later ({error}): pip install quicsteer[aioquic]", name=error.name
    ) from error

__all__ = [
    "PRIVATE_NAMES",
    "SMALLEST_MAX_DATAGRAM_SIZE",
    "Buffer",
    "ConnectionEnd",
    "Entry",
    "QuicConfiguration",
    "QuicConnectionProtocol",
    "QuicHeader",
    "QuicPacketType",
    "QuicServer",
    "QuicStreamHandler",
    "Registry",
    "SessionTicketFetcher",
    "SessionTicketHandler",
    "SteeredConnection",
    "encode_invalid_token_close",
    "encode_quic_retry",
    "encode_quic_version_negotiation",
    "missing_names",
    "pull_quic_header",
]

PRIVATE_NAMES = (
    ("host_cid", "the connection ID that the server's packets show"),
    ("_host_cids", "all connection IDs of the server; the first one and its reset token are replaced"),
    ("_local_initial_source_connection_id", "the first connection ID, as the transport parameters say it"),
    ("_replenish_connection_ids", "makes all later connection IDs"),
    ("_close_event", "tells which side ended a connection"),
)
"""Names of ``QuicConnection`` that aioquic does not document, and what each is used for."""

encode_invalid_token_close = getattr(aioquic_server, "_encode_invalid_token_close", None)
"""Makes the answer to a bad Retry token (RFC 9000, 8.1.3). aioquic 1.2 has none: it gives no answer, as is allowed."""


def missing_names(connection: type = QuicConnection) -> list[str]:
    """Return the ``PRIVATE_NAMES`` that a connection class lacks: as attributes of the class or of its instances."""
    assigned = connection.__init__.__code__.co_names  # type: ignore[misc]
    return [name for name, _ in PRIVATE_NAMES if not hasattr(connection, name) and name not in assigned]


if _missing := missing_names():
    raise ImportError(
        f"quicsteer.aioquic does not fit aioquic {aioquic.__version__}, whose QuicConnection has no "
        f"{', '.join(_missing)}: pip install quicsteer[aioquic] takes a release that fits",
        name="aioquic",
    )


class Registry(Protocol):
    """What a connection tells its server."""

    @property
    def connection_ids(self) -> ConnectionIds:
        """Issues the connection IDs."""

    def learn(self, entry: "Entry", cid: bytes) -> None:
        """Lead datagrams with a DCID to a connection."""

    def retire(self, entry: "Entry", cid: bytes) -> None:
        """Take note that the client retired a connection ID."""

    def end_handshake(self, entry: "Entry") -> None:
        """Take note that a handshake is no longer open."""

    def forget(self, entry: "Entry", end: ConnectionEnd | None = None) -> None:
        """Forget a connection that is over."""

    def count_reset(self, reset: StreamReset) -> None:
        """Take note that a stream was reset."""

    def defers(self, entry: "Entry") -> bool:
        """Tell whether a connection shall send later, and see to it that it does."""


@dataclass(eq=False)
class Entry:
    """What a server knows of a connection; ``cids`` are all DCIDs that lead to it."""

    server: Registry
    endpoint: Endpoint
    protocol: QuicConnectionProtocol | None = None
    connection: "SteeredConnection | None" = None
    cids: set[bytes] = field(default_factory=set)
    retired: deque[bytes] = field(default_factory=deque)
    handshaking: bool = False
    transmit_soon: bool = False
    ended: bool = False


class SteeredConnection(QuicConnection):
    """A connection whose connection IDs name the worker, and which tells its server what becomes of them."""

    def __init__(self, entry: Entry, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.entry = entry
        entry.connection = self
        self._ended_here: ConnectionTerminated | None = None
        self._ended_silently: ConnectionTerminated | None = None
        self._name_worker(self._host_cids[0])
        self.host_cid = self._local_initial_source_connection_id = self._host_cids[0].cid

    def _replenish_connection_ids(self) -> None:
        first_new = len(self._host_cids)
        super()._replenish_connection_ids()
        for connection_id in self._host_cids[first_new:]:
            self._name_worker(connection_id)

    def _name_worker(self, connection_id: QuicConnectionId) -> None:
        """Make a connection ID ours. The server knows it before the client does, who may use it at once."""
        ids = self.entry.server.connection_ids
        connection_id.cid = ids.issue()
        connection_id.stateless_reset_token = ids.reset_token(connection_id.cid)
        self.entry.server.learn(self.entry, connection_id.cid)

    def datagrams_to_send(self, now: float) -> list[tuple[bytes, Any]]:
        """Answer once after a batch of datagrams, not after each: building packets is what costs most."""
        return [] if self.entry.server.defers(self.entry) else super().datagrams_to_send(now)

    def next_event(self) -> QuicEvent | None:
        """Return the next event; the server hears of it first."""
        event = super().next_event()
        if isinstance(event, ConnectionIdRetired):
            self.entry.server.retire(self.entry, event.connection_id)
        elif isinstance(event, HandshakeCompleted):
            self.entry.server.end_handshake(self.entry)
        elif isinstance(event, ConnectionTerminated):
            self.entry.server.forget(self.entry, self._describe_end(event))
        elif isinstance(event, StreamResetReceived):
            self.entry.server.count_reset(StreamReset("client", "RESET_STREAM", event.error_code))
        elif isinstance(event, StopSendingReceived):
            self.entry.server.count_reset(StreamReset("client", "STOP_SENDING", event.error_code))
        return event

    def reset_stream(self, stream_id: int, error_code: int) -> None:
        """Give up what is sent on a stream, and count it."""
        super().reset_stream(stream_id, error_code)
        self.entry.server.count_reset(StreamReset("server", "RESET_STREAM", error_code))

    def stop_stream(self, stream_id: int, error_code: int) -> None:
        """Ask the client to give up what it sends on a stream, and count it."""
        super().stop_stream(stream_id, error_code)
        self.entry.server.count_reset(StreamReset("server", "STOP_SENDING", error_code))

    def close(
        self, error_code: int = QuicErrorCode.NO_ERROR, frame_type: int | None = None, reason_phrase: str = ""
    ) -> None:
        """Close the connection, and remember whether it was open until now."""
        ended = self._close_event
        super().close(error_code, frame_type, reason_phrase)
        if ended is None:
            self._ended_here = self._close_event

    def handle_timer(self, now: float) -> None:
        """Handle the timer, and remember whether it ended the connection."""
        ended = self._close_event
        super().handle_timer(now)
        if ended is None:
            self._ended_silently = self._close_event

    @property
    def end(self) -> ConnectionEnd | None:
        """How the connection ended, or will when it is closed; ``None`` while it is open."""
        return self._describe_end(self._close_event) if self._close_event else None

    def _describe_end(self, event: ConnectionTerminated) -> ConnectionEnd:
        sender = "server" if event is self._ended_here else "nobody" if event is self._ended_silently else "client"
        return ConnectionEnd(sender, event.frame_type is None, int(event.error_code))
