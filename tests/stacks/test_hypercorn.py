"""``quicsteer hypercorn``: one application over TCP and HTTP/3, by steered workers."""

import asyncio
import functools
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from http3 import H3Client, http3_configuration
from hypercorn_service import HypercornService, hypercorn
from quic import IDENTITY, TIMEOUT

from quicsteer import SteeringMode

CLIENTS = 25
REQUESTS = 21
AT_ONCE = 10
GOAWAY = b"\x07\x08\xff\xff\xff\xff\xff\xff\xff\xfc"
"""RFC 9114, 7.2.6, with the highest identifier: no request is refused."""

Change = Callable[[H3Client], Awaitable[None]]


async def stay(client: H3Client) -> None:
    """Change nothing."""


async def visit(address: tuple[str, int], change: Change, gate: asyncio.Semaphore) -> set[int]:
    """Send requests over one connection that changes between them; return the processes that answered."""
    async with gate:
        client = H3Client()
        try:
            await client.connect(address)
            answered_by = set()
            for number in range(REQUESTS):
                answer = await client.get()
                assert (answer["http"], answer["state"]) == ("3", True)
                answered_by.add(answer["pid"])
                if number % 5 == 4:
                    await change(client)
            return answered_by
        finally:
            client.protocol.close()
            client.drop()


async def visit_all(address: tuple[str, int], change: Change) -> list[set[int]]:
    gate = asyncio.Semaphore(AT_ONCE)
    return await asyncio.gather(*(visit(address, change, gate) for _ in range(CLIENTS)))


def https(running: HypercornService, path: str = "/") -> Any:
    """Ask over TCP."""
    host, port = running.quic_address
    context = ssl.create_default_context(cadata=IDENTITY.pem.decode())
    context.check_hostname = False
    return urllib.request.urlopen(f"https://{host}:{port}{path}", timeout=TIMEOUT, context=context)


@pytest.mark.parametrize("worker_class", ["asyncio", "uvloop"])
def test_every_connection_stays_with_its_worker(steering_mode: SteeringMode, worker_class: str) -> None:
    with hypercorn("--mode", steering_mode, "--worker-class", worker_class) as running:
        workers = set(running.workers("serving").values())
        assert len(workers) == 4
        for change in (stay, H3Client.change_port, H3Client.migrate):
            answered_by = asyncio.run(visit_all(running.quic_address, change))
            assert [len(each) for each in answered_by] == [1] * CLIENTS
            assert len(set.union(*answered_by)) > 1
            assert set.union(*answered_by) <= workers
        shown = running.command("stats")
        assert shown["group"]["dropped"] == 0
        assert sum(figures["opened"] for figures in shown["quic"]) == 3 * CLIENTS


def test_http_1_and_2_are_served_on_the_same_port_and_advertise_http_3() -> None:
    with hypercorn() as running:
        with https(running) as answer:
            assert json.load(answer)["pid"] in running.workers("serving").values()
            assert answer.headers["alt-svc"] == f'h3=":{running.quic_address[1]}"; ma=3600'
            assert answer.headers["server"] == "hypercorn-h11"
        url = "https://{}:{}/".format(*running.quic_address)
        curl = subprocess.run(["curl", "-sk", "--http2", url], capture_output=True, check=True, timeout=TIMEOUT)
        assert json.loads(curl.stdout)["http"] == "2"


def test_a_large_upload_and_download_lose_no_datagram_in_user_space() -> None:
    size = 8 * 1024 * 1024

    async def main(address: tuple[str, int]) -> None:
        client = H3Client()
        await client.connect(address)
        assert (await client.get("/", b"x" * size, timeout=60))["received"] == size
        assert len(await client.fetch(f"/download?{size}", timeout=60)) == size
        client.drop()

    with hypercorn(workers=1) as running:
        asyncio.run(main(running.quic_address))
        assert "does not read" not in running.log


def test_an_application_that_does_not_read_slows_its_client_down_and_nobody_else() -> None:
    """What it has not read is bounded, and its client sends the rest again when it reads."""
    size = 10 * 1024 * 1024

    async def main(address: tuple[str, int]) -> None:
        client, other = H3Client(), H3Client()
        await client.connect(address)
        await other.connect(address)
        stalled = client.h3.answers[client.send_request("/slow?3", b"x" * size)]
        while not stalled.done():
            await other.get()
        assert json.loads(stalled.result())["received"] == size
        for each in (client, other):
            each.drop()

    with hypercorn(workers=1) as running:
        asyncio.run(main(running.quic_address))
        assert running.log.count("the application does not read") == 1


