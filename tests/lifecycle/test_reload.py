"""A reload replaces all workers: no connection is lost, no handshake fails, and what goes wrong changes nothing."""

import asyncio
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from load import LONG, SHORT, STATIONARY, clients
from privileges import NOBODY
from quic import TIMEOUT, Client, connected
from service import Service, Work, echo, service

from quicsteer import SteeringMode, Worker
from quicsteer.errors import QuicSteerError

RELOADS = 20
WORKERS = 4
OLD = "ended with status 0"
KILLED = "was ended by SIGKILL"

BUFFERS = ("--receive-buffer", str(4 * 2**20))
"""Room for all that waits for a worker that waits for its CPU; without privileges the kernel may give less."""


async def reload(running: Service, workers: int | None = None) -> None:
    await asyncio.to_thread(running.reload, workers)


def serving(running: Service) -> dict[int, int]:
    return running.workers("serving")


@pytest.mark.timeout(300)
def test_twenty_reloads_under_load_lose_no_connection(steering_mode: SteeringMode) -> None:
    """In mode cbpf the service has no privileges at all."""
    unprivileged = steering_mode is SteeringMode.CBPF and os.geteuid() == 0

    async def main(running: Service) -> None:
        async with clients(running.address, (220, SHORT), (10, LONG)) as load:
            assert load.open == 230
            for _ in range(RELOADS):
                before = serving(running)
                await reload(running)
                assert not set(before.values()) & set(serving(running).values())
                await asyncio.sleep(0.25)  # the load goes on in between
        print(load)
        assert load.lost == []
        assert load.failed_handshakes == []

    arguments = ("--workers", str(WORKERS), "--banks", "4", "--mode", steering_mode, *BUFFERS)
    with service(*arguments, uid=NOBODY if unprivileged else None) as running:
        descriptors = running.descriptors()
        asyncio.run(main(running))
        running.wait_for_workers(lambda workers: len(workers) == WORKERS)
        assert Counter(running.endings()) == {OLD: RELOADS * WORKERS}
        assert running.describe()["reloads"] == RELOADS
        assert running.describe()["restarts"] == 0
        slots = running.command("stats")["group"]["slots"]
        assert sum(slot["dropped"] for slot in slots if slot["buffer_bytes"] >= 4 * 2**20) == 0
        running.wait_until(lambda: running.descriptors() == descriptors)
        assert len(running.children()) == WORKERS


def test_a_reload_may_change_the_number_of_workers(steering_mode: SteeringMode) -> None:
    """Those that run read the listeners of those that do not: nobody's connection attempt is lost."""

    async def main(running: Service) -> None:
        async with clients(running.address, (30, SHORT)) as load:
            for count in (2, 4, 1, 3, 4):
                await reload(running, count)
                assert set(serving(running)) == set(range(count))
                async with connected(running.address) as client:
                    assert await client.exchange() < count
        assert load.lost == []
        assert load.failed_handshakes == []

    with service("--workers", "4", "--banks", "3", "--mode", steering_mode, *BUFFERS) as running:
        asyncio.run(main(running))
        assert running.command("stats")["group"]["dropped"] == 0
        assert set(running.endings()) == {OLD}


def test_a_service_may_start_with_fewer_workers_than_it_has_room_for(steering_mode: SteeringMode) -> None:
    async def main(running: Service) -> None:
        async with clients(running.address, (12, SHORT)) as load:
            await reload(running, 3)
        assert load.lost == []
        assert load.failed_handshakes == []

    with service("--workers", "1", "--capacity", "3", "--mode", steering_mode) as running:
        assert set(serving(running)) == {0}
        asyncio.run(main(running))
        assert set(serving(running)) == {0, 1, 2}
        for count in (0, 4, -1):
            with pytest.raises(QuicSteerError, match=f"workers is {count}, the group has room for 1 to 3"):
                running.reload(count)
        assert set(serving(running)) == {0, 1, 2}


def test_without_a_free_bank_a_reload_waits_until_the_drain_timeout(steering_mode: SteeringMode) -> None:
    """Long connections of the generation before the last end with CONNECTION_CLOSE at the deadline."""

    async def main(running: Service) -> None:
        first = Client()
        await first.connect(running.address)
        await first.exchange()
        await reload(running)
        async with connected(running.address) as second:
            await second.exchange()
            waiting = asyncio.create_task(reload(running))
            await asyncio.to_thread(running.wait_for_log, "waiting for a free bank: 1 workers of earlier generations")
            assert running.describe()["bank"] == 1
            await first.exchange()
            await second.exchange()
            async with connected(running.address) as third:
                await third.exchange()
            await asyncio.wait_for(first.protocol.wait_closed(), TIMEOUT)
            await waiting
            await second.exchange()
        first.drop()

    arguments = ("--workers", "2", "--banks", "2", "--drain-timeout", "3", "--mode", steering_mode)
    with service(*arguments) as running:
        asyncio.run(main(running))
        assert running.describe()["reloads"] == 2
        assert "waiting for a free bank" in " ".join(running.manager.said("STATUS="))
        running.wait_for_workers(lambda workers: len(workers) == 2)
        assert set(running.endings()) == {OLD}


