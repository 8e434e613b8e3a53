"""Every datagram that the kernel took is read, once, and by whoever has its slot, whatever is handed over meanwhile."""

import os
import secrets
import signal
from pathlib import Path
from typing import Any

from counting import CountingWorker, Sender, read_arrivals, read_readings
from service import Service, service, stop_process

from quicsteer import SteeringMode, Worker

WORKERS = 4
BANKS = 2
HANDOVERS = 50
KEY = secrets.token_bytes(16)

# Without privileges the kernel grants small receive buffers, and a worker that waits for its CPU fills them.
RATE, BUFFER = (30_000, 16 * 2**20) if os.geteuid() == 0 else (2_000, 200_000)


def hand_over(running: Service, sender: Sender) -> None:
    """A reload; old connections go on until everybody has learnt where the new ones are."""
    sent = len(sender.expected)
    running.reload()
    sender.change_bank(running.describe()["bank"])
    running.wait_until(lambda: len(sender.expected) > sent + RATE // 20)  # some with nothing going on


def gaps(directory: Path) -> list[float]:
    """How long nobody read a listener, per handover of one; asserts that never two did."""
    found = []
    for slot in range(WORKERS):
        readings = [reading for reading in read_readings(directory) if reading.slot == slot]
        assert [reading.begins for reading in readings] == [True, False] * (len(readings) // 2)
        found += [start.time - stop.time for stop, start in zip(readings[1::2], readings[2::2], strict=False)]
    return sorted(found)


NOTHING_AMISS = {"lost": 0, "duplicated": 0, "at a wrong slot": 0}


def test_no_datagram_is_lost_doubled_or_misled_in_fifty_handovers(steering_mode: SteeringMode, tmp_path: Path) -> None:
    async def serve(worker: Worker) -> None:
        await CountingWorker(worker, tmp_path).serve()

    arguments = ("--workers", str(WORKERS), "--banks", str(BANKS), "--receive-buffer", str(BUFFER))
    with service(*arguments, "--mode", steering_mode, serve=serve, key=KEY) as running:
        sender = Sender(running.address, KEY, WORKERS, BANKS, RATE)
        sender.start()
        for _ in range(HANDOVERS):
            hand_over(running, sender)
        sender.stop()
        slots = running.command("stats")["group"]["slots"]
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert sum(slot["dropped"] for slot in slots) == 0
        assert sum(slot["swallowed"] for slot in slots) == 0
        assert running.endings() == ["ended with status 0"] * (HANDOVERS + 1) * WORKERS

    pauses = gaps(tmp_path)
    assert len(pauses) == HANDOVERS * WORKERS
    print(
        f"{len(sender.expected)} datagrams in {sender.seconds:.1f} s, {HANDOVERS} handovers; "
        f"nobody read a listener for {pauses[len(pauses) // 2]:.4f} s (median), {pauses[-1]:.4f} s at most"
    )
    assert sender.judge(read_arrivals(tmp_path)) == NOTHING_AMISS


def test_what_waits_for_a_worker_that_is_killed_is_read_by_its_successor(
    steering_mode: SteeringMode, tmp_path: Path
) -> None:
    async def serve(worker: Worker) -> None:
        await CountingWorker(worker, tmp_path).serve()

    rounds, burst = 20, 640
    arguments = ("--workers", str(WORKERS), "--banks", "1", "--mode", steering_mode)
    with service(*arguments, serve=serve, key=KEY, limits={"STEADY_AFTER": 0.0}) as running:
        sender = Sender(running.address, KEY, WORKERS, 1, RATE)
        for _ in range(rounds):
            victims = running.workers()
            for pid in victims.values():
                stop_process(pid)
            sender.burst(burst)
            assert sum(1 for _ in read_arrivals(tmp_path)) == len(sender.expected) - burst
            for pid in victims.values():
                os.kill(pid, signal.SIGKILL)
            running.wait_until(lambda: sum(1 for _ in read_arrivals(tmp_path)) >= len(sender.expected))
            running.wait_for_workers(all_serve)
        slots = running.command("stats")["group"]["slots"]
        assert sum(slot["dropped"] for slot in slots) == 0
        assert running.describe()["restarts"] == rounds * WORKERS
        sender.stop()

    assert sender.judge(read_arrivals(tmp_path)) == NOTHING_AMISS


def all_serve(workers: list[dict[str, Any]]) -> bool:
    return [worker["state"] for worker in workers] == ["serving"] * WORKERS