def test_an_application_sees_the_address_that_its_client_has_now() -> None:
    async def main(address: tuple[str, int]) -> None:
        client = H3Client()
        await client.connect(address)
        for _ in range(3):
            assert client.transport
            own = client.transport.get_extra_info("sockname")
            assert (await client.get())["client"] == list(own)
            await client.change_port()
        client.drop()

    with hypercorn(workers=1) as running:
        asyncio.run(main(running.quic_address))


def test_an_answer_may_end_before_its_request() -> None:
    async def main(address: tuple[str, int]) -> None:
        client = H3Client()
        await client.connect(address)
        await client.get("/ignore", b"x" * 500_000)
        assert (await client.get())["http"] == "3"
        client.drop()

    with hypercorn(workers=1) as running:
        asyncio.run(main(running.quic_address))
        assert "Traceback" not in running.log


async def wait_for_abandoned(client: H3Client, count: int) -> None:
    """Ask the application until it has heard of so many clients that gave up."""
    async with asyncio.timeout(TIMEOUT):
        while (await client.get())["abandoned"] != count:
            pass


def test_an_application_hears_of_clients_that_give_up() -> None:
    async def main(address: tuple[str, int]) -> None:
        client = H3Client()
        await client.connect(address)
        stream = client.send_request("/wait")
        await client.get()
        client.connection.reset_stream(stream, 0x10C)  # H3_REQUEST_CANCELLED
        client.connection.stop_stream(stream, 0x10C)
        client.protocol.transmit()
        await wait_for_abandoned(client, 1)
        client.send_request("/wait")
        await client.get()
        await client.close()
        other = H3Client()
        await other.connect(address)
        await wait_for_abandoned(other, 2)
        other.drop()

    with hypercorn(workers=1) as running:
        asyncio.run(main(running.quic_address))
        assert "Traceback" not in running.log


