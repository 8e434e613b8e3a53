"""Connections live through a change of address, whatever worker the kernel's hash would pick."""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from quic import TIMEOUT, Client, client_configuration, connected, processes, serve_echo, serving, version_2

from quicsteer import Outcome, SteeringGroup, SteeringMode

WORKERS = 4
CLIENTS = 24
CHANGES = 3

Change = Callable[[Client], Awaitable[None]]


async def follow(address: tuple[str, int], change: Change, **settings: Any) -> set[int]:
    """Let a client change and exchange data again and again; return the workers that answered."""
    async with connected(address, client_configuration(**settings)) as client:
        answered_by = {await client.exchange()}
        for _ in range(CHANGES):
            await change(client)
            answered_by.add(await client.exchange())
        return answered_by


async def follow_all(address: tuple[str, int], change: Change, **settings: Any) -> list[set[int]]:
    return await asyncio.gather(*(follow(address, change, **settings) for _ in range(CLIENTS)))


def assert_all_stayed(workers: list[set[int]]) -> None:
    assert [len(each) for each in workers] == [1] * CLIENTS
    assert len(set.union(*workers)) > 1, "one worker got all connections"


def assert_steered(group: SteeringGroup) -> None:
    """All datagrams went by connection ID, but for the clients' first ones, and none was lost."""
    stats = group.stats()
    assert stats.dropped == 0
    if group.mode is SteeringMode.EBPF:
        outcomes = dict(stats.outcomes)
        routed, dispatched = outcomes.pop(Outcome.ROUTED), outcomes.pop(Outcome.DISPATCHED)
        assert outcomes == {Outcome.UNROUTABLE: 0, Outcome.MALFORMED: 0}
        assert dispatched is not None
        assert dispatched >= CLIENTS
        assert routed is not None
        assert routed >= CLIENTS * (1 + CHANGES)
    else:
        assert set(stats.outcomes.values()) == {None}


@pytest.fixture(params=[False, True], ids=["plain", "split"])
def split(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("change", [Client.change_port, Client.migrate], ids=["port", "migration"])
def test_connections_survive(steering_mode: SteeringMode, split: bool, change: Change) -> None:
    with SteeringGroup.open("127.0.0.1:0", WORKERS, mode=steering_mode, split=split) as group, processes(group):
        assert_all_stayed(asyncio.run(follow_all(group.addresses[0], change)))
        assert_steered(group)


@pytest.mark.parametrize("retry", [True, 0], ids=["always", "adaptive"])
def test_connections_survive_behind_a_retry(steering_mode: SteeringMode, split: bool, retry: bool | int) -> None:
    """The client's second Initial carries the Retry's connection ID, and goes where that one says."""
    serve = functools.partial(serve_echo, retry=retry)
    with SteeringGroup.open("127.0.0.1:0", WORKERS, mode=steering_mode, split=split) as group, processes(group, serve):
        assert_all_stayed(asyncio.run(follow_all(group.addresses[0], Client.change_port)))
        assert_steered(group)


def test_connections_of_version_2_survive(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", WORKERS, mode=steering_mode) as group, processes(group):
        assert_all_stayed(asyncio.run(follow_all(group.addresses[0], Client.migrate, **version_2())))
        assert_steered(group)


@pytest.mark.parametrize("length", [8, 9, 20])
def test_connections_survive_with_connection_ids_of_any_length(steering_mode: SteeringMode, length: int) -> None:
    with (
        SteeringGroup.open("127.0.0.1:0", WORKERS, mode=steering_mode, cid_length=length) as group,
        processes(group),
    ):
        assert_all_stayed(asyncio.run(follow_all(group.addresses[0], Client.migrate)))
        assert_steered(group)


def test_without_steering_most_connections_break() -> None:
    """The control: the same clients and servers where the kernel's hash decides."""

    async def count_survivors(address: tuple[str, int]) -> int:
        clients = [Client() for _ in range(CLIENTS)]
        for client in clients:
            await client.connect(address)
            await client.exchange()
            await client.change_port()
        done, pending = await asyncio.wait([asyncio.ensure_future(each.exchange()) for each in clients], timeout=2)
        for exchange in pending:
            exchange.cancel()
        for client in clients:
            client.drop()
        return len(done)

    with SteeringGroup.open("127.0.0.1:0", WORKERS, mode="hash") as group, processes(group):
        assert asyncio.run(count_survivors(group.addresses[0])) < CLIENTS


def test_early_data_is_served_by_the_worker_that_issued_the_ticket(steering_mode: SteeringMode) -> None:
    """0-RTT (RFC 9001, 4.6): it comes with the client's own DCID, and goes where the Initial went."""

    async def main(group: SteeringGroup) -> None:
        server_tickets: dict[bytes, Any] = {}
        client_tickets: list[Any] = []
        tickets = {
            "session_ticket_handler": lambda ticket: server_tickets.update({ticket.ticket: ticket}),
            "session_ticket_fetcher": lambda label: server_tickets.pop(label, None),
        }
        async with serving(*group.workers, **tickets):
            first = Client(session_ticket_handler=client_tickets.append)
            await first.connect(group.addresses[0])
            await first.exchange()
            await first.close()

            second = Client(client_configuration(session_ticket=client_tickets.pop()))
            await second.start(group.addresses[0], transmit=False)
            await second.exchange()
            assert second.protocol.handshake
            assert second.protocol.handshake.early_data_accepted
            await second.change_port()
            await second.exchange()
            second.drop()

    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode, split=True) as group:
        asyncio.run(main(group))


def test_a_worker_serves_all_addresses_of_its_group(steering_mode: SteeringMode, split: bool) -> None:
    addresses = ["127.0.0.1:0", "[::1]:0"]
    with SteeringGroup.open(addresses, WORKERS, mode=steering_mode, split=split) as group, processes(group):

        async def main() -> None:
            for address in group.addresses:
                assert_all_stayed(await follow_all(address, Client.change_port))

        asyncio.run(main())
        assert group.stats().dropped == 0


def test_a_reload_hands_new_connections_over_and_keeps_the_old_ones(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        [address] = group.addresses
        [worker] = group.workers
        async with serving(worker) as [old], connected(address) as early:
            await early.exchange()
            async with serving(group.worker(0, bank=1), listen=False) as [new]:
                waiting = Client()
                await waiting.start(address)
                old.stop_listening()
                new.start_listening()
                await asyncio.wait_for(waiting.protocol.wait_connected(), TIMEOUT)
                async with connected(address) as late:
                    for client in (early, waiting, late):
                        await client.migrate()
                        await client.exchange()
                    assert worker.connection_ids.slot_of(early.server_cid) == old.worker.slot
                    assert worker.connection_ids.slot_of(late.server_cid) == new.worker.slot
                    assert old.connections + new.connections == 3
                waiting.drop()

    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode, split=True, banks=2) as group:
        asyncio.run(main(group))


def test_a_worker_that_stands_in_for_another_takes_its_new_connections(
    steering_mode: SteeringMode, split: bool
) -> None:
    async def main(group: SteeringGroup) -> None:
        async with serving(group.worker(0, listeners=[0, 1])):
            for address in group.addresses:
                assert await follow_all(address, Client.migrate) == [{0}] * CLIENTS

    with SteeringGroup.open(["127.0.0.1:0", "[::1]:0"], 2, mode=steering_mode, split=split) as group:
        asyncio.run(main(group))
