"""The supervisor of a server that brings its own way to start processes."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import ssl
from collections.abc import AsyncIterator, Callable

import pytest
from quic import TIMEOUT, client_configuration, connected
from steer import open_descriptors
from supervised import serve

from quicsteer import SteeringGroup, SteeringMode, Worker
from quicsteer.member import State
from quicsteer.supervisor import Limits, ReloadFailed, StartFailed, Supervisor


def starter(method: str) -> Callable[[Worker], int]:
    context = multiprocessing.get_context(method)

    def start(worker: Worker) -> int:
        process = context.Process(target=serve, args=(worker,), daemon=True)  # type: ignore[attr-defined]
        process.start()
        assert process.pid
        return int(process.pid)

    return start


async def until(good: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not good():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(supervisor: Supervisor) -> AsyncIterator[None]:
    """A supervisor whose workers serve; afterwards all have ended."""
    task = asyncio.create_task(supervisor.run())
    try:
        await until(lambda: task.done() or all_serve(supervisor))
        yield
    finally:
        supervisor.stop()
        await asyncio.wait_for(task, 2 * TIMEOUT)
        assert supervisor.members == []


def all_serve(supervisor: Supervisor) -> bool:
    return bool(supervisor.members) and all(member.state is State.SERVING for member in supervisor.members)


async def echo_from(group: SteeringGroup) -> int:
    # The certificate of a process that was spawned is one that it made itself.
    async with connected(group.addresses[0], client_configuration(verify_mode=ssl.CERT_NONE)) as client:
        return await client.exchange()


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_are_started_by_multiprocessing(steering_mode: SteeringMode, method: str) -> None:
    async def main(group: SteeringGroup) -> None:
        supervisor = Supervisor(group, starter(method), workers=2)
        async with running(supervisor):
            assert await echo_from(group) in (0, 1)
            victim = supervisor.members[0]
            os.kill(victim.pid, signal.SIGKILL)
            await until(lambda: victim not in supervisor.members and all_serve(supervisor))
            assert supervisor.restarts == 1
            await supervisor.reload()
            assert supervisor.bank == 1
            assert await echo_from(group) in (0, 1)

    with SteeringGroup.open("127.0.0.1:0", 2, split=True, banks=2, mode=steering_mode) as group:
        asyncio.run(main(group))


def test_a_start_that_raises_leaves_nothing_behind(steering_mode: SteeringMode) -> None:
    def start(worker: Worker) -> int:
        raise BlockingIOError("no process left")

    async def main(group: SteeringGroup) -> None:
        supervisor = Supervisor(group, start)
        before = open_descriptors()
        with pytest.raises(StartFailed, match="worker 0 could not be started: no process left"):
            await supervisor.run()
        assert open_descriptors() == before

    with SteeringGroup.open("127.0.0.1:0", 2, split=True, banks=2, mode=steering_mode) as group:
        asyncio.run(main(group))


def test_a_group_without_a_second_bank_cannot_reload(steering_mode: SteeringMode) -> None:
    async def main(group: SteeringGroup) -> None:
        supervisor = Supervisor(group, starter("fork"), limits=Limits(ready=TIMEOUT))
        async with running(supervisor):
            before = supervisor.members
            with pytest.raises(ReloadFailed, match="needs split=True and banks=2"):
                await supervisor.reload()
            assert supervisor.members == before
            assert all_serve(supervisor)

    with SteeringGroup.open("127.0.0.1:0", 2, split=True, mode=steering_mode) as group:
        asyncio.run(main(group))


@pytest.mark.parametrize("workers", [0, 3, True, 1.0])
def test_a_number_of_workers_that_cannot_be_is_refused(workers: int) -> None:
    with SteeringGroup.open("127.0.0.1:0", 2, mode="hash") as group, pytest.raises((ValueError, TypeError)) as error:
        Supervisor(group, starter("fork"), workers=workers)
    assert repr(workers) in str(error.value)


def test_a_supervisor_that_is_told_to_stop_before_it_starts_starts_nobody() -> None:
    async def main(group: SteeringGroup) -> None:
        supervisor = Supervisor(group, starter("fork"))
        supervisor.stop()
        await asyncio.wait_for(supervisor.run(), TIMEOUT)
        assert supervisor.members == []
        with pytest.raises(ReloadFailed, match="the service is ending"):
            await supervisor.reload()

    with SteeringGroup.open("127.0.0.1:0", 2, mode="hash") as group:
        asyncio.run(main(group))
