"""A server on a steered group that issues connection IDs of its own: its operator is told within seconds."""

import asyncio
import contextlib
import random
import socket
import time
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

from aioquic.asyncio.server import QuicServer
from quic import TIMEOUT, Address, Client, connected, echo_from, processes, server_configuration, short_header
from service import service

from quicsteer import ForeignConnectionIdWarning, SteeringGroup, SteeringMode, Worker

WORKERS = 4
SECONDS = 15.0
"""How soon the warning must come."""

CLIENTS = 20


async def serve_foreign(worker: Worker) -> Any:
    """aioquic's own server on the sockets of a worker: it knows nothing of the group's connection IDs."""
    server = QuicServer(configuration=server_configuration(), stream_handler=echo_from(worker.index))
    for sock in worker.sockets:
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, sock=sock)
    return server


async def serve_foreign_for_ever(worker: Worker) -> None:
    await serve_foreign(worker)
    worker.ready()
    await asyncio.Event().wait()


async def try_until(stopped: asyncio.Event, address: Address) -> None:
    """Be a client that comes again and again, whatever happens to it."""
    while not stopped.is_set():
        client = Client()
        try:
            async with asyncio.timeout(0.5):
                await client.connect(address)
                await client.exchange()
        except (TimeoutError, ConnectionError):
            continue
        finally:
            client.protocol.close()
            client.drop()


@contextlib.asynccontextmanager
async def clients(address: Address) -> AsyncIterator[None]:
    stopped = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(CLIENTS):
            tasks.create_task(try_until(stopped, address))
        try:
            yield
        finally:
            stopped.set()


async def watch(group: SteeringGroup, seconds: float, done: Callable[[], bool]) -> float:
    """Read the figures every 100 ms, until something is true or the time is over; return how long it took."""
    start = time.monotonic()
    while not done() and time.monotonic() - start < seconds:
        group.stats()
        await asyncio.sleep(0.1)
    return time.monotonic() - start


def test_it_is_said_within_seconds(steering_mode: SteeringMode) -> None:
    """Mode ``cbpf`` sees it by the sink."""

    async def main(group: SteeringGroup, said: list[warnings.WarningMessage]) -> None:
        async with clients(group.addresses[0]):
            assert await watch(group, SECONDS, lambda: bool(said)) < SECONDS
            await watch(group, 0.5, lambda: False)
        assert [each.category for each in said] == [ForeignConnectionIdWarning]
        assert "worker.connection_ids.issue()" in str(said[0].message)
        assert said[0].filename == __file__

    with (
        SteeringGroup.open("127.0.0.1:0", WORKERS, mode=steering_mode, drop_invalid=True) as group,
        processes(group, serve_foreign),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        asyncio.run(main(group, said))


def test_the_supervisor_says_it(ebpf: SteeringMode) -> None:
    async def main(address: Address) -> None:
        async with clients(address):
            await asyncio.to_thread(running.wait_for_log, "does the server issue connection IDs of its own")

    with service("--workers", "4", "--mode", ebpf, serve=serve_foreign_for_ever) as running:
        asyncio.run(main(running.address))
        assert running.log.count("does the server issue") == 1


def test_a_flood_of_junk_is_not_taken_for_it(ebpf: SteeringMode) -> None:
    """Nor are clients of an earlier process, which look the same."""
    noise = random.Random(1)

    async def flood(address: Address) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            while True:
                for _ in range(20):
                    sock.sendto(short_header(noise.randbytes(8)), address)
                await asyncio.sleep(0.01)

    async def main(group: SteeringGroup, said: list[warnings.WarningMessage]) -> None:
        [address] = group.addresses
        task = asyncio.create_task(flood(address))
        visits = 0
        async with asyncio.timeout(TIMEOUT):
            while visits < 40:
                async with connected(address) as client:
                    await client.exchange()
                visits += 1
                group.stats()
        task.cancel()
        assert said == []

    with (
        SteeringGroup.open("127.0.0.1:0", WORKERS, mode=ebpf) as group,
        processes(group),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        asyncio.run(main(group, said))