def failing(how: Path) -> Work:
    """A worker that fails in the way that a file names, if there is one."""

    async def serve(worker: Worker) -> None:
        fault = how.read_text() if how.exists() else ""
        if fault == "exits":
            return
        if fault == "crashes":
            os.abort()
        if fault == "is never ready" or (fault == "one is never ready" and worker.index == 1):
            await asyncio.Event().wait()
        if fault == "one dies when it is ready":
            first = how.with_suffix(".pid")
            if worker.index == 0:
                worker.ready()
                first.write_text(str(os.getpid()))
                os._exit(9)
            while not first.exists() or Path("/proc", first.read_text()).exists():
                await asyncio.sleep(0.01)
        await echo(worker)

    return serve


FAULTS = ["exits", "crashes", "is never ready", "one is never ready", "one dies when it is ready"]


def test_a_generation_that_fails_leaves_the_old_one_serving(any_mode: SteeringMode, tmp_path: Path) -> None:
    mode = any_mode
    how = tmp_path / "how"
    count = 1 if mode is SteeringMode.SINGLE else 2

    async def main(running: Service) -> None:
        async with connected(running.address) as client:
            await client.exchange()
            before = running.workers()
            for fault in FAULTS[: 5 if mode.steers else 3]:
                how.write_text(fault)
                with pytest.raises(QuicSteerError, match="the new workers did not get ready, the old ones go on"):
                    await reload(running)
                assert running.workers() == before
                assert running.describe()["reload_error"]
                await client.exchange()
                async with connected(running.address) as newcomer:
                    await newcomer.exchange()
                assert len(running.children()) == count
        how.unlink()
        await reload(running)
        async with connected(running.address) as client:
            await client.exchange()

    arguments = ("--workers", str(count), "--mode", mode, "--ready-timeout", "2")
    with service(*arguments, serve=failing(how)) as running:
        descriptors = running.descriptors()
        asyncio.run(main(running))
        assert running.describe()["reload_error"] == ""
        assert running.describe()["reloads"] == 1
        assert running.describe()["restarts"] == 0
        running.wait_for_workers(lambda workers: len(workers) == count)
        running.wait_until(lambda: running.descriptors() == descriptors)
        if mode.steers:
            parked = [slot["parked"] for slot in running.command("stats")["group"]["slots"]]
            assert parked == [False] * count + [True] * count + [False] * count


def test_the_service_manager_hears_of_a_failed_reload(tmp_path: Path) -> None:
    how = tmp_path / "how"
    with service("--workers", "2", serve=failing(how)) as running:
        how.write_text("exits")
        heard = len(running.manager.messages)
        running.kill(signal.SIGHUP)
        begun = running.manager.wait_for("RELOADING=1", after=heard)
        ended = running.manager.wait_for("READY=1", after=begun)
        assert any(line.startswith("MONOTONIC_USEC=") for line in running.manager.messages[begun - 1])
        assert "last reload failed: the new workers did not get ready" in " ".join(running.manager.messages[ended - 1])
        how.unlink()
        running.kill(signal.SIGHUP)
        begun = running.manager.wait_for("RELOADING=1", after=ended)
        ended = running.manager.wait_for("READY=1", after=begun)
        assert "failed" not in " ".join(running.manager.messages[ended - 1])


def patient(go: Path) -> Work:
    """A worker that gets ready only when there is a file, unless it is of the first generation."""

    async def serve(worker: Worker) -> None:
        while worker.bank and not go.exists():
            await asyncio.sleep(0.01)
        await echo(worker)

    return serve


def test_one_reload_at_a_time(steering_mode: SteeringMode, tmp_path: Path) -> None:
    async def main(running: Service) -> None:
        first = asyncio.create_task(reload(running))
        await asyncio.to_thread(running.wait_for_log, "waiting for the new workers to get ready")
        with pytest.raises(QuicSteerError, match="a reload is running already"):
            await reload(running)
        running.kill(signal.SIGHUP)
        await asyncio.to_thread(running.wait_for_log, "a reload is running already", 2)
        (tmp_path / "go").touch()
        await first

    with service("--workers", "2", "--mode", steering_mode, serve=patient(tmp_path / "go")) as running:
        asyncio.run(main(running))
        assert running.describe()["reloads"] == 1
        running.wait_for_workers(lambda workers: len(workers) == 2)
        assert running.endings() == [OLD] * 2


