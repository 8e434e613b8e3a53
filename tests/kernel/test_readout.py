"""Known numbers come back exactly, and everybody who asks the kernel gets the same."""

import json
import os
import socket

import pytest
from readouts import Memory, by_proc, by_sock_diag, by_socket_option, by_ss, overflow
from steer import long_header, outcomes, receive_all, short_header

from quicsteer import GroupStats, SteeringGroup, SteeringMode, Worker
from quicsteer.counters import GroupDifference
from quicsteer.sockdiag import read_port, read_process

MANY = 1000
BATCH = 100


def drain(group: SteeringGroup) -> int:
    return sum(len(receive_all(sock)) for worker in group.workers for sock in worker.sockets)


def send(group: SteeringGroup, datagrams: list[bytes], client: socket.socket) -> int:
    """Send datagrams and read them, so that no queue runs over; return how many were read."""
    received = 0
    for start in range(0, len(datagrams), BATCH):
        for datagram in datagrams[start : start + BATCH]:
            client.sendto(datagram, group.addresses[0])
        received += drain(group)
    return received


def all_sockets(group: SteeringGroup) -> list[socket.socket]:
    [part] = group._parts
    return [*part.sockets, *([part.sink] if part.sink else [])]


@pytest.mark.filterwarnings("ignore::quicsteer.ForeignConnectionIdWarning")
def test_everybody_sees_the_same_overflow_and_the_same_junk(steering_mode: SteeringMode, client: socket.socket) -> None:
    options = {"mode": steering_mode, "drop_invalid": True, "receive_buffer": 20_000}
    with SteeringGroup.open("127.0.0.1:0", 3, **options) as group:  # type: ignore[arg-type]
        port = group.addresses[0][1]
        overflow(group, group.workers[1], MANY, client)
        for _ in range(MANY):
            client.sendto(short_header(os.urandom(8)), group.addresses[0])
        stats = group.stats()
        assert stats.dropped == MANY
        assert stats.sink == MANY
        assert [slot.dropped for slot in stats.slots] == [0, MANY, 0]

        seen = by_socket_option(all_sockets(group))
        assert [memory.dropped for memory in seen] == [0, MANY, 0, MANY]
        assert by_ss(port) == seen
        assert by_sock_diag(port) == seen
        assert by_proc(port) == [(memory.queued, memory.dropped) for memory in seen]
        assert [
            Memory(slot.queued_bytes or 0, slot.buffer_bytes or 0, slot.dropped or 0) for slot in stats.slots
        ] == seen[:-1]


def test_a_thousand_of_each_outcome_are_a_thousand_of_each(ebpf: SteeringMode, client: socket.socket) -> None:
    def datagrams(worker: Worker) -> list[bytes]:
        return [
            *(short_header(worker.connection_ids.issue()) for _ in range(MANY)),
            *(long_header(os.urandom(12), 60) for _ in range(MANY)),
            *(short_header(os.urandom(8)) for _ in range(MANY)),
            *(long_header(os.urandom(4), 60) for _ in range(MANY)),
        ]

    exact = dict.fromkeys(("routed", "dispatched", "unroutable", "malformed"), MANY)
    for drop_invalid in (False, True):
        with SteeringGroup.open("127.0.0.1:0", 4, mode=ebpf, drop_invalid=drop_invalid) as group:
            before = group.stats()
            received = send(group, datagrams(group.workers[2]), client)
            stats = group.stats()
            sunk = 2 * MANY if drop_invalid else 0
            assert received == 4 * MANY - sunk
            assert outcomes(stats) == exact
            assert stats.sink == sunk
            assert stats.dropped == 0
            assert [slot.routed for slot in stats.slots] == [0, 0, MANY, 0]
            assert sum(slot.steered or 0 for slot in stats.slots) == received
            assert outcomes(stats - before) == exact  # type: ignore[arg-type]


def test_what_comes_for_a_parked_slot_is_counted_apart(steering_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 2, split=True, banks=2, mode=steering_mode) as group:
        late = [short_header(group.worker(1, 1).connection_ids.issue()) for _ in range(MANY)]
        group.park(1)
        before = group.stats()
        assert send(group, late, client) == 0
        stats = group.stats()
        assert (stats.parked, stats.dropped) == (MANY, 0)
        [slot] = [slot for slot in stats.slots if slot.swallowed]
        assert (slot.worker, slot.role, slot.bank, slot.parked) == (1, "established", 1, True)
        span = stats - before
        assert (span.parked, span.dropped) == (MANY, 0)
        assert send(group, late[:1], client) == 0
        assert (group.stats() - stats).parked == 1


def test_a_difference_is_what_happened_in_its_time(any_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode, receive_buffer=20_000) as group:
        overflow(group, group.workers[0], 300, client)
        earlier = group.stats()
        overflow(group, group.workers[0], 200, client)
        later = group.stats()
        span = later - earlier
        assert isinstance(span, GroupDifference)
        assert span.seconds == later.time - earlier.time > 0
        assert span.dropped == 200
        assert span.rate(span.dropped) == pytest.approx(200 / span.seconds)
        assert span.slots[0].queued_bytes == later.slots[0].queued_bytes
        assert span.host is not None
        assert span.host.rcvbuf_errors >= 200
        assert span.rate(span.slots[0].routed) is None or any_mode is SteeringMode.EBPF
        with pytest.raises(ValueError, match="later"):
            earlier - later
    with (
        SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode) as other,
        pytest.raises(ValueError, match="different groups"),
    ):
        other.stats() - earlier


def test_a_snapshot_survives_json(any_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open(["127.0.0.1:0", "[::1]:0"], 1, mode=any_mode) as group:
        client.sendto(short_header(os.urandom(8)), group.addresses[0])
        stats = group.stats()
        assert GroupStats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats


def test_sockets_of_any_process_are_found_with_who_has_them(client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 2, mode="hash") as group:
        [first, second] = read_port(group.addresses[0][1])
        assert first.address == group.addresses[0]
        assert [first.grouped, second.grouped] == [True, True]
        assert first.uid == os.geteuid()
        assert os.getpid() in [process.pid for process in first.processes]
        assert first.peer is None
        client.connect(group.addresses[0])
        [connected] = read_port(client.getsockname()[1])
        assert connected.peer == group.addresses[0]
        assert not connected.grouped
        mine = {sock.inode for sock in read_process(os.getpid())}
        assert {first.inode, second.inode, connected.inode} <= mine


def test_ipv6_sockets_are_found_too() -> None:
    with SteeringGroup.open("[::1]:0", 2, mode="hash") as group:
        assert [sock.address for sock in read_port(group.addresses[0][1])] == [group.addresses[0][:2]] * 2
