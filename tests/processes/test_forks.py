"""What becomes of a group's sockets in other processes: forks, programs that are executed, and those that keep them."""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from steer import receive_all, short_header

from quicsteer import KernelError, SteeringGroup, SteeringMode, Worker

PATIENCE = 10
FORKS = 60


def fork(work: Callable[[], None]) -> int:
    """Do something in a forked child that ends with status 0 if it was done; returns its pid."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int | None:
    """Return how a child ended; ``None`` if it hangs, and then it is killed."""
    pidfd = os.pidfd_open(child)
    ended = bool(select.select([pidfd], [], [], PATIENCE)[0])
    os.close(pidfd)
    if not ended:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if ended else None


@contextlib.contextmanager
def busy_threads(*work: Callable[[], object]) -> Iterator[None]:
    """Threads that do things over and over."""
    end = threading.Event()

    def repeat(each: Callable[[], object]) -> None:
        while not end.is_set():
            each()

    threads = [threading.Thread(target=repeat, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def test_a_fork_in_the_midst_of_threads_that_use_the_group_does_not_hang(steering_mode: SteeringMode) -> None:
    """A lock that a thread of the parent holds is held for ever in the child, where that thread does not exist."""
    with SteeringGroup.open("127.0.0.1:0", 4, split=True, banks=2, mode=steering_mode) as group:
        worker = group.workers[1]

        def serve() -> None:
            assert len(worker.sockets) == 2
            assert worker.connection_ids.slot_of(worker.connection_ids.issue()) == worker.slot
            worker.close()
            group.close()

        with busy_threads(group.stats, lambda: group.worker(2), worker.connection_ids.issue):
            for _ in range(FORKS):
                assert wait(fork(serve)) == 0


def test_a_child_keeps_nothing_of_workers_that_the_parent_serves_itself(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 3, split=True, mode=steering_mode) as group:
        before = count_sockets()
        assert group.workers[0].sockets
        assert group.workers[2].sockets
        own = count_sockets() - before
        assert own == 4

        def serve() -> None:
            assert group.workers[1].sockets
            assert count_sockets() == before - 7 + 2  # without the group's own six and the sink, with its two

        assert wait(fork(serve)) == 0
        assert count_sockets() == before + own


def count_sockets() -> int:
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    return found


def test_a_child_that_keeps_the_sockets_is_named_to_whoever_wants_the_address(any_mode: SteeringMode) -> None:
    group = SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode)
    address = group.addresses[0]
    ours, theirs = os.pipe()
    child = fork(lambda: wait_for(ours))
    group.close()
    try:
        with pytest.raises(KernelError, match="Address already in use") as caught:
            SteeringGroup.open(address, 1, mode=any_mode)
        assert f"(pid {child}, uid {os.geteuid()})" in str(caught.value)
    finally:
        os.write(theirs, b"x")
        assert wait(child) == 0
        os.close(ours)
        os.close(theirs)
    SteeringGroup.open(address, 1, mode=any_mode).close()


def test_a_child_that_never_asks_for_its_worker_loses_nothing(steering_mode: SteeringMode) -> None:
    """It holds copies of the sockets, and reads none: what arrives is the parent's."""
    with SteeringGroup.open("127.0.0.1:0", 2, mode=steering_mode) as group:
        ours, theirs = os.pipe()
        child = fork(lambda: wait_for(ours))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for worker in group.workers:
                client.sendto(short_header(worker.connection_ids.issue()), group.addresses[0])
        assert [len(receive_all(worker.socket)) for worker in group.workers] == [1, 1]
        os.write(theirs, b"x")
        assert wait(child) == 0
        os.close(ours)
        os.close(theirs)


def wait_for(end: int) -> None:
    os.read(end, 1)


def descriptors_of_a_program(**options: Any) -> str:
    """What an executed program has open."""
    script = "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if int(n) > 2])"
    script = script.replace("print(", "print(*").replace("[os.readlink", "[os.path.realpath")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, **options)
    return str(done.stdout)


def test_no_program_inherits_anything_by_accident(any_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, split=True, mode=any_mode) as group:
        worker = group.workers[0]
        assert worker.sockets
        found = descriptors_of_a_program(close_fds=False)
        for kind in ("socket:", "bpf-", "memfd:quicsteer"):
            assert kind not in found
        worker.sockets[0].set_inheritable(True)
        assert descriptors_of_a_program(close_fds=False).count("socket:") == 1


def test_a_socket_passed_on_without_close_on_exec_keeps_the_address(any_mode: SteeringMode) -> None:
    """So the group's own copies have close-on-exec, always."""
    group = SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode)
    address = group.addresses[0]
    group.workers[0].socket.set_inheritable(True)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as program:
        group.close()
        with pytest.raises(KernelError) as caught:
            SteeringGroup.open(address, 1, mode=any_mode)
        assert f"cat (pid {program.pid}, uid {os.geteuid()})" in str(caught.value)
        program.communicate()
    SteeringGroup.open(address, 1, mode=any_mode).close()


def test_a_thread_may_close_a_worker_while_others_open_it(steering_mode: SteeringMode) -> None:
    """Descriptors have one owner: however calls interleave, nothing is closed twice and nothing stays open."""
    with SteeringGroup.open("127.0.0.1:0", 2, split=True, mode=steering_mode) as group:
        before = len(os.listdir("/proc/self/fd"))

        def take_and_close() -> None:
            worker: Worker = group.worker(0)
            assert worker.sockets
            worker.close()
            worker.close()

        with busy_threads(take_and_close, take_and_close, group.stats):
            for _ in range(200):
                take_and_close()
        assert len(os.listdir("/proc/self/fd")) == before
        assert Path("/proc/self").exists()
