"""Others who want the address of a group, or have got in: who wins, who is named, and what they can reach."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from privileges import NOBODY
from service import program, service
from steer import arrivals, long_header, receive_all, short_header, worker_sockets

from quicsteer import KernelError, SteeringGroup, SteeringMode, _kernel
from quicsteer.check import run_checks
from quicsteer.stats import find_source

RACES = 200
RACES_OF_PROGRAMS = 5
ROOMY = 1 << 20
"""A receive buffer that takes all datagrams of a test, whichever socket they go to."""

JOIN = """
import os, socket, sys
uid = int(sys.argv[2])
if uid:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
try:
    sock.bind(("127.0.0.1", int(sys.argv[1])))
except OSError as error:
    print(error.strerror, flush=True)
else:
    print("joined", flush=True)
    sys.stdin.read()
    sock.setblocking(False)
    count = 0
    try:
        while sock.recv(65535):
            count += 1
    except BlockingIOError:
        print(count)
"""


class Stranger:
    """A process that binds a socket to the port of a group, as SO_REUSEPORT allows processes of one uid."""

    def __init__(self, port: int, uid: int) -> None:
        command = [sys.executable if not uid else "/usr/bin/python3", "-c", JOIN, str(port), str(uid)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/", stderr=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        self.answer = self._process.stdout.readline().strip()
        self.pid = self._process.pid

    def leave(self) -> int:
        """End it; returns how many datagrams it was sent."""
        return int(self._process.communicate()[0] or 0)


@contextmanager
def stranger(port: int, uid: int = 0) -> Iterator[Stranger]:
    found = Stranger(port, uid)
    try:
        yield found
    finally:
        found.leave()


def feed(group: SteeringGroup, count: int) -> None:
    """Send every worker datagrams with its connection IDs, and as many of strangers and as many that are malformed."""
    for _ in range(count):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for worker in group.workers:
                client.sendto(short_header(worker.connection_ids.issue()), group.addresses[0])
                client.sendto(long_header(os.urandom(8), 60), group.addresses[0])
                client.sendto(b"\x40", group.addresses[0])


def test_a_process_of_the_same_user_can_join_and_gets_nothing(steering_mode: SteeringMode) -> None:
    """The kernel lets it in, but no program ever selects its socket."""
    with SteeringGroup.open("127.0.0.1:0", 3, mode=steering_mode, receive_buffer=ROOMY) as group:
        port = group.addresses[0][1]
        with stranger(port) as other:
            assert other.answer == "joined"
            feed(group, 50)
            assert sum(arrivals(worker_sockets(group))) == 450
            probe = run_checks(f"127.0.0.1:{port}").probes[-1]
            assert f"(pid {other.pid}, uid {os.geteuid()}) on 127.0.0.1:{port}" in probe.detail
            assert f"(pid {os.getpid()}, uid {os.geteuid()}) on 127.0.0.1:{port} (4 sockets)" in probe.detail
            assert other.leave() == 0
        feed(group, 50)
        assert sum(arrivals(worker_sockets(group))) == 450, "its leaving renumbers nobody"
        assert group.stats().dropped == 0


def test_without_a_program_it_takes_its_share() -> None:
    """In the mode hash nothing keeps it out: the warning at the start says that the mode does not steer."""
    with (
        SteeringGroup.open("127.0.0.1:0", 3, mode="hash", receive_buffer=ROOMY) as group,
        stranger(group.addresses[0][1]) as other,
    ):
        assert other.answer == "joined"
        feed(group, 50)
        assert sum(arrivals(worker_sockets(group))) + other.leave() == 450


def test_a_process_of_another_user_cannot_join(any_mode: SteeringMode) -> None:
    with (
        SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode) as group,
        stranger(group.addresses[0][1], NOBODY) as other,
    ):
        assert other.answer == "Address already in use"


def test_the_stats_of_a_service_name_who_got_in(steering_mode: SteeringMode) -> None:
    with service("--workers", "2", "--mode", steering_mode) as running:
        source = find_source(str(running.control))
        assert not json.loads(json.dumps(source().to_dict()))["strangers"]
        with stranger(running.address[1]) as other:
            readout = source()
            [named] = readout.to_dict()["strangers"]
            assert f"(pid {other.pid}, uid {os.geteuid()}) on 127.0.0.1:{running.address[1]}" in named
            assert any(named in sentence for sentence in readout.advice())
        assert not source().to_dict()["strangers"]


def test_a_process_of_the_same_user_can_take_the_group_over_by_a_program_of_its_own(ebpf: SteeringMode) -> None:
    """What cannot be prevented, and is written down: whoever runs as the server's user is the server's user.

    Only the eBPF program is replaced here, by another one: replacing a classic one can crash kernels.
    """
    with SteeringGroup.open("127.0.0.1:0", 2, mode=ebpf) as group:
        feed(group, 5)
        assert sum(arrivals(worker_sockets(group))) == 30
        counted = group.stats().outcomes
        descriptors = _kernel.load_program(os.urandom(16), 8, 1, 1, False)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as hijacker:
            hijacker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            hijacker.bind(group.addresses[0])
            _kernel.set_socket(descriptors[1], 0, hijacker.fileno())
            _kernel.attach_program(hijacker.fileno(), descriptors[0])
            hijacker.setblocking(False)
            feed(group, 5)
            assert len(receive_all(hijacker)) == 30
            assert group.stats().outcomes == counted, "counters that stand still under load give it away"
        for descriptor in descriptors:
            os.close(descriptor)


def race(address: tuple[str, int], mode: SteeringMode) -> list[Any]:
    """Let two processes open an address at once; return what each of them says, the winner first."""
    start, go = os.pipe()
    hold, release = os.pipe()
    results, report = os.pipe()
    children = [contend(address, mode, (start, hold, report), (go, release)) for _ in range(2)]
    for number in (start, hold, report):
        os.close(number)
    os.close(go)
    with os.fdopen(results) as lines:
        answers = [json.loads(lines.readline()) for _ in children]
        os.close(release)
    for child in children:
        os.waitpid(child, 0)
    return sorted(answers, key=lambda answer: answer["error"] or "")


def contend(address: tuple[str, int], mode: SteeringMode, ends: tuple[int, int, int], far: tuple[int, int]) -> int:
    """One of the two: wait for the start, open the group, say how it went, and hold it until all have tried."""
    child = os.fork()
    if child:
        return child
    start, hold, report = ends
    for number in far:
        os.close(number)
    os.read(start, 1)
    group = None
    answer: dict[str, Any] = {"pid": os.getpid(), "error": None}
    try:
        workers = 1 if mode is SteeringMode.SINGLE else 2
        group = SteeringGroup.open(address, workers, split=True, banks=2, mode=mode)
    except KernelError as error:
        answer["error"] = str(error)
    os.write(report, json.dumps(answer).encode() + b"\n")
    os.close(report)
    if group:
        os.read(hold, 1)
    os._exit(0)


@pytest.fixture
def free_address() -> tuple[str, int]:
    """One that no other test is given by the kernel while it is not bound: it is beyond the range for that."""
    last = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[1])
    for port in random.sample(range(last + 1, 65536), 65535 - last):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return "127.0.0.1", port
    raise AssertionError("no port is free")


def test_of_two_that_race_for_an_address_one_wins_and_the_other_knows_who(
    any_mode: SteeringMode, free_address: tuple[str, int]
) -> None:
    for _ in range(RACES):
        winner, loser = race(free_address, any_mode)
        assert winner["error"] is None
        assert loser["error"].startswith(f"bind(127.0.0.1:{free_address[1]}): Address already in use")
        assert f"(pid {winner['pid']}, uid {os.geteuid()})" in loser["error"]


def test_of_two_services_that_race_one_serves_and_the_other_says_why(free_address: tuple[str, int]) -> None:
    arguments = ("--workers", "1", "--bind", f"127.0.0.1:{free_address[1]}")
    for _ in range(RACES_OF_PROGRAMS):
        with program(*arguments, wait=False) as first, program(*arguments, wait=False) as second:
            judge_services([first, second], lambda running: running.describe()["pid"])


def is_ready(running: Any) -> bool:
    return any("READY=1" in message for message in running.manager.messages)


def judge_services(services: list[Any], pid_of: Callable[[Any], int]) -> None:
    services[0].wait_until(lambda: any(is_ready(each) for each in services))
    [winner] = [each for each in services if is_ready(each)]
    [loser] = [each for each in services if each is not winner]
    assert loser.wait() == 2
    assert "Address already in use" in loser.log
    assert f"(pid {pid_of(winner)}, uid {os.geteuid()})" in loser.log
