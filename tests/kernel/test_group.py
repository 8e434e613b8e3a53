"""Opening, claiming, parking and closing groups on the real kernel."""

import contextlib
import errno
import os
import pickle
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from steer import arrivals, long_header, open_descriptors, outcomes, receive_all, short_header, worker_sockets

from quicsteer import KernelError, QuicSteerError, SteeringGroup, SteeringMode, SteeringUnavailable


@pytest.mark.parametrize("workers", [1, 2, 4, 64, 256])
def test_each_worker_gets_the_datagrams_of_its_own_connection_ids(
    steering_mode: SteeringMode, workers: int, client: socket.socket
) -> None:
    with SteeringGroup.open("127.0.0.1:0", workers, mode=steering_mode) as group:
        for worker in group.workers:
            client.sendto(short_header(worker.connection_ids.issue()), group.addresses[0])
        assert arrivals(worker_sockets(group)) == [1] * workers


def test_a_split_group_keeps_new_and_established_connections_apart(
    steering_mode: SteeringMode, client: socket.socket
) -> None:
    with SteeringGroup.open("127.0.0.1:0", 4, split=True, mode=steering_mode) as group:
        for worker in group.workers:
            client.sendto(short_header(worker.connection_ids.issue()), group.addresses[0])
            client.sendto(long_header(worker.connection_ids.issue()), group.addresses[0])
        for _ in range(40):
            client.sendto(long_header(os.urandom(8)), group.addresses[0])
        assert arrivals(worker.established[0] for worker in group.workers) == [2, 2, 2, 2]
        assert sum(arrivals(worker.listeners[0] for worker in group.workers)) == 40


def test_a_listener_takes_all_datagrams_of_one_attempt(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 8, mode=steering_mode) as group:
        dcid = os.urandom(8)
        for _ in range(10):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(long_header(dcid), group.addresses[0])
        assert sorted(arrivals(worker_sockets(group))) == [0] * 7 + [10]


def test_a_parked_bank_is_silent_until_its_worker_comes(steering_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 2, split=True, banks=2, mode=steering_mode) as group:
        client.connect(group.addresses[0])
        second = group.worker(0, bank=1)
        cid = second.connection_ids.issue()
        client.send(short_header(cid))
        assert arrivals(second.established) == [1]
        client.send(short_header(cid))
        group.park(1)
        assert arrivals(second.established) == [0], "parking empties the queue"
        for _ in range(5):
            client.send(short_header(cid))
        assert arrivals(second.established) == [0]
        [slot] = [slot for slot in group.stats().slots if slot.slot == second.slot]
        assert (slot.parked, slot.swallowed, slot.dropped) == (True, 1 + 5, 0), "what waited is counted too"
        again = group.worker(0, bank=1)
        client.send(short_header(cid))
        assert arrivals(again.established) == [1]
        [slot] = [slot for slot in group.stats().slots if slot.slot == second.slot]
        assert (slot.parked, slot.swallowed, slot.dropped) == (False, 1 + 5, 0)


def test_asking_for_an_open_slot_again_keeps_its_queue(steering_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode) as group:
        client.sendto(short_header(group.workers[0].connection_ids.issue()), group.addresses[0])
        assert arrivals(group.worker(0).sockets) == [1]


def test_invalid_datagrams_vanish_without_an_answer(steering_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 2, mode=steering_mode, drop_invalid=True) as group:
        client.connect(group.addresses[0])
        for _ in range(1000):
            client.send(short_header(os.urandom(8)))
        client.send(b"")
        assert arrivals(worker_sockets(group)) == [0, 0]
        assert group.stats().sink == 1001
        client.setblocking(False)
        with pytest.raises(BlockingIOError):  # an ICMP port unreachable would be ConnectionRefusedError
            client.recv(100)


