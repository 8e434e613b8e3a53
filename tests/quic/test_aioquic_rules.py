"""What a steered aioquic server takes, answers and refuses.

Most tests talk to a worker whose two sockets have ports of their own, so that a test decides what arrives where.
"""

import asyncio
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.buffer import Buffer  # type: ignore[attr-defined]
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import ConnectionTerminated, PingAcknowledged, QuicEvent, StreamDataReceived
from aioquic.quic.packet import QuicErrorCode, QuicHeader, QuicPacketType, encode_quic_retry, pull_quic_header
from quic import (
    TIMEOUT,
    Address,
    Client,
    Wire,
    client_configuration,
    connected,
    first_flight,
    hear,
    pending,
    serve_echo,
    server_configuration,
    serving,
    short_header,
)

import quicsteer.aioquic
from quicsteer import SteeringGroup, SteeringMode, Worker
from quicsteer._aioquic import SteeredConnection, encode_invalid_token_close
from quicsteer._readers import Endpoint
from quicsteer._stateless import RateLimit, RetryTokens, stateless_reset
from quicsteer.aioquic import RETIRED_MAX, ConnectionEnd, SteeredQuicServer, serve
from quicsteer.channel import Channel, channel_pair
from quicsteer.cid import GroupKeys, Identity
from quicsteer.handover import Place, WorkerState

KEYS = GroupKeys.from_key(bytes(range(16)))
SLOT, OTHER_SLOT, SLOTS = 2, 3, 4


class Bench(NamedTuple):
    """A worker and where its sockets are; in the plain form that is one place."""

    worker: Worker
    established: Address
    listener: Address


def make_bench(form: str, slot: int = SLOT) -> Bench:
    sockets = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2 if form == "split" else 1)]
    for sock in sockets:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
    established, listener = sockets[0], sockets[-1]
    place, identity = Place(0, 0, SteeringMode.CBPF), Identity(slot, SLOTS, 8, 0)
    worker = Worker(WorkerState(place, identity, KEYS, listeners=(listener,), established=(established,)))
    return Bench(worker, established.getsockname(), listener.getsockname())


