"""TLS sessions are resumed, and 0-RTT data is taken, on whatever worker a client meets next; each ticket once."""

import asyncio
import functools
import signal
from typing import Any

import pytest
from quic import TIMEOUT, Client, Processes, client_configuration, processes, serve_echo, server_configuration, serving
from service import Service, program

from quicsteer import SteeringGroup, SteeringMode, Worker
from quicsteer.aioquic import serve
from quicsteer.tickets import LIFETIME, SessionTickets

WORKERS = 4
AT_ONCE = 10

serve_tickets = functools.partial(serve_echo, session_tickets=True)


async def get_ticket(address: tuple[str, int]) -> tuple[int, Any]:
    """Visit a server; return the worker, and the ticket that it gave."""
    tickets: list[Any] = []
    client = Client(session_ticket_handler=tickets.append)
    await client.connect(address)
    worker = await client.exchange()
    await client.close()
    return worker, tickets.pop()


async def use_ticket(address: tuple[str, int], ticket: Any) -> tuple[int, bool, bool]:
    """Come with a ticket and early data; return the worker, and whether it took the session and the data as early."""
    client = Client(client_configuration(session_ticket=ticket))
    await client.start(address, transmit=False)
    worker = await client.exchange()
    if not client.protocol.handshake:
        await asyncio.wait_for(client.protocol.wait_connected(), TIMEOUT)
    handshake = client.protocol.handshake
    assert handshake
    await client.close()
    return worker, handshake.session_resumed, handshake.early_data_accepted


def test_sixty_of_sixty_sessions_are_resumed_with_early_data(steering_mode: SteeringMode) -> None:
    async def resume(address: tuple[str, int], gate: asyncio.Semaphore) -> bool:
        async with gate:
            one, ticket = await get_ticket(address)
            two, resumed, early = await use_ticket(address, ticket)
            assert (resumed, early) == (True, True)
            return one != two

    async def main(address: tuple[str, int]) -> list[bool]:
        gate = asyncio.Semaphore(AT_ONCE)
        return await asyncio.gather(*(resume(address, gate) for _ in range(60)))

    with (
        SteeringGroup.open("127.0.0.1:0", WORKERS, mode=steering_mode, split=True) as group,
        processes(group, serve_tickets),
    ):
        elsewhere = asyncio.run(main(group.addresses[0]))
        assert len(elsewhere) == 60
        assert any(elsewhere)


def test_early_data_that_is_played_again_is_not_taken(steering_mode: SteeringMode) -> None:
    """RFC 8446, 8.1: the second time there is a full handshake, and what came early is asked for again."""

    async def main(address: tuple[str, int]) -> None:
        for _ in range(5):
            _, ticket = await get_ticket(address)
            answers = await asyncio.gather(*(use_ticket(address, ticket) for _ in range(4)))
            assert sorted(answer[1:] for answer in answers) == [(False, False)] * 3 + [(True, True)]

    with (
        SteeringGroup.open("127.0.0.1:0", WORKERS, mode=steering_mode, split=True) as group,
        processes(group, serve_tickets),
    ):
        asyncio.run(main(group.addresses[0]))


def test_a_ticket_outlives_the_worker_that_gave_it() -> None:
    async def main(group: SteeringGroup, started: Processes) -> None:
        victim = started.start(group.workers[0], serve_tickets)
        _, ticket = await get_ticket(group.addresses[0])
        victim.kill()
        victim.join()
        started.start(group.worker(0), serve_tickets)
        assert await use_ticket(group.addresses[0], ticket) == (0, True, True)

    with SteeringGroup.open("127.0.0.1:0", 1, split=True) as group:
        started = Processes()
        try:
            asyncio.run(main(group, started))
        finally:
            started.stop()


def test_a_ticket_outlives_reloads_and_a_new_supervisor() -> None:
    async def main(running: Service) -> None:
        for change in (running.reload, lambda: replace_supervisor(running), running.reload):
            _, ticket = await get_ticket(running.address)
            await asyncio.to_thread(change)
            _, *taken = await use_ticket(running.address, ticket)
            assert taken == [True, True]

    def replace_supervisor(running: Service) -> None:
        ready = len(running.manager.messages)
        running.kill(signal.SIGUSR2)
        running.manager.wait_for("READY=1", ready)

    with program("--workers", "2", "--banks", "3") as running:
        asyncio.run(main(running))


def test_a_retry_token_is_good_after_a_reload_and_after_a_crash() -> None:
    """Whoever was sent away by a worker that is gone may come back to its successor."""

    async def main(group: SteeringGroup) -> None:
        [address] = group.addresses
        client = Client()
        async with serving(group.worker(0), retry=True) as [server]:
            waiting = asyncio.Event()
            received = client.protocol.datagram_received

            def hold(data: bytes | str, addr: Any) -> None:
                waiting.set()  # the answer to the Retry is not sent before there is a successor
                held.append((data, addr))

            held: list[Any] = []
            client.protocol.datagram_received = hold  # type: ignore[method-assign]
            await client.start(address)
            await asyncio.wait_for(waiting.wait(), TIMEOUT)
            assert server.counters.retries == 1
        client.protocol.datagram_received = received  # type: ignore[method-assign]
        async with serving(group.worker(0), retry=True) as [server]:
            received(*held[0])
            await asyncio.wait_for(client.protocol.wait_connected(), TIMEOUT)
            assert await client.exchange() == 0
            assert (server.counters.retries, server.counters.invalid_tokens) == (0, 0)
        client.drop()

    with SteeringGroup.open("127.0.0.1:0", 1, split=True) as group:
        asyncio.run(main(group))


def test_a_ticket_is_worth_nothing_to_another_group() -> None:
    async def main(first: SteeringGroup, second: SteeringGroup) -> None:
        async with serving(*first.workers, *second.workers, session_tickets=True):
            _, ticket = await get_ticket(first.addresses[0])
            assert (await use_ticket(second.addresses[0], ticket))[1:] == (False, False)

    with SteeringGroup.open("127.0.0.1:0", 1) as first, SteeringGroup.open("127.0.0.1:0", 1) as second:
        asyncio.run(main(first, second))


def test_what_is_kept_cannot_be_read_without_the_ticket() -> None:
    async def main(group: SteeringGroup) -> None:
        [worker] = group.workers
        tickets: list[Any] = []
        async with serving(worker, session_ticket_handler=tickets.append):
            await get_ticket(group.addresses[0])
            SessionTickets(worker).keep(tickets[0])
            memory = worker.store._memory[:]
            for secret in (tickets[0].ticket, tickets[0].resumption_secret):
                assert secret not in memory
                assert secret.hex().encode() not in memory
            assert SessionTickets(worker).take(tickets[0].ticket) == tickets[0]
            assert SessionTickets(worker).take(tickets[0].ticket) is None

    with SteeringGroup.open("127.0.0.1:0", 1) as group:
        asyncio.run(main(group))


def test_wrong_arguments_are_refused() -> None:
    async def main(worker: Worker) -> None:
        with pytest.raises(ValueError, match="leave the ticket callbacks out"):
            await serve(
                worker,
                configuration=server_configuration(),
                session_tickets=True,
                session_ticket_fetcher=lambda label: None,
            )
        for lifetime in (0.0, LIFETIME + 1):
            with pytest.raises(ValueError, match="lifetime is"):
                SessionTickets(worker, lifetime)

    with SteeringGroup.open("127.0.0.1:0", 1) as group:
        asyncio.run(main(group.workers[0]))
