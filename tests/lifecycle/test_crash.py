"""A worker that dies or hangs hurts its own connections and nobody else's, and is replaced."""

import asyncio
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from counting import Sender
from load import SHORT, Clients
from quic import TIMEOUT, connected, serve_h3
from service import Service, echo, program, service, stop_process

from quicsteer import ConnectionIds, SteeringMode, Worker
from quicsteer.cid import GroupKeys, Identity

WORKERS = 4
KILLS = 50
KEY = secrets.token_bytes(16)
IDS = ConnectionIds(GroupKeys.from_key(KEY), Identity(WORKERS, 3 * WORKERS, 8, 0))
KILLED = "was ended by SIGKILL"

AT_ONCE = {"STEADY_AFTER": 0.0}
"""Restarts without delay: to these tests a worker that was killed is not one that keeps dying."""


def wait_for_successor(running: Service, index: int, victim: int) -> int:
    return running.wait_until(lambda: running.workers("serving").get(index, victim) ^ victim) ^ victim


@pytest.mark.timeout(300)
def test_fifty_kills_under_load_hurt_nobody_else(steering_mode: SteeringMode) -> None:
    """Clients of the killed worker are left out: only a stateless reset tells them, which aioquic's client ignores."""
    delays = []

    async def main(running: Service) -> None:
        dice = random.Random(1)
        group = Clients(running.address, (60, SHORT), slot_of=IDS.slot_of)
        await group.start()
        for _ in range(KILLS):
            index = dice.randrange(WORKERS)
            victim = (await asyncio.to_thread(running.workers))[index]
            start = time.monotonic()
            os.kill(victim, signal.SIGKILL)
            group.kill_slot(WORKERS + index, start)
            await asyncio.to_thread(wait_for_successor, running, index, victim)
            delays.append(time.monotonic() - start)
            group.release_victims()
            echoes = group.load.echoes
            while group.load.echoes < echoes + 40:
                await asyncio.sleep(0.01)
        await group.stop()
        delays.sort()
        print(f"{group.load}; serving again after {delays[KILLS // 2]:.3f} s (median), {delays[-1]:.3f} s at most")
        assert group.load.lost == []
        assert group.load.failed_handshakes == []
        assert group.load.victims > KILLS

    arguments = ("--workers", str(WORKERS), "--mode", steering_mode, "--receive-buffer", str(4 * 2**20))
    with service(*arguments, key=KEY, limits=AT_ONCE) as running:
        descriptors = running.descriptors()
        asyncio.run(main(running))
        assert running.endings() == [KILLED] * KILLS
        assert running.command("stats")["group"]["dropped"] == 0
        assert running.describe()["restarts"] == KILLS
        assert len(running.children()) == WORKERS
        running.wait_until(lambda: running.descriptors() == descriptors)


def test_a_slot_is_read_again_only_after_its_reader_is_dead() -> None:
    with service("--workers", "2", limits=AT_ONCE) as running:
        for _ in range(10):
            victim = running.workers()[1]
            os.kill(victim, signal.SIGKILL)
            wait_for_successor(running, 1, victim)
        lives = re.findall(r"worker 1 .* (started|was ended by SIGKILL)", running.log)
        assert lives == ["started", KILLED] * 10 + ["started"]


def test_a_worker_that_keeps_dying_is_started_less_and_less_often(tmp_path: Path) -> None:
    broken = tmp_path / "broken"

    async def serve(worker: Worker) -> None:
        if broken.exists() and worker.index == 0:
            os._exit(1)
        await echo(worker)

    with service("--workers", "2", serve=serve, limits={"BACKOFF_MAX": 0.4}) as running:
        other = running.workers()[1]
        broken.touch()
        os.kill(running.workers()[0], signal.SIGKILL)
        delays = running.wait_for_log(r"worker 0 died (\d+) times in a row: next start in ([\d.]+) s", times=5)
        broken.unlink()
        assert delays[:5] == [("2", "0.1"), ("3", "0.2"), ("4", "0.4"), ("5", "0.4"), ("6", "0.4")]
        running.wait_until(lambda: 0 in running.workers("serving"))
        assert running.workers("serving")[1] == other