def test_whoever_asked_for_a_reload_may_leave(tmp_path: Path) -> None:
    async def main(running: Service) -> None:
        _, writer = await asyncio.open_unix_connection(running.control)
        writer.write(b'{"command": "reload"}\n')
        await asyncio.to_thread(running.wait_for_log, "waiting for the new workers to get ready")
        writer.close()
        await writer.wait_closed()
        (tmp_path / "go").touch()
        await asyncio.to_thread(running.wait_until, lambda: running.describe()["reloads"] == 1)

    with service("--workers", "1", serve=patient(tmp_path / "go")) as running:
        asyncio.run(main(running))
        assert "Traceback" not in running.log


def test_a_worker_that_dies_while_a_new_generation_starts_is_replaced(
    steering_mode: SteeringMode, tmp_path: Path
) -> None:
    """First in its own generation, then with all others in the new one; never are there two that listen."""

    async def main(running: Service) -> None:
        waiting = asyncio.create_task(reload(running))
        await asyncio.to_thread(running.wait_for_log, "waiting for the new workers to get ready")
        victim = serving(running)[1]
        os.kill(victim, signal.SIGKILL)
        await asyncio.to_thread(running.wait_until, lambda: serving(running).get(1, victim) != victim)
        (tmp_path / "go").touch()
        await waiting
        async with clients(running.address, (8, SHORT)) as load:
            pass
        assert load.lost == []
        assert load.failed_handshakes == []

    with service("--workers", "2", "--mode", steering_mode, serve=patient(tmp_path / "go")) as running:
        asyncio.run(main(running))
        workers = running.wait_for_workers(lambda workers: len(workers) == 2)
        assert {(worker["index"], worker["bank"], worker["state"]) for worker in workers} == {
            (0, 1, "serving"),
            (1, 1, "serving"),
        }
        assert Counter(running.endings()) == {OLD: 2, KILLED: 1}
        assert running.describe()["restarts"] == 1


def test_a_reload_ends_the_wait_of_a_worker_that_kept_dying(tmp_path: Path) -> None:
    """The new code is good: nobody waits for the next attempt with the old one, and nothing of it comes back."""
    broken = tmp_path / "broken"

    async def serve(worker: Worker) -> None:
        if broken.exists() and worker.index == 1:
            os._exit(1)
        await echo(worker)

    with service("--workers", "2", "--mode", "auto", serve=serve) as running:
        broken.touch()
        os.kill(serving(running)[1], signal.SIGKILL)
        running.wait_for_log("worker 1 died . times in a row", times=3)
        broken.unlink()
        running.reload()
        assert set(serving(running)) == {0, 1}
        running.wait_for_workers(lambda workers: len(workers) == 2)
        pids = serving(running)
        running.reload()
        running.wait_for_workers(lambda workers: len(workers) == 2 and serving(running).keys() == {0, 1})
        assert not set(pids.values()) & set(serving(running).values())
        assert len(running.children()) == 2
        before = running.log.count("times in a row")
        victim = serving(running)[1]
        os.kill(victim, signal.SIGKILL)
        running.wait_until(lambda: serving(running).get(1, victim) != victim)
        assert running.log.count("times in a row") == before, "the failures of the old code count for the new"


def test_a_reload_does_not_wait_for_a_worker_of_before_that_is_starting(
    steering_mode: SteeringMode, tmp_path: Path
) -> None:
    """It is in nobody's way: when it gets ready nobody tells it to listen, even if it takes no notice of SIGTERM."""
    slow, listens = tmp_path / "slow", tmp_path / "listens"

    async def serve(worker: Worker) -> None:
        if worker.bank or not slow.exists():
            await echo(worker)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while slow.exists():
            await asyncio.sleep(0.01)
        worker.ready()
        assert worker.channel
        while True:
            await asyncio.sleep(0.01)
            if "listen" in [message["say"] for message in worker.channel.receive() or ()]:
                listens.touch()

    patience = {"EXIT_TIMEOUT": 0.5, "LEAVE_TIMEOUT": 0.5}
    with service("--workers", "2", "--mode", steering_mode, serve=serve, limits=patience) as running:
        slow.touch()
        victim = serving(running)[0]
        os.kill(victim, signal.SIGKILL)
        workers = running.wait_for_workers(lambda workers: workers[0]["pid"] != victim)
        assert [worker["state"] for worker in workers] == ["starting", "serving"]
        running.reload()
        slow.unlink()
        workers = running.wait_for_workers(lambda workers: len(workers) == 2)
        assert {(worker["bank"], worker["state"]) for worker in workers} == {(1, "serving")}
        assert len(running.children()) == 2
        assert Counter(running.endings()) == {KILLED: 2, OLD: 1}
        assert not listens.exists()


