"""A service on several addresses: what holds for one holds for each, over IPv4 and IPv6."""

import asyncio
import contextlib
import os
import signal

from quic import Client
from service import Service, service

from quicsteer import SteeringMode

WORKERS = 3
CLIENTS = 12
"""On each address."""


async def open_clients(stack: contextlib.AsyncExitStack, running: Service) -> dict[Client, int]:
    """Open connections to all addresses; return which worker has each."""
    clients = {}
    for host, port in running.describe()["addresses"]:
        for _ in range(CLIENTS):
            client = Client()
            await client.connect((host, port))
            stack.callback(client.drop)
            clients[client] = await client.exchange()
    return clients


async def check(clients: dict[Client, int]) -> None:
    """Have each go on from another port, under another connection ID, with the same worker."""
    for client, worker in clients.items():
        await client.migrate()
        assert await client.exchange() == worker


def test_connections_on_every_address_live_through_reloads_and_crashes(steering_mode: SteeringMode) -> None:
    async def main(running: Service) -> None:
        assert [":" in host for host, _ in running.describe()["addresses"]] == [False, True, False]
        async with contextlib.AsyncExitStack() as stack:
            old = await open_clients(stack, running)
            assert set(old.values()) == set(range(WORKERS))
            await asyncio.to_thread(running.reload)
            new = await open_clients(stack, running)
            await check(old)
            victim = running.workers("serving")[0]
            os.kill(victim, signal.SIGKILL)
            await asyncio.to_thread(
                running.wait_until, lambda: running.workers("serving").get(0, victim) not in {victim, None}
            )
            await check(old)
            await check({client: worker for client, worker in new.items() if worker})
            await check(await open_clients(stack, running))

    binds = ("--bind", "[::1]:0", "--bind", "127.0.0.2:0")  # besides 127.0.0.1
    with service("--workers", str(WORKERS), "--mode", steering_mode, *binds) as running:
        asyncio.run(main(running))
        assert running.command("stats")["group"]["dropped"] == 0
