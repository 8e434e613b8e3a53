"""The tests' own service: what this process has left to be collected does not close sockets of the fork."""

import gc
import socket

from service import echo, service

from quicsteer import Worker


async def collect_and_serve(worker: Worker) -> None:
    gc.collect()
    await echo(worker)


def test_garbage_of_this_process_closes_nothing_in_a_service() -> None:
    gc.disable()
    try:
        for _ in range(100):
            garbage: list[object] = [socket.socket()]
            garbage.append(garbage)
        del garbage
        with service("--workers", "2", serve=collect_and_serve) as running:
            assert running.endings() == []
    finally:
        gc.enable()
        gc.collect()