def test_a_worker_that_cannot_be_started_for_now_is_started_later(tmp_path: Path) -> None:
    """Even when there is no process whose end would ask for another attempt."""
    command = tmp_path / "command"
    shutil.copy("/bin/sleep", command)

    with program("--workers", "1", "--mute-after", "0.5", command_line=[str(command), "1000"]) as running:
        away = command.rename(tmp_path / "away")
        os.kill(running.workers()[0], signal.SIGKILL)
        running.wait_for_log(r"worker 0 could not be started: execve: No such file or directory", times=2)
        away.rename(command)
        running.wait_until(running.workers)
        running.kill(signal.SIGTERM)
        assert running.wait() == 0


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["false"], r"worker \d \(pid \d+, bank 0\) ended with status 1 before it was ready"),
        (["sh", "-c", "kill -SEGV $$"], r"worker \d \(pid \d+, bank 0\) was ended by SIGSEGV before it was ready"),
        (["/nonexistent/server"], r"worker 0 could not be started: execve: No such file or directory"),
    ],
    ids=["ends", "crashes", "is not there"],
)
def test_workers_that_cannot_start_end_the_service(command: list[str], reason: str) -> None:
    with program("--workers", "2", command_line=command, wait=False) as running:
        assert running.wait() == 3
        assert re.search(f"the workers cannot start: {reason}", running.log)
        assert "Traceback" not in running.log
        assert not running.control.exists()
        assert not running.manager.said("READY=1")


def test_workers_that_do_not_get_ready_end_the_service() -> None:
    async def serve(worker: Worker) -> None:
        await asyncio.Event().wait()

    with service("--workers", "2", "--ready-timeout", "0.5", serve=serve, wait=False) as running:
        assert running.wait() == 3
        assert re.search(
            r"the workers cannot start: worker \d .* was not ready after 0.5 s and was killed", running.log
        )
        assert running.endings() == [KILLED] * 2