@pytest.fixture(params=["plain", "split"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = make_bench(request.param)
    with bench.worker:
        yield bench


@pytest.fixture
def plain_bench() -> Iterator[Bench]:
    bench = make_bench("plain")
    with bench.worker:
        yield bench


@pytest.fixture
def split_bench() -> Iterator[Bench]:
    bench = make_bench("split")
    with bench.worker:
        yield bench


@pytest.fixture
def wire() -> Iterator[Wire]:
    with Wire() as wire:
        yield wire


@asynccontextmanager
async def server_on(bench: Bench, **arguments: Any) -> AsyncIterator[SteeredQuicServer]:
    server = await serve_echo(bench.worker, **arguments)
    try:
        yield server
    finally:
        server.close()


def pings_acknowledged(connection: QuicConnection) -> list[int]:
    """Which pings the server acknowledged since this was asked last."""
    return [event.uid for event in iter(connection.next_event, None) if isinstance(event, PingAcknowledged)]


def read_long_header(datagram: bytes) -> QuicHeader:
    return pull_quic_header(Buffer(data=datagram), host_cid_length=8)


# Which datagrams open a connection


def test_an_initial_with_a_client_s_dcid_opens_a_connection(bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(bench) as server:
            connection, datagrams = first_flight(bench.listener)
            wire.send(datagrams, bench.listener)
            await wire.handshake(connection, bench.established)
            assert (server.connections, server.counters.connections) == (1, 1)

    asyncio.run(main())


@pytest.mark.parametrize("slot", [SLOT, OTHER_SLOT])
def test_an_initial_with_a_dcid_of_ours_opens_no_connection(bench: Bench, wire: Wire, slot: int) -> None:
    """It is a stray: no client makes up a connection ID that carries our seal."""

    async def main() -> None:
        async with server_on(bench) as server:
            with make_bench("plain", slot).worker as issuer:
                _, datagrams = first_flight(bench.established, dcid=issuer.connection_ids.issue())
            for address in (bench.established, bench.listener):
                wire.send(datagrams, address)
                assert await wire.settle(bench.worker, address) == []
            assert (server.connections, server.counters.connections) == (0, 0)

    asyncio.run(main())


def test_the_established_socket_opens_no_connection(split_bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(split_bench) as server:
            _, datagrams = first_flight(split_bench.established)
            wire.send(datagrams, split_bench.established)
            assert await wire.settle(split_bench.worker, split_bench.established) == []
            assert server.counters.connections == 0

    asyncio.run(main())


def test_datagrams_that_are_too_short_for_an_initial_open_no_connection(bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(bench) as server:
            _, [initial] = first_flight(bench.listener)
            wire.send([b"", b"\xc0", initial[:25], initial[:1199]], bench.listener)
            assert await wire.settle(bench.worker, bench.listener) == []
            assert server.counters.connections == 0

    asyncio.run(main())


def test_a_server_that_does_not_listen_opens_no_connection(bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(bench, listen=False) as server:
            connection, datagrams = first_flight(bench.listener)
            wire.send(datagrams, bench.listener)
            assert server.counters.connections == 0
            server.start_listening()
            await wire.handshake(connection, bench.established)
            server.stop_listening()
            with Wire() as late:
                late.send(first_flight(bench.listener)[1], bench.listener)
                assert await late.settle(bench.worker, bench.established) == []
            assert server.counters.connections == 1

    asyncio.run(main())


def test_a_server_reads_its_listener_empty_before_it_stops(split_bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(split_bench) as server:
            for _ in range(5):
                wire.send(first_flight(split_bench.listener)[1], split_bench.listener)
            server.stop_listening()
            assert server.counters.connections == 5

    asyncio.run(main())


# Version negotiation (RFC 9000, 6)


def unknown_version(initial: bytes) -> bytes:
    return initial[:1] + b"\x1a\x2a\x3a\x4a" + initial[5:]


def test_an_unknown_version_is_answered_with_those_that_we_speak(bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(bench) as server:
            connection, [initial] = first_flight(bench.listener)
            wire.send([unknown_version(initial)], bench.listener)
            [answer] = await wire.settle(bench.worker, bench.listener)
            header = read_long_header(answer)
            assert header.packet_type == QuicPacketType.VERSION_NEGOTIATION
            assert header.supported_versions == server_configuration().supported_versions
            assert header.destination_cid == connection.host_cid
            assert header.source_cid == connection.original_destination_connection_id
            assert server.counters.connections == 0

    asyncio.run(main())


def test_an_unknown_version_is_not_always_answered(bench: Bench, wire: Wire) -> None:
    """Not when it is too short, names a connection of ours, or is a Version Negotiation itself."""

    async def main() -> None:
        async with server_on(bench):
            _, [initial] = first_flight(bench.listener)
            _, [stray] = first_flight(bench.listener, dcid=bench.worker.connection_ids.issue())
            negotiation = initial[:1] + bytes(4) + initial[5:]
            wire.send([unknown_version(initial)[:1199], unknown_version(stray), negotiation], bench.listener)
            assert await wire.settle(bench.worker, bench.listener) == []

    asyncio.run(main())


def test_the_established_socket_negotiates_no_version(split_bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(split_bench):
            wire.send([unknown_version(first_flight(split_bench.listener)[1][0])], split_bench.established)
            assert await wire.settle(split_bench.worker, split_bench.established) == []

    asyncio.run(main())


# Retry (RFC 9000, 8.1)


def test_a_retry_brings_the_client_back_to_the_established_socket(bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(bench, retry=True) as server:
            connection, datagrams = first_flight(bench.listener)
            wire.send(datagrams, bench.listener)
            retry, sender = await wire.receive()
            assert sender == bench.established
            header = read_long_header(retry)
            assert header.packet_type == QuicPacketType.RETRY
            assert bench.worker.connection_ids.slot_of(header.source_cid) == SLOT
            assert server.counters.connections == 0
            hear(connection, retry)
            await wire.handshake(connection, bench.established)
            assert (server.counters.connections, server.counters.retries, server.counters.invalid_tokens) == (1, 1, 0)

    asyncio.run(main())


def test_a_retry_token_is_good_on_every_worker_and_whatever_it_asks_for(bench: Bench, wire: Wire) -> None:
    """As when a worker crashes, or a reload turns Retry off, between the two Initials."""

    async def main() -> None:
        other = make_bench("split", OTHER_SLOT)
        async with server_on(bench, retry=True), server_on(other, retry=False, listen=False) as second:
            connection, datagrams = first_flight(bench.listener)
            wire.send(datagrams, bench.listener)
            retry, _ = await wire.receive()
            hear(connection, retry)
            await wire.handshake(connection, other.established)
            assert second.counters.connections == 1
        other.worker.close()

    asyncio.run(main())


@pytest.mark.skipif(encode_invalid_token_close is None, reason="aioquic before 1.6 gives no answer, nor do we")
def test_a_bad_retry_token_ends_the_attempt(bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(bench) as server:
            connection, [initial] = first_flight(bench.listener)
            header = read_long_header(initial)
            assert header.version
            retry = encode_quic_retry(
                version=header.version,
                source_cid=bench.worker.connection_ids.issue(),
                destination_cid=header.source_cid,
                original_destination_cid=header.destination_cid,
                retry_token=os.urandom(40),
            )
            hear(connection, retry)
            wire.send(pending(connection), bench.established)
            hear(connection, (await wire.receive())[0])
            connection.handle_timer(asyncio.get_running_loop().time() + 60)
            [end] = [event for event in iter(connection.next_event, None) if isinstance(event, ConnectionTerminated)]
            assert end.error_code == QuicErrorCode.INVALID_TOKEN
            assert (server.counters.connections, server.counters.invalid_tokens) == (0, 1)

    asyncio.run(main())


@pytest.mark.parametrize("retry", [False, True])
def test_a_token_that_is_not_from_a_retry_of_ours_counts_as_none(bench: Bench, wire: Wire, retry: bool) -> None:
    """RFC 9000, 8.1.3: it may be the NEW_TOKEN of whoever had this address before."""

    async def main() -> None:
        async with server_on(bench, retry=retry) as server:
            connection, datagrams = first_flight(bench.listener, token=os.urandom(40))
            wire.send(datagrams, bench.listener)
            await wire.handshake(connection, bench.established)
            assert (server.counters.retries, server.counters.invalid_tokens) == (int(retry), 0)

    asyncio.run(main())


def test_adaptive_retry_starts_above_its_number_of_open_handshakes(bench: Bench) -> None:
    async def main() -> None:
        async with server_on(bench, retry=2) as server:
            with Wire() as first, Wire() as second, Wire() as third, Wire() as fourth, Wire() as fifth:
                connections = []
                for number, wire in enumerate((first, second, third), 1):
                    connection, datagrams = first_flight(bench.listener)
                    connections.append(connection)
                    wire.send(datagrams, bench.listener)
                    await first.settle(bench.worker, bench.listener)
                    assert server.handshakes == number
                connection, datagrams = first_flight(bench.listener)
                fourth.send(datagrams, bench.listener)
                retry, _ = await fourth.receive()
                assert read_long_header(retry).packet_type == QuicPacketType.RETRY
                assert (server.handshakes, server.counters.retries) == (3, 1)

                await second.handshake(connections[1], bench.established)
                await second.settle(bench.worker, bench.established)
                assert server.handshakes == 2
                connection, datagrams = first_flight(bench.listener)
                fifth.send(datagrams, bench.listener)
                await fifth.handshake(connection, bench.established)
                assert (server.counters.connections, server.counters.retries) == (4, 1)

    asyncio.run(main())


def test_a_retry_token_is_bound_to_address_connection_id_time_and_group() -> None:
    tokens = RetryTokens(KEYS.token_secret)
    address, dcid, cid = ("192.0.2.1", 4433), b"client's", b"retry-id"
    token = tokens.create(address, dcid, cid, now=1000.0)
    assert tokens.validate(token, address, cid, 1000.0) == dcid
    assert tokens.validate(token, (*address, 0, 0), cid, 1030.0) == dcid
    assert tokens.validate(token, address, cid, 1030.1) is None
    assert tokens.validate(token, address, cid, 999.0) is None
    assert tokens.validate(token, ("192.0.2.2", 4433), cid, 1000.0) is None
    assert tokens.validate(token, ("192.0.2.1", 4434), cid, 1000.0) is None
    assert tokens.validate(token, address, dcid, 1000.0) is None
    assert RetryTokens(bytes(32)).validate(token, address, cid, 1000.0) is None
    for length in range(len(token)):
        assert tokens.validate(token[:length], address, cid, 1000.0) is None
    for index in range(len(token)):
        forged = token[:index] + bytes([token[index] ^ 1]) + token[index + 1 :]
        assert tokens.validate(forged, address, cid, 1000.0) is None


# Stateless reset (RFC 9000, 10.3)


@pytest.mark.parametrize("length", [22, 30, 43, 44, 1200])
def test_a_datagram_for_a_connection_that_is_gone_is_answered_with_a_reset(
    bench: Bench, wire: Wire, length: int
) -> None:
    async def main() -> None:
        async with server_on(bench) as server:
            cid = bench.worker.connection_ids.issue()
            wire.send([short_header(cid, length)], bench.established)
            answer, sender = await wire.receive()
            assert sender == bench.established
            assert len(answer) == min(length - 1, 42)
            assert answer[0] >> 6 == 0b01
            assert answer[-16:] == bench.worker.connection_ids.reset_token(cid)
            assert server.counters.resets == 1

    asyncio.run(main())


def test_no_reset_is_sent_where_it_could_do_harm(bench: Bench, wire: Wire) -> None:
    """Not to short datagrams (loops), not for the connections of others (RFC 9000, 21.11), not to long headers."""

    async def main() -> None:
        async with server_on(bench) as server:
            with make_bench("plain", OTHER_SLOT).worker as other:
                others_cid = other.connection_ids.issue()
            cid = bench.worker.connection_ids.issue()
            _, [initial] = first_flight(bench.established, dcid=cid)
            handshake_packet = bytes([initial[0] | 0x20]) + initial[1:]
            datagrams = [short_header(cid, 21), short_header(others_cid), short_header(os.urandom(8)), handshake_packet]
            wire.send(datagrams, bench.established)
            assert await wire.settle(bench.worker, bench.established) == []
            assert (server.counters.resets, server.counters.unanswered_resets) == (1, 1)

    asyncio.run(main())


def test_the_rate_of_resets_is_limited(bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(bench) as server:
            server._reset_limit = RateLimit(1)
            wire.send([short_header(bench.worker.connection_ids.issue()) for _ in range(16)], bench.established)
            while server.counters.resets + server.counters.unanswered_resets < 16:
                await asyncio.sleep(0)
            assert server.counters.resets >= 1
            assert server.counters.unanswered_resets >= 1

    asyncio.run(asyncio.wait_for(main(), TIMEOUT))


def test_a_rate_limit_lets_its_rate_pass_and_no_more() -> None:
    limit = RateLimit(10)
    assert [limit.allow(100.0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert [limit.allow(100.35) for _ in range(5)] == [True] * 3 + [False] * 2
    assert [limit.allow(200.0) for _ in range(12)] == [True] * 10 + [False] * 2


def test_resets_look_like_packets_and_differ() -> None:
    resets = {stateless_reset(100, bytes(16)) for _ in range(20)}
    assert len(resets) == 20
    assert {reset[0] >> 6 for reset in resets if reset} == {0b01}
    assert stateless_reset(0, bytes(16)) is stateless_reset(21, bytes(16)) is None


# Connection IDs of a connection


def test_every_connection_id_names_the_worker_and_has_its_reset_token(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        async with serving(*group.workers), connected(group.addresses[0]) as client:
            worker = group.workers[await client.exchange()]
            seen = client.server_cids
            assert len(seen) == 8
            for _ in range(10):
                client.protocol.change_connection_id()
                await client.exchange()
                seen |= client.server_cids
            assert len(seen) == 18
            for cid, token in seen.items():
                assert worker.connection_ids.slot_of(cid) == worker.slot
                assert worker.connection_ids.reset_token(cid) == token

    with SteeringGroup.open("127.0.0.1:0", 3, mode=steering_mode) as group:
        asyncio.run(main(group))


def test_retired_connection_ids_of_a_live_connection_bring_no_reset(plain_bench: Bench, wire: Wire) -> None:
    async def main() -> None:
        async with server_on(plain_bench) as server, connected(plain_bench.established) as client:
            retired = client.server_cid
            client.protocol.change_connection_id()
            await client.exchange()
            wire.send([short_header(retired)], plain_bench.established)
            assert await wire.settle(plain_bench.worker, plain_bench.established) == []
            assert server.counters.resets == 1

    asyncio.run(main())


def test_a_client_that_retires_connection_ids_forever_costs_no_memory(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        async with serving(*group.workers) as [server], connected(group.addresses[0]) as client:
            for _ in range(RETIRED_MAX + 20):
                client.protocol.change_connection_id()
                await asyncio.wait_for(client.protocol.ping(), TIMEOUT)
            await client.exchange()
            [entry] = server._connections
            assert set(server._entries) == entry.cids
            assert len(entry.cids) == 1 + 8 + RETIRED_MAX

    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode) as group:
        asyncio.run(main(group))


def test_a_connection_stays_on_the_address_of_the_server_that_it_began_on(
    steering_mode: SteeringMode, wire: Wire
) -> None:
    """RFC 9000, 9: only a preferred address, which aioquic does not offer, would let a client go to another one."""

    async def main(group: SteeringGroup) -> None:
        [worker] = group.workers
        first, second = group.addresses
        async with serving(worker):
            connection, datagrams = first_flight(first)
            wire.send(datagrams, first)
            await wire.handshake(connection, first)
            for answer in await wire.settle(worker, first):
                hear(connection, answer)
            for number, address in enumerate((second, first)):
                connection.send_ping(number)
                wire.send(pending(connection), address)
                for answer in await wire.settle(worker, address):
                    hear(connection, answer)
            while not (acknowledged := pings_acknowledged(connection)):
                hear(connection, (await wire.receive())[0])
            assert acknowledged == [1]

    with SteeringGroup.open(["127.0.0.1:0", "127.0.0.2:0"], 1, mode=steering_mode) as group:
        asyncio.run(main(group))


# The end of a connection


async def one_ended(server: SteeredQuicServer) -> None:
    """Wait until a server has seen the end of one of its connections."""
    waits = [asyncio.ensure_future(entry.protocol.wait_closed()) for entry in server._connections if entry.protocol]
    done, pending = await asyncio.wait(waits, timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
    assert done
    for each in pending:
        each.cancel()


def test_the_end_of_a_connection_takes_its_own_connection_ids_only(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        async with serving(*group.workers) as [server], connected(group.addresses[0]) as stays:
            await stays.exchange()
            before = set(server._entries)
            leaves = Client()
            await leaves.connect(group.addresses[0])
            await leaves.exchange()
            assert len(server._entries) == 2 * len(before)
            await asyncio.gather(one_ended(server), leaves.close(error_code=7))
            assert set(server._entries) == before
            assert server.counters.ends == {ConnectionEnd("client", True, 7): 1}
            await stays.exchange()
            assert (server.connections, server.handshakes) == (1, 0)

    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode) as group:
        asyncio.run(main(group))


def test_ends_are_counted_by_who_ended_and_why(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        configuration = server_configuration(idle_timeout=1.0)
        async with serving(*group.workers, configuration=configuration) as [server]:
            async with connected(group.addresses[0]):
                [entry] = server._connections
                assert entry.protocol
                entry.protocol.close(error_code=9)
                await one_ended(server)
            silent = Client()
            await silent.connect(group.addresses[0])
            silent.drop()
            await one_ended(server)
            idle = ConnectionEnd("nobody", False, QuicErrorCode.INTERNAL_ERROR)
            assert server.counters.ends == {ConnectionEnd("server", True, 9): 1, idle: 1}
            assert (server.connections, server.handshakes, server._entries) == (0, 0, {})

    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode) as group:
        asyncio.run(main(group))


def test_close_ends_connections(plain_bench: Bench) -> None:
    async def main() -> None:
        for _ in range(2):  # the sockets are the worker's: one more server may read them
            server = await serve_echo(plain_bench.worker)
            client = Client()
            await client.connect(plain_bench.established)
            await client.exchange()
            server.close()
            await asyncio.wait_for(server.wait_closed(), TIMEOUT)
            await asyncio.wait_for(client.protocol.wait_closed(), TIMEOUT)
            client.drop()

    asyncio.run(main())


def test_close_stops_reading_and_leaves_the_sockets_open(bench: Bench) -> None:
    async def main() -> None:
        server = await serve_echo(bench.worker)
        server.close()
        server.close()
        assert not any(asyncio.get_running_loop().remove_reader(sock) for sock in bench.worker.sockets)
        assert all(sock.fileno() >= 0 for sock in bench.worker.sockets)

    asyncio.run(main())


# Under a supervisor


async def said(channel: Channel) -> str:
    """The next thing that a worker says to its supervisor, but for that it is there and for its figures."""
    loop = asyncio.get_running_loop()
    while True:
        packet = await asyncio.wait_for(loop.sock_recv(channel.socket, 4096), TIMEOUT)
        if (say := str(json.loads(packet)["say"])) not in ("hello", "report"):
            return say


def test_a_server_follows_its_supervisor_from_the_first_datagram_to_the_last(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        [address] = group.addresses
        supervisor, theirs = channel_pair()
        worker = group.worker(0)
        worker.attach(theirs)
        server = await serve_echo(worker)
        assert await said(supervisor) == "ready"
        client = Client()
        await client.start(address)
        supervisor.send("ping")
        assert await said(supervisor) == "alive"
        assert server.counters.connections == 0
        supervisor.send("listen")
        await asyncio.wait_for(client.protocol.wait_connected(), TIMEOUT)
        supervisor.send("stop", seconds=TIMEOUT)
        assert await said(supervisor) == "stopped"
        late = Client()
        await late.start(address)
        await client.exchange()
        await client.close()
        assert await said(supervisor) == "drained"
        await asyncio.wait_for(server.wait_closed(), TIMEOUT)
        assert server.counters.connections == 1
        worker.close()
        supervisor.close()
        late.drop()

    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode, split=True) as group:
        asyncio.run(main(group))


def test_connections_that_do_not_end_are_closed_at_the_deadline(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        supervisor, theirs = channel_pair()
        worker = group.worker(0)
        worker.attach(theirs)
        server = await serve_echo(worker)
        supervisor.send("listen")
        client = Client()
        await client.connect(group.addresses[0])
        supervisor.send("stop", seconds=0)
        assert [await said(supervisor) for _ in range(3)] == ["ready", "stopped", "drained"]
        await asyncio.wait_for(client.protocol.wait_closed(), TIMEOUT)
        assert server.connections == 0
        client.drop()
        worker.close()
        supervisor.close()

    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode, split=True) as group:
        asyncio.run(main(group))


def test_handshakes_that_nobody_completes_do_not_hold_a_server_back(
    plain_bench: Bench, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quicsteer.aioquic, "HANDSHAKE_SECONDS", 0)

    async def main() -> None:
        async with server_on(plain_bench) as server:
            client = Client()
            await client.connect(plain_bench.listener)
            wire.send(first_flight(plain_bench.listener)[1], plain_bench.listener)
            await client.exchange()
            drain = asyncio.ensure_future(server.drain(None))
            await client.exchange()
            assert (server.connections, server.handshakes, drain.done()) == (2, 1, False)
            await client.close()
            await asyncio.wait_for(drain, TIMEOUT)
            await server.wait_closed()

    asyncio.run(main())


def test_a_server_goes_on_without_its_supervisor(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        supervisor, theirs = channel_pair()
        worker = group.worker(0)
        worker.attach(theirs)
        server = await serve_echo(worker)
        supervisor.send("listen")
        supervisor.close()
        async with connected(group.addresses[0]) as client:
            await client.exchange()
        server.close()
        worker.close()

    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode, split=True) as group:
        asyncio.run(main(group))


# The application


class Broken(QuicConnectionProtocol):
    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived) and event.data == b"bad":
            raise RuntimeError("broken on purpose")
        super().quic_event_received(event)


def test_an_exception_of_the_application_does_not_stop_the_server(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        reports: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.put_nowait(context))
        async with (
            serving(*group.workers, create_protocol=Broken),
            connected(group.addresses[0]) as good,
            connected(group.addresses[0]) as bad,
        ):
            _, writer = await bad.protocol.create_stream()
            writer.write(b"bad")
            report = await asyncio.wait_for(reports.get(), TIMEOUT)
            assert str(report["exception"]) == "broken on purpose"
            await good.exchange()
            await bad.exchange()

    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode) as group:
        asyncio.run(main(group))


def test_an_application_that_makes_no_protocol_leaves_nothing_behind(bench: Bench, wire: Wire) -> None:
    def refuse(*arguments: Any, **keywords: Any) -> QuicConnectionProtocol:
        raise RuntimeError("no protocol today")

    async def main() -> None:
        reports: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.put_nowait(context))
        async with server_on(bench, create_protocol=refuse) as server:
            wire.send(first_flight(bench.listener)[1], bench.listener)
            report = await asyncio.wait_for(reports.get(), TIMEOUT)
            assert str(report["exception"]) == "no protocol today"
            assert (server.connections, server.handshakes, server._entries) == (0, 0, {})

    asyncio.run(main())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"configuration": server_configuration(connection_id_length=12)}, "12, the group issues .* 8 bytes"),
        ({"configuration": client_configuration()}, "is_client"),
        ({"configuration": server_configuration(), "retry": -1}, "retry is -1"),
    ],
)
def test_wrong_arguments_are_refused_at_once(bench: Bench, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        asyncio.run(serve(bench.worker, **arguments))


def test_without_aioquic_only_the_integration_is_missing() -> None:
    script = """
import sys
sys.modules["aioquic"] = None
import quicsteer
try:
    import quicsteer.aioquic
except ImportError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert "pip install quicsteer[aioquic]" in child.stdout


# Reading and sending


def test_established_datagrams_are_read_in_batches_and_new_ones_one_by_one(split_bench: Bench, wire: Wire) -> None:
    async def main() -> list[tuple[int, bool]]:
        loop = asyncio.get_running_loop()
        turn = 0
        reads: list[tuple[int, bool]] = []

        def count() -> None:
            nonlocal turn
            turn += 1
            loop.call_soon(count)

        def receive(endpoint: Endpoint, data: bytes, address: Address, listener: bool) -> None:
            assert endpoint.reading
            reads.append((turn, listener))

        [established], [listener] = split_bench.worker.established, split_bench.worker.listeners
        endpoint = Endpoint(established, [listener], receive, loop)
        wire.send([b"datagram"] * 40, split_bench.established)
        wire.send([b"datagram"] * 10, split_bench.listener)
        endpoint.start()
        endpoint.start_listening()
        count()
        while len(reads) < 50:
            await asyncio.sleep(0)
        endpoint.close()
        assert not endpoint.reading
        return reads

    reads = asyncio.run(asyncio.wait_for(main(), TIMEOUT))
    turns = sorted({turn for turn, _ in reads})
    assert [reads.count((turn, False)) for turn in turns] == [16, 16, 8, 0, 0, 0, 0, 0, 0, 0]
    assert [reads.count((turn, True)) for turn in turns] == [1] * 10


def test_a_batch_of_datagrams_is_answered_once(bench: Bench, wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    builds: list[float] = []
    build = QuicConnection.datagrams_to_send

    def count(self: QuicConnection, now: float) -> Any:
        if isinstance(self, SteeredConnection):
            builds.append(now)
        return build(self, now)

    monkeypatch.setattr(QuicConnection, "datagrams_to_send", count)

    async def main() -> None:
        async with server_on(bench):
            connection, datagrams = first_flight(bench.listener)
            wire.send(datagrams, bench.listener)
            await wire.handshake(connection, bench.established)
            await wire.settle(bench.worker, bench.established)
            batch = []
            for uid in range(16):
                connection.send_ping(uid)
                batch += pending(connection)
            builds.clear()
            wire.send(batch, bench.established)
            acknowledged = 0
            while acknowledged < len(batch):
                hear(connection, (await wire.receive())[0])
                acknowledged += len(pings_acknowledged(connection))
            assert len(batch) == 16
            assert len(builds) < 8  # one, and what timers ask for

    asyncio.run(main())


def test_a_datagram_that_the_kernel_refuses_is_lost_and_counted(bench: Bench) -> None:
    async def main() -> None:
        async with server_on(bench) as server:
            [endpoint] = server._endpoints
            assert endpoint.get_extra_info("sockname") == bench.established
            endpoint.sendto(b"nobody has port 0", ("127.0.0.1", 0))
            endpoint.sendto(b"to nobody")
            assert server.counters.unsent == 1
            assert not endpoint.is_closing()
            endpoint.abort()
            assert endpoint.is_closing()
            endpoint.sendto(b"too late", bench.listener)
            assert server.counters.unsent == 1

    asyncio.run(main())


def test_full_garbage_collections_become_rare_and_never_more_frequent(bench: Bench) -> None:
    """Each walks all connections there are: over those that a flood leaves it stalls the loop."""

    async def main() -> None:
        for before, after in (((700, 10, 10), (700, 10, 1000)), ((50, 5, 5000), (50, 5, 5000)), ((0, 5, 0), (0, 5, 0))):
            gc.set_threshold(*before)
            (await serve_echo(bench.worker)).close()
            assert gc.get_threshold() == after

    thresholds = gc.get_threshold()
    try:
        asyncio.run(main())
    finally:
        gc.set_threshold(*thresholds)
