"""Serve QUIC with aioquic on the sockets of a worker, under connection IDs that bring every datagram back to it.

``serve()`` is ``aioquic.asyncio.serve`` with a worker in place of host and port. The server differs from aioquic's in
what steering asks for:

* each connection ID that it issues (the first, later ones, and that of a Retry) names the worker, and its stateless
  reset token is a keyed hash of it;
* Retry tokens are good on every worker of the group;
* an Initial whose DCID this group issued opens no connection, unless a Retry token comes with it: it is a stray of a
  connection that is gone;
* a datagram for a connection of this worker that nobody knows any more is answered with a stateless reset, so that
  clients of a worker that crashed start again at once.
"""

import asyncio
import contextlib
import gc
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ._aioquic import (
    SMALLEST_MAX_DATAGRAM_SIZE,
    Buffer,
    ConnectionEnd,
    Entry,
    QuicConfiguration,
    QuicConnectionProtocol,
    QuicHeader,
    QuicPacketType,
    QuicServer,
    QuicStreamHandler,
    SessionTicketFetcher,
    SessionTicketHandler,
    SteeredConnection,
    encode_invalid_token_close,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from ._readers import Endpoint, SocketAddress
from ._stateless import RateLimit, RetryTokens, stateless_reset
from .abi import LONG_DCID_OFFSET
from .cid import ConnectionIds
from .invariants import Header, read_header
from .lifecycle import Lifecycle
from .quicstats import QuicStats, StreamReset, count_end, count_reset
from .tickets import SessionTickets
from .worker import Worker

RESETS_PER_SECOND = 100.0
"""Stateless resets that a server sends at most."""

RETIRED_MAX = 32
"""Retired connection IDs per connection that a server still knows, so that no straggler is answered with a reset."""

FULL_COLLECTION_AFTER = 1000
"""Collections of the middle generation before one of everything: the third threshold of ``gc.set_threshold``."""

HANDSHAKE_SECONDS = 10.0
"""How long a server that ends waits for handshakes to be completed."""

__all__ = ["ConnectionEnd", "ServerCounters", "SteeredQuicServer", "StreamReset", "serve"]

_VERSION_NEGOTIATION = bytes(4)  # RFC 8999, 6


@dataclass
class ServerCounters:
    """What a server did so far.

    ``unanswered_resets`` are stateless resets that the rate limit or a short datagram forbade. ``unsent`` are
    datagrams that the kernel did not take. ``ends`` and ``stream_resets`` tell as many error codes apart as
    ``quicsteer.quicstats`` says.
    """

    connections: int = 0
    retries: int = 0
    invalid_tokens: int = 0
    resets: int = 0
    unanswered_resets: int = 0
    unsent: int = 0
    ends: Counter[ConnectionEnd] = field(default_factory=Counter)
    stream_resets: Counter[StreamReset] = field(default_factory=Counter)


class SteeredQuicServer(QuicServer):
    """An aioquic server on the sockets of a worker. ``serve()`` makes and starts it.

    ``counters`` says what it did. It reads the worker's sockets until ``close()``, and does not close them.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        configuration: QuicConfiguration,
        create_protocol: Callable[..., QuicConnectionProtocol] = QuicConnectionProtocol,
        session_ticket_fetcher: SessionTicketFetcher | None = None,
        session_ticket_handler: SessionTicketHandler | None = None,
        retry: bool | int = False,
        stream_handler: QuicStreamHandler | None = None,
    ) -> None:
        super().__init__(configuration=configuration)
        loop = asyncio.get_running_loop()
        self.worker = worker
        self._counters = ServerCounters()
        count = len(worker.listeners) // len(worker.established)  # of listeners per address
        self._endpoints = [
            Endpoint(sock, worker.listeners[number * count : (number + 1) * count], self._receive, loop)
            for number, sock in enumerate(worker.established)
        ]
        self._new_connection = partial(
            SteeredConnection,
            configuration=configuration,
            session_ticket_fetcher=session_ticket_fetcher,
            session_ticket_handler=session_ticket_handler,
        )
        self._new_protocol = partial(create_protocol, stream_handler=stream_handler)
        self._versions = configuration.supported_versions
        self._entries: dict[bytes, Entry] = {}
        self._connections: set[Entry] = set()
        self._handshakes = 0
        self._listening = False
        self._closed = asyncio.Event()
        self._ended = asyncio.Event()
        self._lifecycle = Lifecycle(worker, self)
        self._call_soon = loop.call_soon
        self._retry_above = {True: -1, False: None}[retry] if isinstance(retry, bool) else retry
        self._retry_tokens = RetryTokens(worker.token_secret)
        self._reset_limit = RateLimit(RESETS_PER_SECOND)

    @property
    def counters(self) -> ServerCounters:
        """What the server did so far."""
        self._counters.unsent = sum(endpoint.unsent for endpoint in self._endpoints)
        return self._counters

    def figures(self) -> QuicStats:
        """Return what the server did so far, as ``quicsteer stats`` shows it."""
        counters = self.counters
        return QuicStats(
            connections=self.connections,
            handshakes=self.handshakes,
            opened=counters.connections,
            retries=counters.retries,
            invalid_tokens=counters.invalid_tokens,
            stateless_resets=counters.resets,
            unanswered_resets=counters.unanswered_resets,
            unsent=counters.unsent,
            ends=Counter(counters.ends),
            stream_resets=Counter(counters.stream_resets),
        )

    @property
    def connection_ids(self) -> ConnectionIds:
        """Issues the connection IDs of the worker."""
        return self.worker.connection_ids

    @property
    def handshakes(self) -> int:
        """Handshakes that are open now."""
        return self._handshakes

    @property
    def connections(self) -> int:
        """Connections that are not over yet, with those in their handshake and those that are being closed."""
        return len(self._connections)

    def start(self, listen: bool = True) -> None:
        """Start to read the sockets for established connections, and to listen: at once, or when the supervisor says.

        Without a supervisor and with ``listen`` false, listening waits for ``start_listening()``.
        """
        for endpoint in self._endpoints:
            endpoint.start()
        if listen or self.worker.channel:
            self._lifecycle.start()

    def start_listening(self) -> None:
        """Take new connections."""
        self._listening = True
        for endpoint in self._endpoints:
            endpoint.start_listening()

    def stop_listening(self) -> None:
        """Take no new connections; those that exist, and clients that come back with a Retry token, are served.

        In the split form the listeners are left to the next worker: what has arrived (up to 64 datagrams each) is
        served first. Let the next worker start its listeners only after this one has stopped them.
        """
        for endpoint in self._endpoints:
            endpoint.stop_listening()
        self._listening = False

    async def drain(self, timeout: float | None) -> None:
        """Serve until no connection is left, or for ``timeout`` seconds; close then.

        Handshakes that are not complete after 10 seconds are not waited for: most are nobody's.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        await self._wait_until(
            lambda: not self._connections, HANDSHAKE_SECONDS if timeout is None else min(timeout, HANDSHAKE_SECONDS)
        )
        rest = None if deadline is None else deadline - time.monotonic()
        await self._wait_until(lambda: len(self._connections) == self._handshakes, rest)
        self.close()

    async def _wait_until(self, done: Callable[[], bool], timeout: float | None) -> None:
        """Wait while connections end, until enough have or the time is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not done():
                    self._ended.clear()
                    await self._ended.wait()

    async def wait_closed(self) -> None:
        """Wait until the server is closed, by ``close()``, ``drain()`` or its supervisor; then close the worker."""
        await self._closed.wait()

    def close(self) -> None:
        """Close any ongoing connections, and stop reading; closing twice does nothing.

        The sockets stay open until ``worker.close()``, which must come later: a socket that is closed while a loop
        reads it goes on waking the loop.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        self._lifecycle.close()
        for entry in self._connections:
            if entry.protocol:
                entry.protocol.close()
            if entry.connection:
                self._count_end(entry, entry.connection.end)
            self.end_handshake(entry)
        self._connections.clear()
        self._entries.clear()
        for endpoint in self._endpoints:
            endpoint.close()

    def datagram_received(self, data: bytes | str, addr: Any) -> None:
        """Take a datagram as if a listener of the worker's first address had read it."""
        self._receive(self._endpoints[0], data if isinstance(data, bytes) else data.encode(), addr, True)

    def learn(self, entry: Entry, cid: bytes) -> None:
        """Lead datagrams with a DCID to a connection."""
        entry.cids.add(cid)
        self._entries[cid] = entry

    def retire(self, entry: Entry, cid: bytes) -> None:
        """Forget a retired connection ID, but not at once: datagrams that carry it may be on their way."""
        entry.retired.append(cid)
        if len(entry.retired) > RETIRED_MAX:
            cid = entry.retired.popleft()
            entry.cids.discard(cid)
            self._entries.pop(cid, None)

    def end_handshake(self, entry: Entry) -> None:
        """Count a handshake as no longer open."""
        self._handshakes -= entry.handshaking
        entry.handshaking = False

    def forget(self, entry: Entry, end: ConnectionEnd | None = None) -> None:
        """Forget a connection that is over: its own connection IDs, without a walk through all others."""
        self._count_end(entry, end)
        self.end_handshake(entry)
        for cid in entry.cids:
            self._entries.pop(cid, None)
        entry.cids.clear()
        self._connections.discard(entry)
        self._ended.set()

    def _count_end(self, entry: Entry, end: ConnectionEnd | None) -> None:
        """Count how a connection ended, once."""
        if end and not entry.ended:
            entry.ended = True
            count_end(self._counters.ends, end)

    def count_reset(self, reset: StreamReset) -> None:
        """Count a stream that was reset."""
        count_reset(self._counters.stream_resets, reset)

    def defers(self, entry: Entry) -> bool:
        """Tell whether a connection shall send later, and see to it that it does."""
        if not entry.endpoint.reading or self._closed.is_set() or entry.protocol is None:
            entry.transmit_soon = False
            return False
        if not entry.transmit_soon:
            entry.transmit_soon = True
            self._call_soon(entry.protocol.transmit)
        return True

    def _receive(self, endpoint: Endpoint, data: bytes, address: SocketAddress, listener: bool) -> None:
        header = read_header(data, self.connection_ids.length)
        if header is None:
            return
        entry = self._entries.get(header.dcid)
        if entry is not None:
            # A client keeps to the server's address, for want of a preferred one (RFC 9000, 9).
            if entry.protocol and entry.endpoint is endpoint:
                entry.protocol.datagram_received(data, address)
        elif not header.long:
            self._reset(endpoint, data, address, header)
        elif len(data) >= SMALLEST_MAX_DATAGRAM_SIZE:  # less opens no connection (RFC 9000, 14.1 and 5.2.2)
            self._receive_unknown(endpoint, data, address, header.dcid, listener and self._listening)

    def _reset(self, endpoint: Endpoint, data: bytes, address: SocketAddress, header: Header) -> None:
        """Tell a client of this worker that its connection is gone (RFC 9000, 10.3)."""
        ids = self.connection_ids
        if ids.slot_of(header.dcid) != self.worker.slot:
            return
        answer = stateless_reset(len(data), ids.reset_token(header.dcid))
        if answer is None or not self._reset_limit.allow(time.monotonic()):
            self._counters.unanswered_resets += 1
            return
        self._counters.resets += 1
        endpoint.sendto(answer, address)

    def _receive_unknown(
        self, endpoint: Endpoint, data: bytes, address: SocketAddress, dcid: bytes, listening: bool
    ) -> None:
        """Take a datagram with a long header that belongs to no connection."""
        ours = self.connection_ids.slot_of(dcid) is not None
        if int.from_bytes(data[1:5], "big") not in self._versions:
            if listening and not ours:
                self._negotiate_version(endpoint, data, address, dcid)
            return
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=len(dcid))
        except ValueError:
            return
        if header.packet_type != QuicPacketType.INITIAL:
            return
        if ours:
            # A Retry brings its client to the worker that sent it, like any connection ID of ours. Without a token
            # this is a stray of a connection that is gone: aioquic alone would open one more for it.
            if header.token:
                self._continue_after_retry(endpoint, data, address, header)
        elif not listening:
            return
        elif self._retry_above is not None and self._handshakes > self._retry_above:
            # A token that comes with another DCID is not from a Retry of this group, and counts as none (RFC 9000,
            # 8.1.3): the NEW_TOKEN of another server must not end the attempt.
            self._ask_to_retry(endpoint, address, header)
        else:
            self._open(endpoint, data, address, header.destination_cid)

    def _negotiate_version(self, endpoint: Endpoint, data: bytes, address: SocketAddress, dcid: bytes) -> None:
        """Name the versions that we speak; of the client's, only what RFC 8999, 5.1 says is known."""
        start = LONG_DCID_OFFSET + len(dcid) + 1
        scid = data[start : start + data[start - 1]]
        if data[1:5] != _VERSION_NEGOTIATION:
            endpoint.sendto(
                encode_quic_version_negotiation(
                    source_cid=dcid, destination_cid=scid, supported_versions=self._versions
                ),
                address,
            )

    def _ask_to_retry(self, endpoint: Endpoint, address: SocketAddress, header: QuicHeader) -> None:
        """Ask a client to prove that the address is its own (RFC 9000, 8.1.2)."""
        cid = self.connection_ids.issue()
        answer = encode_quic_retry(
            version=header.version or 0,
            source_cid=cid,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=self._retry_tokens.create(address, header.destination_cid, cid, time.monotonic()),
        )
        self._counters.retries += 1
        endpoint.sendto(answer, address)

    def _continue_after_retry(
        self, endpoint: Endpoint, data: bytes, address: SocketAddress, header: QuicHeader
    ) -> None:
        cid = header.destination_cid
        original_dcid = self._retry_tokens.validate(header.token, address, cid, time.monotonic())
        if original_dcid is not None:
            self._open(endpoint, data, address, original_dcid, retry_scid=cid)
            return
        self._counters.invalid_tokens += 1
        if encode_invalid_token_close:  # RFC 9000, 8.1.3; releases before 1.6 have none, and silence is allowed too
            answer = encode_invalid_token_close(header.version, source_cid=cid, destination_cid=header.source_cid)
            endpoint.sendto(answer, address)

    def _open(
        self,
        endpoint: Endpoint,
        data: bytes,
        address: SocketAddress,
        original_dcid: bytes,
        retry_scid: bytes | None = None,
    ) -> None:
        entry = Entry(self, endpoint)
        try:
            connection = self._new_connection(
                entry, original_destination_connection_id=original_dcid, retry_source_connection_id=retry_scid
            )
            protocol = self._new_protocol(connection)
            protocol.connection_made(endpoint)
        except BaseException:
            self.forget(entry)
            raise
        entry.protocol = protocol
        entry.handshaking = True
        self._handshakes += 1
        self._connections.add(entry)
        self.learn(entry, retry_scid or original_dcid)
        self._counters.connections += 1
        protocol.datagram_received(data, address)