def test_a_new_worker_that_dies_before_its_turn_is_replaced(steering_mode: SteeringMode) -> None:
    """It was ready; others are still being handed over to; its listener has one reader at any time."""

    async def main(running: Service) -> None:
        stuck = serving(running)[0]
        os.kill(stuck, signal.SIGSTOP)
        waiting = asyncio.create_task(reload(running))
        await asyncio.to_thread(running.wait_for_log, "handing over the listeners")
        victim = running.workers("ready")[1]
        os.kill(victim, signal.SIGKILL)
        await asyncio.to_thread(running.ending, victim)
        os.kill(stuck, signal.SIGCONT)
        await waiting
        await asyncio.to_thread(running.wait_until, lambda: serving(running).keys() == {0, 1})
        async with clients(running.address, (8, SHORT)) as load:
            pass
        assert load.lost == []
        assert load.failed_handshakes == []

    with service("--workers", "2", "--mode", steering_mode) as running:
        asyncio.run(main(running))
        running.wait_for_workers(lambda workers: len(workers) == 2)
        assert Counter(running.endings()) == {OLD: 2, KILLED: 1}
        assert running.describe()["restarts"] == 1


def test_a_worker_that_does_not_let_go_of_its_listener_is_killed(steering_mode: SteeringMode) -> None:
    """So a listener has one reader, and the connection attempts that waited there are served."""

    async def main(running: Service) -> None:
        stuck = serving(running)[0]
        os.kill(stuck, signal.SIGSTOP)
        await reload(running)
        assert running.ending(stuck) == KILLED
        async with clients(running.address, (8, SHORT)) as load:
            pass
        assert load.lost == []
        assert load.failed_handshakes == []

    with service("--workers", "2", "--mode", steering_mode, limits={"STOP_TIMEOUT": 0.5}) as running:
        asyncio.run(main(running))
        assert "did not stop listening: killed" in running.log


def test_a_worker_that_does_not_end_is_made_to(steering_mode: SteeringMode) -> None:
    """However it behaves, its bank is free at last."""

    async def serve(worker: Worker) -> None:
        assert worker.channel
        if worker.bank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            worker.ready()
            worker.channel.send("stopped")
            await asyncio.Event().wait()
        await echo(worker)

    patience = {"EXIT_TIMEOUT": 0.3, "LEAVE_TIMEOUT": 0.3}
    arguments = ("--workers", "2", "--drain-timeout", "0.3", "--mode", steering_mode)
    with service(*arguments, serve=serve, limits=patience) as running:
        running.reload()
        running.wait_for_workers(lambda workers: len(workers) == 2)
        assert running.endings() == [KILLED] * 2
        slots = running.command("stats")["group"]["slots"]
        assert [slot["parked"] for slot in slots] == [False] * 2 + [True] * 2 + [False] * 2


@pytest.mark.parametrize("mode", [SteeringMode.HASH, SteeringMode.SINGLE], ids=str)
def test_without_steering_a_reload_ends_connections_and_the_service_goes_on(mode: SteeringMode) -> None:
    async def main(running: Service) -> None:
        for _ in range(3):
            client = Client()
            await client.connect(running.address)
            await client.exchange()
            before = serving(running)
            await reload(running)
            await asyncio.wait_for(client.protocol.wait_closed(), TIMEOUT)
            client.drop()
            assert serving(running).keys() == before.keys()
            assert not set(before.values()) & set(serving(running).values())
        async with clients(running.address, (8, STATIONARY)) as load:
            pass
        assert load.failed_handshakes == []
        assert load.lost == []

    count = 1 if mode is SteeringMode.SINGLE else 3
    with service("--workers", str(count), "--mode", mode) as running:
        asyncio.run(main(running))
        assert running.endings() == [OLD] * 3 * count
        assert len(running.children()) == count


def test_a_service_can_be_ended_while_a_reload_waits_for_a_bank() -> None:
    async def main(running: Service) -> None:
        client = Client()
        await client.connect(running.address)
        await client.exchange()
        await reload(running)
        waiting = asyncio.create_task(reload(running))
        await asyncio.to_thread(running.wait_for_log, "waiting for a free bank")
        running.kill(signal.SIGTERM)
        with pytest.raises(QuicSteerError, match="the service is ending"):
            await waiting
        await client.exchange()
        await client.close()

    with service("--workers", "1", "--drain-timeout", "forever") as running:
        asyncio.run(main(running))
        assert running.wait() == 0
        assert running.endings() == [OLD] * 2


def test_a_service_can_be_ended_while_a_reload_starts_workers(tmp_path: Path) -> None:
    with service("--workers", "2", serve=patient(tmp_path / "go")) as running:
        running.kill(signal.SIGHUP)
        running.wait_for_log("worker 1 .*bank 1. started")
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert "Traceback" not in running.log