def test_workers_outlive_their_supervisor(steering_mode: SteeringMode) -> None:
    """And a new start is told who has the address, until they are gone."""

    async def main(running: Service, address: tuple[str, int]) -> None:
        async with connected(address) as before:
            await before.exchange()
            running.remember_children()
            running.kill(signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL
            await before.change_port()
            await before.exchange()
            async with connected(address) as after:
                await after.exchange()

    arguments = ("--workers", "2", "--mode", steering_mode)
    with program(*arguments) as running:
        host, port = running.address
        workers = running.workers()
        asyncio.run(main(running, (host, port)))
        again = ("--bind", f"{host}:{port}", *arguments)
        with program(*again, wait=False) as second:
            assert second.wait() == 2
            [holders] = re.findall(r"bind\(.*\): Address already in use.* held by (.*)", second.log)
            assert all(str(pid) in holders for pid in workers.values())
        pidfds = [os.pidfd_open(pid) for pid in workers.values()]
        for pid in workers.values():
            os.kill(pid, signal.SIGTERM)
        wait_for_exits(pidfds)
        with program(*again) as third:
            assert third.address == (host, port)


def wait_for_exits(pidfds: list[int]) -> None:
    import select

    for pidfd in pidfds:
        assert select.select([pidfd], [], [], TIMEOUT)[0]
        os.close(pidfd)


def test_a_successor_tells_clients_of_the_dead_by_stateless_reset(steering_mode: SteeringMode) -> None:
    """gtlsclient would wait for a minute, and says what ended it."""
    if shutil.which("gtlsclient") is None:
        pytest.skip("gtlsclient is not installed (Debian: ngtcp2-client)")

    async def serve(worker: Worker) -> None:
        server = await serve_h3(worker)
        await server.wait_closed()

    with service("--workers", "1", "--mode", steering_mode, serve=serve, limits=AT_ONCE) as running:
        host, port = running.address
        options = ["--no-quic-dump", "--exit-on-all-streams-close", "--timeout=60s", "--delay-stream=1s"]
        command = ["gtlsclient", *options, host, str(port), f"https://localhost:{port}/"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as client:
            assert client.stdout is not None
            try:
                before = []
                for line in client.stdout:
                    before.append(line)
                    if "HANDSHAKE_DONE" in line:
                        break
                start = time.monotonic()
                os.kill(running.workers()[0], signal.SIGKILL)
                rest, _ = client.communicate(timeout=2 * TIMEOUT)
                print(f"the client ended {time.monotonic() - start:.2f} s after the SIGKILL")
            finally:
                client.kill()
        assert "SR token=" in rest, "".join(before) + rest
        assert "ERR_DRAINING" in rest


def hang(running: Service, sender: Sender) -> tuple[int, int]:
    """Stop a worker and let datagrams wait for it; return its index and pid."""
    index, victim = next(iter(running.workers().items()))
    stop_process(victim)
    sender.burst(64)
    running.wait_for_log(rf"worker {index} .* has not answered for \d+ s, \d+ bytes wait")
    return index, victim


def test_a_hung_worker_is_reported(steering_mode: SteeringMode) -> None:
    arguments = ("--workers", "2", "--hung-after", "2", "--mode", steering_mode)
    with service(*arguments, key=KEY) as running:
        sender = Sender(running.address, KEY, 2, 2, 1)
        index, victim = hang(running, sender)
        hung = {worker["index"]: worker["hung"] for worker in running.describe()["workers"]}
        assert hung == {index: True, 1 - index: False}
        assert "bytes wait: left alone" in running.log
        assert "1 hung" in running.manager.said("STATUS=")[-1]
        os.kill(victim, signal.SIGCONT)
        running.wait_for_workers(lambda workers: not any(worker["hung"] for worker in workers))
        assert running.workers()[index] == victim
        running.wait_until(lambda: "hung" not in running.manager.said("STATUS=")[-1])


def test_a_hung_worker_is_replaced_if_the_operator_wants_that(steering_mode: SteeringMode) -> None:
    async def main(running: Service) -> None:
        async with connected(running.address) as client:
            await client.exchange()

    arguments = ("--workers", "2", "--hung-after", "2", "--kill-hung", "--mode", steering_mode)
    with service(*arguments, key=KEY) as running:
        index, victim = hang(running, Sender(running.address, KEY, 2, 2, 1))
        wait_for_successor(running, index, victim)
        assert running.ending(victim) == KILLED
        for _ in range(8):
            asyncio.run(main(running))


def test_an_idle_worker_that_does_not_answer_is_left_alone() -> None:
    """Nothing waits for it: a process that was stopped on purpose, or a machine that slept, is no reason to kill."""
    with service("--workers", "2", "--hung-after", "1", "--kill-hung") as running:
        index, victim = next(iter(running.workers().items()))
        stop_process(victim)
        other = 1 - index
        start = running.describe()["workers"][other]["seconds"]
        running.wait_for_workers(lambda workers: workers[other]["seconds"] > start + 3)
        assert running.workers()[index] == victim
        os.kill(victim, signal.SIGCONT)


def test_a_worker_that_dies_while_it_drains_is_not_replaced(steering_mode: SteeringMode) -> None:
    async def main(running: Service) -> None:
        async with connected(running.address) as client:
            await client.exchange()
            await asyncio.to_thread(running.reload)
            [old] = running.workers("draining").values()
            os.kill(old, signal.SIGKILL)
            await asyncio.to_thread(running.wait_for_workers, lambda workers: len(workers) == 1)
            await asyncio.to_thread(running.reload)
            async with connected(running.address) as newcomer:
                await newcomer.exchange()

    with service("--workers", "1", "--mode", steering_mode) as running:
        asyncio.run(main(running))
        running.wait_for_workers(lambda workers: len(workers) == 1)
        assert running.describe()["restarts"] == 0
        assert Counter(running.endings()) == {KILLED: 1, "ended with status 0": 1}
