"""hypercorn's HTTP/3 on a steered aioquic server, and all that this package uses of hypercorn.

hypercorn reads UDP through a queue of ten datagrams that all connections of a worker share, and throws away what does
not fit. Here each connection is a protocol of ``SteeredQuicServer``, and the application is served from a queue per
connection, which is bounded by what the application has not read. Applications hear of requests that their client gave
up, and of connections that ended. Nothing is replaced in hypercorn.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from ._aioquic import QuicConnectionProtocol

try:
    import hypercorn.__main__
    import hypercorn.protocol.h3
    from aioquic.buffer import encode_uint_var
    from aioquic.h3.connection import ErrorCode, FrameType, H3Connection, encode_frame
    from aioquic.h3.events import DataReceived, HeadersReceived
    from aioquic.quic.connection import QuicConnection
    from aioquic.quic.events import (
        ConnectionTerminated,
        ProtocolNegotiated,
        QuicEvent,
        StopSendingReceived,
        StreamDataReceived,
        StreamReset,
    )
    from hypercorn.asyncio.run import worker_serve
    from hypercorn.asyncio.task_group import TaskGroup
    from hypercorn.asyncio.worker_context import WorkerContext
    from hypercorn.config import Config, Sockets
    from hypercorn.protocol.events import Body, EndBody, Event, StreamClosed
    from hypercorn.typing import AppWrapper, ConnectionState
    from hypercorn.utils import check_for_updates, files_to_watch, load_application, write_pid_file
except ImportError as error:
    raise ImportError(
        f"quicsteer.hypercorn needs hypercorn 0.17 or later ({error}): pip install quicsteer[hypercorn]",
        name=error.name,
    ) from error

__all__ = [
    "AppWrapper",
    "Config",
    "Http3Connections",
    "Http3Protocol",
    "Sockets",
    "WorkerContext",
    "check_for_updates",
    "files_to_watch",
    "load_application",
    "missing_names",
    "parse_arguments",
    "worker_serve",
    "write_pid_file",
]

UNREAD_MAX = 4 * 1024 * 1024
"""Bytes of a connection that its application has not read, beyond which its datagrams are not taken any more."""

PRIVATE_NAMES = (
    (hypercorn.protocol.h3.H3Protocol, "_create_stream", "starts a request"),
    (hypercorn.protocol.h3.H3Protocol, "stream_send", "sends what an application says"),
    (H3Connection, "_local_control_stream_id", "where GOAWAY is sent"),
    (QuicConnection, "_network_paths", "the address that a client has now"),
)
"""Names that hypercorn and aioquic do not document, and what each is used for."""

PIECE_MAX = 64 * 1024
"""Bytes of a stream that are enough for one event: an application gets what has come in a few large pieces."""

_GOAWAY_ID = 2**62 - 4  # no request is refused: the client shall only start no other (RFC 9114, 5.2)

_logger = logging.getLogger("quicsteer")


def missing_names(table: tuple[tuple[type, str, str], ...] = PRIVATE_NAMES) -> list[str]:
    """Return those of the ``PRIVATE_NAMES`` that are not there: as attributes of the class or of its instances."""
    return [
        f"{owner.__name__}.{name}"
        for owner, name, _ in table
        if not hasattr(owner, name) and name not in owner.__init__.__code__.co_names  # type: ignore[misc]
    ]


if _missing := missing_names():
    raise ImportError(
        f"quicsteer.hypercorn does not fit this hypercorn, which has no {', '.join(_missing)}: "
        "pip install quicsteer[hypercorn] takes a release that fits",
        name="hypercorn",
    )


def parse_arguments(arguments: Sequence[str]) -> Config:
    """Return the configuration that hypercorn's command line makes of arguments, without running anything.

    Its ``main`` parses, loads the configuration file, and calls ``run``, a name of its module that is another one for
    the time of this call.
    """
    made: list[Config] = []

    def keep(config: Config) -> int:
        made.append(config)
        return 0

    module: Any = hypercorn.__main__
    run, module.run = module.run, keep
    try:
        module.main(list(arguments))
    finally:
        module.run = run
    return made[0]


class _Tasks(TaskGroup):
    """The tasks of applications: what one of them raises ends no other, unlike in hypercorn's own group."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.running: set[asyncio.Task[Any]] = set()

    def spawn(self, func: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> None:
        task = asyncio.get_running_loop().create_task(func(*args))
        self.running.add(task)
        task.add_done_callback(self.running.discard)


class Http3Connections:
    """What the HTTP/3 connections of a worker share, and what became of them.

    ``state`` is what the application's lifespan left.
    """

    def __init__(self, app: AppWrapper, config: Config, context: WorkerContext, state: dict[str, Any]) -> None:
        self.app = app
        self.config = config
        self.context = context
        self.state = state
        self.tasks = _Tasks(asyncio.get_running_loop())
        self.open: set[Http3Protocol] = set()
        self.refused = 0
        """Datagrams that were not taken because their application did not read."""

    def go_away(self) -> None:
        """Ask all clients to send their next requests on other connections."""
        for protocol in self.open:
            protocol.go_away()

    async def close(self) -> None:
        """End what applications still do; their connections are closed."""
        while self.tasks.running:
            for task in self.tasks.running:
                task.cancel()
            await asyncio.wait(set(self.tasks.running))


class Http3Protocol(QuicConnectionProtocol):
    """One connection: QUIC events come in, and go to hypercorn's streams one after the other."""

    def __init__(self, quic: QuicConnection, stream_handler: Any = None, *, shared: Http3Connections) -> None:
        super().__init__(quic, stream_handler)
        self._shared = shared
        self._http: _Http3 | None = None
        self._events: asyncio.Queue[QuicEvent] = asyncio.Queue()
        self._unread = 0
        self._refused = 0
        self._flushing = False
        self._going_away = False

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        """Take a datagram, unless the application leaves too much unread: its sender then slows down."""
        if self._unread > UNREAD_MAX:
            self._refuse()
            return
        super().datagram_received(data, addr)

    def _refuse(self) -> None:
        if not self._refused:
            client = client_address(self._quic)
            _logger.warning("%s: the application does not read; datagrams are not taken until it does", client)
        self._refused += 1
        self._shared.refused += 1

    def close(self, error_code: int = ErrorCode.H3_NO_ERROR, reason_phrase: str = "") -> None:
        """Close the connection (RFC 9114, 5.3)."""
        super().close(error_code, reason_phrase)

    def quic_event_received(self, event: QuicEvent) -> None:
        """Hand an event over to the task of the connection."""
        if isinstance(event, ProtocolNegotiated):
            self._start()
        elif isinstance(event, ConnectionTerminated):
            self._shared.open.discard(self)
        elif isinstance(event, StreamDataReceived):
            self._unread += len(event.data)
        if self._http:
            self._events.put_nowait(event)

    def go_away(self) -> None:
        """Ask the client to send its next requests on another connection (RFC 9114, 5.2)."""
        if self._http and not self._going_away:
            self._going_away = True
            self._http.go_away()
            self.transmit()

    def _start(self) -> None:
        server = self._transport.get_extra_info("sockname")[:2] if self._transport else None
        self._http = _Http3(self._shared, server, self._quic, self._flush)
        self._shared.open.add(self)
        self._shared.tasks.spawn(self._run, self._http)

    async def _flush(self) -> None:
        """Send at the end of this turn of the loop: head and body of a small answer fit one datagram."""
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush_now)

    def _flush_now(self) -> None:
        self._flushing = False
        self.transmit()

    async def _run(self, http: "_Http3") -> None:
        """Give the events to the streams until the connection is over."""
        event: QuicEvent | None = None
        following: QuicEvent | None = None
        while not isinstance(event, ConnectionTerminated):
            event, following = self._take(following or await self._events.get())
            try:
                await http.handle(event)
            except Exception as error:  # noqa: BLE001  # one connection must not cost the others
                context = {"message": "an HTTP/3 connection failed", "exception": error, "protocol": self}
                self._loop.call_exception_handler(context)
                self.close(ErrorCode.H3_INTERNAL_ERROR)
            if isinstance(event, StreamDataReceived):
                self._unread -= len(event.data)

    def _take(self, event: QuicEvent) -> tuple[QuicEvent, QuicEvent | None]:
        """Return the event, with what has come on its stream since in one piece, and the event after that.

        hypercorn hands ten pieces over per two turns of the loop, which can read 32 datagrams meanwhile.
        """
        if not isinstance(event, StreamDataReceived):
            return event, None
        pieces, size, ended = [event.data], len(event.data), event.end_stream
        following: QuicEvent | None = None
        while size < PIECE_MAX and not ended and not self._events.empty():
            following = self._events.get_nowait()
            if not isinstance(following, StreamDataReceived) or following.stream_id != event.stream_id:
                break
            pieces.append(following.data)
            size, ended, following = size + len(following.data), following.end_stream, None
        return StreamDataReceived(data=b"".join(pieces), end_stream=ended, stream_id=event.stream_id), following


