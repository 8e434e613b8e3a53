"""Who has no connection ID of ours reaches listeners only: established connections outlive every flood."""

import asyncio
import os
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

from load import Clients, Habit
from quic import serve_echo
from service import Service, service
from steer import long_header, short_header

from quicsteer import SteeringMode, Worker

CONNECTIONS = 40
SECONDS = 3.0
"""How long a flood lasts. It comes from one process, which sends as fast as it can."""

STEADY = Habit(life=(600, 600), pause=(0.05, 0.15), port_changes=0)
ARGUMENTS = ("--workers", "2", "--receive-buffer", str(2**20))


async def echo_with_retry(worker: Worker) -> None:
    server = await serve_echo(worker, retry=50)
    await server.wait_closed()


def flood(address: tuple[str, int], make: Callable[[], bytes]) -> int:
    """Send datagrams for a while from a process of its own; return how many were sent."""
    end, report = os.pipe()
    pid = os.fork()
    if not pid:
        sent = 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(address)  # so that an ICMP answer would be an error here
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                for _ in range(50):
                    sock.send(make())
                    sent += 1
        os.write(report, str(sent).encode())
        os._exit(0)
    os.close(report)
    with os.fdopen(end) as answer:
        sent = int(answer.read())
    os.waitpid(pid, 0)
    return sent


async def under_flood(running: Service, make: Callable[[], bytes]) -> tuple[int, dict[str, Any]]:
    """Flood a service that has steady clients; return what was sent, and the group's figures after it."""
    clients = Clients(running.address, (CONNECTIONS, STEADY))
    await clients.start()
    assert clients.load.open == CONNECTIONS
    clients.load.echo_times.clear()
    before = clients.load.echoes
    sent = await asyncio.to_thread(flood, running.address, make)
    during = clients.load.echoes - before
    times = statistics.quantiles(clients.load.echo_times, n=100)
    figures: dict[str, Any] = running.command("stats")["group"]
    await clients.stop()
    print(f"{sent / SECONDS:,.0f} datagrams/s; echoes: {during / SECONDS:.0f}/s, median {times[49] * 1000:.1f} ms, ")
    print(f"99 of 100 within {times[98] * 1000:.1f} ms; {clients.load}")
    assert clients.load.lost == []
    assert clients.load.handshakes == CONNECTIONS, "no connection had to be made anew"
    assert during > CONNECTIONS
    return sent, figures


def dropped_on_established(figures: dict[str, Any], workers: int) -> int:
    return sum(slot["dropped"] for slot in figures["slots"] if slot["slot"] >= workers)


def test_a_flood_of_initials_costs_no_established_connection(steering_mode: SteeringMode) -> None:
    with service(*ARGUMENTS, "--mode", steering_mode, serve=echo_with_retry) as running:
        _, figures = asyncio.run(under_flood(running, lambda: long_header(os.urandom(8))))
        assert dropped_on_established(figures, workers=2) == 0


def test_invalid_datagrams_end_in_the_sink_all_of_them(steering_mode: SteeringMode) -> None:
    with service(*ARGUMENTS, "--mode", steering_mode, "--drop-invalid") as running:
        sent, figures = asyncio.run(under_flood(running, lambda: short_header(os.urandom(8))))
        assert figures["sink"] == sent
        assert sum(slot["dropped"] for slot in figures["slots"]) == 0