class Load:
    """Clients that come, send requests with pauses, and go, until they are stopped; what failed is remembered."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self._stopped = threading.Event()
        self._going = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.requests = 0
        self.failed: list[BaseException] = []

    def have_done(self, requests: int) -> bool:
        return self.requests > requests

    async def _run(self) -> None:
        await asyncio.gather(*(self._come_again() for _ in range(12)))

    async def _come_again(self) -> None:
        while not self._stopped.is_set():
            client = H3Client()
            try:
                await client.connect(self._address)
                for number in range(8):
                    await client.get()
                    self.requests += 1
                    self._going.set()
                    if number % 3 == 2:
                        await client.change_port()
                    await asyncio.sleep(0.05)  # the client's pace
            except (OSError, TimeoutError, ConnectionError) as error:
                self.failed.append(error)
            finally:
                client.protocol.close()
                client.drop()


@contextmanager
def load(running: HypercornService) -> Iterator[Load]:
    clients = Load(running.quic_address)
    clients._thread.start()
    try:
        assert clients._going.wait(TIMEOUT)
        yield clients
    finally:
        clients._stopped.set()
        clients._thread.join()


def test_five_reloads_under_load_fail_no_request(steering_mode: SteeringMode) -> None:
    with hypercorn("--mode", steering_mode, "--banks", "3", workers=2) as running:
        with load(running) as clients:
            for _ in range(5):
                before = clients.requests
                running.reload()
                with https(running) as answer:
                    assert json.load(answer)["pid"] in running.workers("serving").values()
                running.wait_until(functools.partial(clients.have_done, before + 20))
        assert clients.failed == []
        running.wait_for_workers(lambda workers: len(workers) == 2)
        assert running.endings() == ["ended with status 0"] * 10
        assert running.count_shutdowns() == 10
        assert "Traceback" not in running.log


@pytest.mark.parametrize("worker_class", ["asyncio", "uvloop"])
def test_reloads_fail_no_request_over_tcp(worker_class: str) -> None:
    stopped = threading.Event()
    answers: list[int] = []

    def ask() -> None:
        while not stopped.is_set():
            with https(running) as answer:
                answers.append(json.load(answer)["pid"])

    with hypercorn("--worker-class", worker_class, "--banks", "3", workers=2) as running, ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        try:
            for _ in range(3):
                before = len(answers)
                running.reload()
                running.wait_until(lambda: len(answers) > before + 20 or any(each.done() for each in asking))  # noqa: B023
        finally:
            stopped.set()
        for each in asking:
            each.result()
        assert len(set(answers)) > 2


def test_a_request_that_runs_is_answered_before_its_worker_ends() -> None:
    async def main(running: HypercornService) -> None:
        client = H3Client()
        await client.connect(running.quic_address)
        before = (await client.get())["pid"]
        slow = client.h3.answers[client.send_request("/slow?2")]
        await client.get()
        await asyncio.to_thread(running.reload)
        assert json.loads(await asyncio.wait_for(slow, TIMEOUT))["pid"] == before
        assert running.count_shutdowns() == 0
        await client.close()
        await asyncio.to_thread(running.wait_until, running.count_shutdowns)

    with hypercorn(workers=1) as running:
        asyncio.run(main(running))


def test_clients_are_asked_to_go_when_their_worker_ends() -> None:
    async def main(running: HypercornService) -> None:
        client = H3Client()
        await client.connect(running.quic_address)
        await client.get()
        assert not client.h3.control.endswith(GOAWAY)
        await asyncio.to_thread(running.reload)
        async with asyncio.timeout(TIMEOUT):
            while not client.h3.control.endswith(GOAWAY):
                await client.get()  # it is served nevertheless
        await client.close()

    with hypercorn(workers=1) as running:
        asyncio.run(main(running))


def test_a_worker_that_dies_is_replaced() -> None:
    async def main(running: HypercornService) -> None:
        client = H3Client()
        await client.connect(running.quic_address)
        victim = (await client.get())["pid"]
        os.kill(victim, signal.SIGKILL)
        await asyncio.to_thread(running.wait_for_log, "was ended by SIGKILL")
        again = H3Client()
        await again.connect(running.quic_address)
        assert (await again.get())["pid"] != victim
        again.drop()
        client.drop()

    with hypercorn(workers=1) as running:
        asyncio.run(main(running))


def test_a_supervisor_is_replaced_with_its_tcp_listeners() -> None:
    with hypercorn(workers=1) as running:
        ready = len(running.manager.messages)
        running.kill(signal.SIGUSR2)
        running.manager.wait_for("READY=1", ready)
        assert running.describe()["pid"] == running.pid
        running.reload()
        with https(running) as answer:
            assert json.load(answer)["pid"] in running.workers("serving").values()
        assert len(running.workers("serving")) == 1


def test_a_service_ends_in_order() -> None:
    with hypercorn(workers=2) as running:
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert running.count_shutdowns() == 2


def without(pid: int, workers: list[dict[str, Any]]) -> bool:
    return pid not in [worker["pid"] for worker in workers]


def test_a_worker_that_has_served_enough_is_replaced() -> None:
    async def main(running: HypercornService) -> None:
        for _ in range(2):
            client = H3Client()
            await client.connect(running.quic_address)
            first = (await client.get())["pid"]
            for _ in range(3):
                await client.get()
            await asyncio.wait_for(client.protocol.wait_closed(), TIMEOUT)
            client.drop()
            await asyncio.to_thread(running.wait_for_workers, functools.partial(without, first))

    with hypercorn("--max-requests", "3", "--graceful-timeout", "1", workers=1) as running:
        asyncio.run(main(running))


def test_sixty_of_sixty_sessions_are_resumed_with_early_data(steering_mode: SteeringMode) -> None:
    async def resume(address: tuple[str, int], gate: asyncio.Semaphore) -> tuple[int, int]:
        async with gate:
            tickets: list[Any] = []
            first = H3Client(session_ticket_handler=tickets.append)
            await first.connect(address)
            one = (await first.get())["pid"]
            await first.close()
            second = H3Client(http3_configuration(session_ticket=tickets.pop()))
            await second.start(address, transmit=False)
            two = (await second.get())["pid"]
            assert second.protocol.handshake
            assert second.protocol.handshake.session_resumed
            assert second.protocol.handshake.early_data_accepted
            second.drop()
            return one, two

    async def main(address: tuple[str, int]) -> list[tuple[int, int]]:
        gate = asyncio.Semaphore(AT_ONCE)
        return await asyncio.gather(*(resume(address, gate) for _ in range(60)))

    with hypercorn("--mode", steering_mode) as running:
        pairs = asyncio.run(main(running.quic_address))
        assert len(pairs) == 60
        assert any(one != two for one, two in pairs)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--worker-class", "trio"], "asyncio and uvloop"),
        (["--workers", "0"], "it must be 1 or more"),
        (["--quic-bind", "fd://3"], "names a host and a port"),
    ],
)
def test_what_cannot_be_served_is_refused(arguments: list[str], says: str) -> None:
    with hypercorn(*arguments, wait=False) as running:
        assert running.wait() == 2
        assert says in running.log


def test_without_a_certificate_there_is_no_http_3() -> None:
    command = [sys.executable, "-m", "quicsteer", "hypercorn", "app:app"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd="/")
    assert ended.returncode == 2
    assert "--certfile" in ended.stderr


def test_the_help_has_the_options_of_both() -> None:
    command = [sys.executable, "-m", "quicsteer.hypercorn", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd="/")
    assert "--drain-timeout" in ended.stdout
    assert "--access-logfile" in ended.stdout


def test_an_application_that_does_not_start_ends_the_service() -> None:
    with hypercorn(application="nowhere:app", wait=False) as running:
        assert running.wait() == 3
        assert "nowhere" in running.log