@pytest.mark.parametrize("reuse", ["plain", "SO_REUSEPORT", "SO_REUSEADDR"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_occupied_address_is_refused_and_its_holder_named(any_mode: SteeringMode, reuse: str, host: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        if reuse != "plain":
            other.setsockopt(socket.SOL_SOCKET, getattr(socket, reuse), 1)
        other.bind((host, 0))
        before = open_descriptors()
        with pytest.raises(KernelError) as caught:
            SteeringGroup.open(f"127.0.0.1:{other.getsockname()[1]}", 1, mode=any_mode)
        assert caught.value.errno == errno.EADDRINUSE
        assert caught.value.call.startswith("bind(127.0.0.1:")
        assert f"(pid {os.getpid()}, uid {os.getuid()})" in str(caught.value)
        assert open_descriptors() == before


def test_a_group_cannot_be_joined_by_opening_it_twice(any_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode) as group:
        for mode in ("ebpf", "cbpf", "hash", "single"):
            with pytest.raises(KernelError) as caught:
                SteeringGroup.open(group.addresses[0], 1, mode=mode)
            assert caught.value.errno == errno.EADDRINUSE


def test_one_of_many_racing_processes_wins_the_address(steering_mode: SteeringMode) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    for _ in range(5):
        assert sorted(race(address, steering_mode, processes=4)) == ["EADDRINUSE"] * 3 + ["won"]


def race(address: tuple[str, int], mode: SteeringMode, processes: int) -> list[str]:
    """Open the same address in several processes at once; the winner holds it until all have tried."""
    start, go = os.pipe()
    hold, release = os.pipe()
    results, report = os.pipe()
    children = []
    for _ in range(processes):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.close(release)
            os.read(start, 1)
            try:
                with SteeringGroup.open(address, 4, mode=mode):
                    os.write(report, b"won\n")
                    os.read(hold, 1)
            except KernelError as error:
                os.write(report, errno.errorcode[error.errno or 0].encode() + b"\n")
            os._exit(0)
        children.append(pid)
    os.close(report)
    os.write(go, bytes(processes))
    with os.fdopen(results) as lines:
        answers = [lines.readline().strip() for _ in children]
    for end in (start, go, hold, release):
        os.close(end)
    for pid in children:
        os.waitpid(pid, 0)
    return answers


def test_several_addresses_share_workers_but_not_sockets(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open(["127.0.0.1:0", "[::1]:0"], 2, mode=steering_mode) as group:
        assert [host for host, _ in group.addresses] == ["127.0.0.1", "::1"]
        for family, address in zip((socket.AF_INET, socket.AF_INET6), group.addresses, strict=True):
            with socket.socket(family, socket.SOCK_DGRAM) as client:
                client.sendto(short_header(group.workers[1].connection_ids.issue()), address)
        assert arrivals(group.workers[0].sockets) == [0, 0]
        assert arrivals(group.workers[1].sockets) == [1, 1]
        with pytest.raises(QuicSteerError, match="2 sockets"):
            _ = group.workers[0].socket


def test_both_wildcards_can_be_listed_side_by_side(steering_mode: SteeringMode) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        probe.bind(("::", 0))
        port = probe.getsockname()[1]
    with SteeringGroup.open([f"[::]:{port}", f"0.0.0.0:{port}"], 1, mode=steering_mode) as group:
        v6, v4 = group.workers[0].sockets
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(short_header(group.workers[0].connection_ids.issue()), ("127.0.0.1", port))
        assert (arrivals([v6]), arrivals([v4])) == ([0], [1])


def test_options_are_set_on_every_socket_before_it_is_bound(any_mode: SteeringMode) -> None:
    options = [(socket.IPPROTO_IP, socket.IP_TOS, 0x28), (socket.SOL_SOCKET, socket.SO_PRIORITY, 3)]
    with SteeringGroup.open(
        "127.0.0.1:0", 1, split=True, mode=any_mode, receive_buffer=300_000, socket_options=options
    ) as group:
        for sock in group.workers[0].sockets:
            assert sock.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) == 0x28
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 3
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 600_000
            assert not sock.getblocking()
            assert not sock.get_inheritable()


def test_a_refused_option_leaves_nothing_open(any_mode: SteeringMode) -> None:
    before = open_descriptors()
    with pytest.raises(KernelError, match=r"setsockopt\(1, 9999, 1\): Protocol not available"):
        SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode, socket_options=[(socket.SOL_SOCKET, 9999, 1)])
    assert open_descriptors() == before


@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
def test_the_descriptor_limit_at_any_step_leaves_nothing_open(any_mode: SteeringMode, split: bool) -> None:
    workers = 1 if any_mode is SteeringMode.SINGLE else 3
    with no_gap_below() as used:
        before = open_descriptors()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        refused = []
        for room in range(40):
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + room, limits[1]))
            try:
                SteeringGroup.open(["127.0.0.1:0", "[::1]:0"], workers, mode=any_mode, split=split).close()
            except KernelError as error:
                refused.append(error.errno)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert open_descriptors() == before
    assert 0 < len(refused) < 40
    assert set(refused) == {errno.EMFILE}