def _make_full_collections_rare() -> None:
    """Let the garbage collector walk all objects less often, unless the application has asked for less already.

    Over 4,000 connections in their handshake, which a flood of Initials leaves, each such walk stalls the event loop
    for more than half a second.
    """
    first, second, third = gc.get_threshold()
    if 0 < third < FULL_COLLECTION_AFTER:
        gc.set_threshold(first, second, FULL_COLLECTION_AFTER)


async def serve(
    worker: Worker,
    *,
    configuration: QuicConfiguration,
    create_protocol: Callable[..., QuicConnectionProtocol] = QuicConnectionProtocol,
    session_ticket_fetcher: SessionTicketFetcher | None = None,
    session_ticket_handler: SessionTicketHandler | None = None,
    retry: bool | int = False,
    stream_handler: QuicStreamHandler | None = None,
    session_tickets: bool = False,
    listen: bool = True,
) -> SteeredQuicServer:
    """Start an aioquic server on the sockets of a worker; the arguments are those of ``aioquic.asyncio.serve``.

    ``configuration.connection_id_length`` must be the group's. ``retry`` asks clients to prove their address first:
    always (``True``), never, or, as a number, while more handshakes than that are open: an aioquic server is cheap to
    flood with handshakes, and 50 is a good number. With ``listen=False`` new connections are taken only after
    ``start_listening()``: for a reload, where the worker before this one must stop first. Under a supervisor the
    server listens when the supervisor says so, and ends when it says so: ``await server.wait_closed()``.

    With ``session_tickets`` clients may resume TLS sessions and send 0-RTT data, on whatever worker they meet; each
    ticket is good once (``quicsteer.tickets``). Ticket callbacks of your own must share their store between workers.

    Full garbage collections become rare in this process (the third threshold of ``gc`` is raised to 1,000).

    End with ``server.close()``, then ``worker.close()``.

    Raises:
        ValueError: the configuration does not fit the group, ``retry`` is negative, or there are two stores of tickets.
    """
    length = worker.connection_ids.length
    if configuration.is_client:
        raise ValueError("configuration.is_client is True: a server needs QuicConfiguration(is_client=False)")
    if configuration.connection_id_length != length:
        raise ValueError(
            f"configuration.connection_id_length is {configuration.connection_id_length}, the group issues connection "
            f"IDs of {length} bytes: set QuicConfiguration(connection_id_length={length}), or open the group with "
            f"cid_length={configuration.connection_id_length}"
        )
    if retry < 0:
        raise ValueError(f"retry is {retry}, it must be True, False or a number of handshakes from 0")
    if session_tickets:
        if session_ticket_fetcher or session_ticket_handler:
            raise ValueError("session_tickets keeps tickets itself: leave the ticket callbacks out")
        tickets = SessionTickets(worker)
        session_ticket_fetcher, session_ticket_handler = tickets.take, tickets.keep
    server = SteeredQuicServer(
        worker,
        configuration=configuration,
        create_protocol=create_protocol,
        session_ticket_fetcher=session_ticket_fetcher,
        session_ticket_handler=session_ticket_handler,
        retry=retry,
        stream_handler=stream_handler,
    )
    _make_full_collections_rare()
    server.start(listen)
    return server