def client_address(quic: QuicConnection) -> tuple[str, int] | None:
    """Return where a client is now, by the newest packet of its connection (RFC 9000, 9.3)."""
    host, port = quic._network_paths[0].addr[:2] if quic._network_paths else (None, 0)
    return None if host is None else (host, port)


class _Http3(hypercorn.protocol.h3.H3Protocol):
    """hypercorn's HTTP/3, which knows that clients give requests up, and that answers may end before their requests."""

    def __init__(
        self,
        shared: Http3Connections,
        server: tuple[Any, ...] | None,
        quic: QuicConnection,
        send: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(
            shared.app,
            shared.config,
            shared.context,
            shared.tasks,
            ConnectionState(shared.state.copy()),
            client_address(quic),
            server,
            quic,
            send,
        )
        self._quic = quic

    async def handle(self, quic_event: QuicEvent) -> None:
        """Handle an event of QUIC."""
        if isinstance(quic_event, ConnectionTerminated):
            for stream_id in list(self.streams):
                await self._give_up(stream_id)
        elif isinstance(quic_event, (StreamReset, StopSendingReceived)):
            await self._give_up(quic_event.stream_id)
        for event in self.connection.handle_event(quic_event):
            if isinstance(event, HeadersReceived) and event.stream_id not in self.streams:
                self.client = client_address(self._quic)
                await self._create_stream(event)
            elif isinstance(event, DataReceived) and event.stream_id in self.streams:
                await self.streams[event.stream_id].handle(Body(stream_id=event.stream_id, data=event.data))
            if (
                isinstance(event, (HeadersReceived, DataReceived))
                and event.stream_ended
                and event.stream_id in self.streams
            ):
                await self.streams[event.stream_id].handle(EndBody(stream_id=event.stream_id))

    async def stream_send(self, event: Event) -> None:
        """Send what an application says, while anybody is there to hear it."""
        if event.stream_id in self.streams:
            await super().stream_send(event)

    async def _give_up(self, stream_id: int) -> None:
        """Tell an application that nobody waits for its answer any more."""
        stream = self.streams.pop(stream_id, None)
        if stream:
            await stream.handle(StreamClosed(stream_id=stream_id))

    def go_away(self) -> None:
        """Send GOAWAY."""
        if self.connection._local_control_stream_id is not None:
            frame = encode_frame(FrameType.GOAWAY, encode_uint_var(_GOAWAY_ID))
            self._quic.send_stream_data(self.connection._local_control_stream_id, frame)