@contextlib.contextmanager
def no_gap_below() -> Iterator[int]:
    """Fill the free descriptor numbers below the highest used one; yield the first free number above."""
    with contextlib.ExitStack() as stack:
        highest = max(int(entry.split()[0]) for entry in open_descriptors())
        filler = -1
        while filler <= highest:
            filler = os.dup(0)
            stack.callback(os.close, filler)
        yield filler + 1


def test_a_second_address_that_is_taken_frees_the_first(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode) as held:
        before = open_descriptors()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            free = probe.getsockname()
        with pytest.raises(KernelError, match="Address already in use"):
            SteeringGroup.open([free, held.addresses[0]], 2, mode=steering_mode)
        assert open_descriptors() == before
        SteeringGroup.open(free, 2, mode=steering_mode).close()


def test_five_hundred_groups_leave_no_descriptor(any_mode: SteeringMode) -> None:
    workers = 1 if any_mode is SteeringMode.SINGLE else 2
    before = open_descriptors()
    for _ in range(500):
        with SteeringGroup.open("127.0.0.1:0", workers, mode=any_mode, split=True) as group:
            assert group.workers[0].sockets
    assert open_descriptors() == before


def test_a_closed_group_says_so(any_mode: SteeringMode) -> None:
    group = SteeringGroup.open("127.0.0.1:0", 1, split=True, mode=any_mode)
    group.close()
    group.close()
    for call in (group.stats, lambda: group.worker(0), lambda: group.park(0), lambda: group.addresses):
        with pytest.raises(QuicSteerError, match="closed"):
            call()
    with pytest.raises(QuicSteerError, match="closed"):
        _ = group.workers[0].sockets
    assert "closed" in repr(group)


def test_a_closed_address_is_free_at_once(any_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode) as group:
        address = group.addresses[0]
    SteeringGroup.open(address, 1, mode=any_mode).close()


