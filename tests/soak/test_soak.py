"""A service under load to which everything happens: each datagram is accounted for, and nothing grows.

``make soak`` runs it for as long as you like.
"""

import os
import random
import re
import secrets
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from endurance import seconds
from ledger import Ledger, LedgerWorker, Source, judge
from service import Service, service, stop_process

from quicsteer import QuicSteerError, SteeringMode, Worker
from quicsteer.abi import CID_LENGTH_DEFAULT
from quicsteer.decision import Rules

SECONDS = seconds("SOAK", 60) / 2  # in each of two modes
WORKERS, BANKS = 3, 3
RATE = 3000
ROOM = int((SECONDS + 60) * 3 * RATE) + 100_000
KEY = secrets.token_bytes(16)
RULES = Rules(KEY, CID_LENGTH_DEFAULT, WORKERS, WORKERS * (1 + BANKS), drop_invalid=True)
GROWTH = 8 << 20
"""Bytes that a supervisor may take more at the end: its tables are full after a while, and then it takes no more."""

SPARE_TIME = 120


class Soak:
    """What is done to the service, one thing after another."""

    def __init__(self, running: Service, ledger: Ledger, source: random.Random) -> None:
        self._running = running
        self._ledger = ledger
        self._random = source
        self._workers = WORKERS
        self.done: Counter[str] = Counter()

    def run(self, end: float) -> None:
        actions: list[Callable[[], None]] = [self.kill, self.kill, self.pause, self.reload, self.reload_fewer]
        while time.monotonic() < end:
            action = self._random.choice(actions)
            action()
            self.done[action.__name__] += 1
        self.reload()

    def kill(self) -> None:
        """Kill a worker while it reads."""
        pid = self._any_worker()
        os.kill(pid, signal.SIGKILL)
        self._running.wait_until(lambda: pid not in self._running.workers().values())
        self._settle()

    def pause(self) -> None:
        """Let a worker's queues run over."""
        pid = self._any_worker()
        stop_process(pid)
        before = self._dropped()
        self._running.wait_until(lambda: self._dropped() > before)
        os.kill(pid, signal.SIGCONT)

    def reload(self, workers: int = WORKERS) -> None:
        """Replace all workers, by so many; their clients learn of it a little later."""
        self._running.reload(workers)
        self._workers = workers
        self._settle()
        self._ledger.orders[0] = self._running.describe()["bank"]

    def reload_fewer(self) -> None:
        self.reload(self._random.randint(1, WORKERS))

    def _dropped(self) -> int:
        return int(self._running.command("stats")["group"]["dropped"])

    def _any_worker(self) -> int:
        return self._random.choice(list(self._running.workers("serving").values()))

    def _settle(self) -> None:
        """Wait until as many workers serve as should, and all others have ended."""
        self._running.wait_for_workers(
            lambda workers: [worker["state"] for worker in workers] == ["serving"] * self._workers
        )


class Readers:
    """Threads that ask for the figures all the time, and see to it that no counter ever goes back."""

    def __init__(self, running: Service, count: int) -> None:
        self._running = running
        self._end = threading.Event()
        self.asked = 0
        self.faults: list[str] = []
        self._threads = [threading.Thread(target=self._read) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        before: dict[Any, int] = {}
        while not self._end.is_set():
            try:
                group = self._running.command("stats")["group"]
            except QuicSteerError as error:
                self.faults.append(str(error))
                return
            self.asked += 1
            for slot in group["slots"]:
                for name in ("dropped", "swallowed"):
                    key = slot["slot"], name
                    if slot[name] < before.get(key, 0):
                        self.faults.append(f"{key} went from {before[key]} to {slot[name]}")
                    before[key] = slot[name]

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()


def memory_of(pid: int) -> int:
    """Bytes that a process has to itself."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) << 10 for size in re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.M))


def start_source(address: tuple[str, int], ledger: Ledger, report: int) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            os.write(report, str(Source(address, ledger, RULES, RATE).run()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(report)
    return child


@pytest.mark.timeout(SECONDS + SPARE_TIME)
def test_every_datagram_is_accounted_for_and_nothing_grows(steering_mode: SteeringMode, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, ROOM)
    seed = secrets.randbits(32)
    print(f"seed {seed}")

    async def serve(worker: Worker) -> None:
        await LedgerWorker(worker, ledger, WORKERS).serve()

    arguments = ("--workers", str(WORKERS), "--banks", str(BANKS), "--drop-invalid", "--mode", steering_mode)
    with service(*arguments, serve=serve, key=KEY, limits={"STEADY_AFTER": 0.0}) as running:
        results, report = os.pipe()
        source = start_source(running.address, ledger, report)
        soak = Soak(running, ledger, random.Random(seed))
        soak.run(time.monotonic() + SECONDS / 5)
        descriptors, memory = running.descriptors(), memory_of(running.pid)
        readers = Readers(running, 2)
        soak.run(time.monotonic() + SECONDS * 4 / 5)
        readers.stop()
        ledger.orders[1] = 1
        assert os.waitpid(source, 0)[1] == 0
        sent = int(os.read(results, 32))
        os.close(results)
        group = running.wait_until(partial(settled, running))
        grown = memory_of(running.pid) - memory
        running.wait_until(lambda: running.descriptors() == descriptors)
        assert len(running.children()) == WORKERS
        assert "Exception in" not in running.log
        losses = {name: sum(slot[name] for slot in group["slots"]) for name in ("dropped", "swallowed")}
        account = judge(ledger, sent)
    print(f"{account}, {losses}, sink {group['sink']}, {dict(soak.done)}, {readers.asked} readings, {grown} bytes more")
    assert (account.doubled, account.misled, readers.faults) == (0, 0, [])
    assert account.lost_in_hand <= soak.done["kill"]
    assert sent == account.read + sum(losses.values()) + group["sink"] + account.lost_in_hand
    assert grown < GROWTH


def settled(running: Service) -> Any:
    """The group's figures, when nothing waits any more and every bank but one is parked."""
    group = running.command("stats")["group"]
    waiting = any(slot["queued_bytes"] for slot in group["slots"])
    return None if waiting or len(running.workers()) != WORKERS else group