def test_without_a_program_a_split_group_has_one_socket_per_worker() -> None:
    with SteeringGroup.open("127.0.0.1:0", 3, split=True, banks=2, mode="hash") as group:
        assert [len(worker.sockets) for worker in group.workers] == [1, 1, 1]
        other = group.worker(1, bank=1)
        assert other.slot == 7
        assert os.path.sameopenfile(other.socket.fileno(), other.listeners[0].fileno())
        group.park(1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(30):
                client.sendto(long_header(os.urandom(8)), group.addresses[0])
        assert sum(arrivals(worker.socket for worker in group.workers)) == 30


def test_weights_move_new_connections_and_nothing_else(ebpf: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 4, mode=ebpf) as group:
        sockets = worker_sockets(group)
        group.dispatch({0: 3, 2: 0})
        counts = [0, 0, 0, 0]
        for _ in range(400):
            client.sendto(long_header(os.urandom(8), 100), group.addresses[0])
            counts[arrivals(sockets).index(1)] += 1
        assert counts[2] == 0
        assert counts[0] > counts[1]
        assert counts[0] > counts[3]
        client.sendto(short_header(group.workers[2].connection_ids.issue()), group.addresses[0])
        assert arrivals(sockets) == [0, 0, 1, 0]


def test_other_modes_refuse_weights() -> None:
    with (
        SteeringGroup.open("127.0.0.1:0", 2, mode="cbpf") as group,
        pytest.raises(SteeringUnavailable, match="fixed dispatch table"),
    ):
        group.dispatch({0: 0})


def test_counters_tell_every_outcome(ebpf: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 4, mode=ebpf) as group:
        client.connect(group.addresses[0])
        sockets = worker_sockets(group)
        for number in range(1000):
            client.send(short_header(group.workers[number % 4].connection_ids.issue()))
            client.send(long_header(os.urandom(8), 60))
            client.send(short_header(os.urandom(8)))
            client.send(b"\x40")
            assert sum(arrivals(sockets)) == 4
        assert outcomes(group.stats()) == {
            "routed": 1000,
            "dispatched": 1000,
            "unroutable": 1000,
            "malformed": 1000,
        }


def test_errors_survive_pickling() -> None:
    for error in (KernelError(98, "bind(x)", "held by y"), SteeringUnavailable("ebpf", "no", "do this")):
        copy = pickle.loads(pickle.dumps(error))
        assert str(copy) == str(error)
        assert vars(copy) == vars(error)


BAD_ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"addresses": "nonsense"}, ValueError, "'nonsense'"),
    ({"addresses": "127.0.0.1:http"}, ValueError, "127.0.0.1:http"),
    ({"addresses": "127.0.0.1:65536"}, ValueError, "65536"),
    ({"addresses": "127.0.0.1:-1"}, ValueError, "-1"),
    ({"addresses": "::1:443"}, ValueError, "brackets"),
    ({"addresses": ("127.0.0.1", True)}, ValueError, "True"),
    ({"addresses": []}, ValueError, "empty"),
    ({"addresses": [443]}, TypeError, "443"),
    ({"addresses": 443}, TypeError, "443"),
    ({"addresses": "no-such-host.invalid:443"}, ValueError, "no-such-host.invalid"),
    ({"addresses": ["127.0.0.1:1", "127.0.0.1:1"]}, ValueError, "twice"),
    ({"workers": 0}, ValueError, "workers is 0"),
    ({"workers": 1025}, ValueError, "1 to 1024"),
    ({"workers": "4"}, TypeError, "'4'"),
    ({"workers": True}, TypeError, "True"),
    ({"workers": 1.5}, TypeError, "1.5"),
    ({"banks": 0, "split": True}, ValueError, "banks is 0"),
    ({"banks": 2}, ValueError, "split=True"),
    ({"workers": 1024, "banks": 64, "split": True}, ValueError, "66560 slots"),
    ({"mode": "fast"}, ValueError, "'fast'"),
    ({"mode": "single", "workers": 2}, ValueError, "one worker"),
    ({"mode": "hash", "drop_invalid": True}, ValueError, "drop_invalid"),
    ({"cid_length": 7}, ValueError, "cid_length is 7"),
    ({"cid_length": 21}, ValueError, "8 to 20"),
    ({"cid_length": "8"}, TypeError, "'8'"),
    ({"key": b"short"}, ValueError, "5 bytes"),
    ({"key": "0123456789abcdef"}, TypeError, "str"),
    ({"receive_buffer": 0}, ValueError, "receive_buffer is 0"),
    ({"receive_buffer": "1M"}, TypeError, "'1M'"),
    ({"socket_options": [(1, 2)]}, TypeError, r"\(1, 2\)"),
    ({"socket_options": [(1, 2, "x")]}, TypeError, "bytes"),
]


@pytest.mark.parametrize(("arguments", "kind", "text"), BAD_ARGUMENTS, ids=lambda value: str(value)[:40])
def test_a_wrong_argument_is_named(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    before = open_descriptors()
    with pytest.raises(kind, match=text):
        SteeringGroup.open(**{"addresses": "127.0.0.1:0", "workers": 2, **arguments})
    assert open_descriptors() == before


def test_a_wrong_worker_bank_or_weight_is_named(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 2, split=True, mode=steering_mode) as group:
        for call, kind, text in (
            (lambda: group.worker(2), ValueError, "index is 2"),
            (lambda: group.worker(0, bank=1), ValueError, "bank is 1"),
            (lambda: group.worker("0"), TypeError, "'0'"),  # type: ignore[arg-type]
            (lambda: group.park(-1), ValueError, "bank is -1"),
            (lambda: group.dispatch({5: 1}), ValueError, "index is 5"),
            (lambda: group.dispatch({0: -1}), ValueError, "weight of worker 0"),
            (lambda: group.dispatch({0: 0, 1: 0}), ValueError, "all weights are 0"),
        ):
            with pytest.raises(kind, match=text):
                call()
    with (
        SteeringGroup.open("127.0.0.1:0", 2, mode=steering_mode) as plain,
        pytest.raises(ValueError, match="split=True"),
    ):
        plain.park(0)


def test_a_queue_outlives_its_reader(steering_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode) as group:
        first = group.worker(0)
        cid = first.connection_ids.issue()
        client.sendto(short_header(cid), group.addresses[0])
        assert first.socket.fileno() >= 0
        first.close()
        client.sendto(short_header(cid), group.addresses[0])
        assert len(receive_all(group.worker(0).socket)) == 2
