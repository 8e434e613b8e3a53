"""Known numbers of lost datagrams come back exactly."""

import dataclasses
import json
import socket
import subprocess
from pathlib import Path

import pytest
from readouts import overflow
from steer import receive_all, short_header, worker_sockets

from quicsteer import SteeringGroup, SteeringMode
from quicsteer.counters import DropCounter


def test_a_known_overflow_is_read_back_exactly(any_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode, receive_buffer=20_000) as group:
        [worker] = group.workers
        assert group.stats().dropped == 0
        held = overflow(group, worker, 1000, client)
        stats = group.stats()
        assert stats.dropped == 1000
        [slot] = stats.slots
        assert slot.queued_bytes is not None
        assert slot.buffer_bytes == 40_000
        assert slot.queued_bytes > held * 1200
        assert len(receive_all(worker.socket)) == held
        assert group.stats().slots[0].queued_bytes == 0
        assert overflow(group, worker, 500, client) == held
        assert group.stats().dropped == 1500


def test_only_the_slot_that_overflows_counts(steering_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 4, mode=steering_mode, receive_buffer=20_000) as group:
        overflow(group, group.workers[2], 100, client)
        assert [slot.dropped for slot in group.stats().slots] == [0, 0, 100, 0]


def test_the_kernel_shows_the_same_drops_to_everybody(steering_mode: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 2, mode=steering_mode, receive_buffer=20_000) as group:
        overflow(group, group.workers[1], 321, client)
        [table] = [
            int(line.split()[-1])
            for line in Path("/proc/net/udp").read_text().splitlines()[1:]
            if int(line.split()[1].partition(":")[2], 16) == group.addresses[0][1] and line.split()[-1] != "0"
        ]
        assert table == 321
        host = group.stats().host
        assert host is not None
        assert host.rcvbuf_errors >= 321


def test_what_a_mode_cannot_know_is_none() -> None:
    for mode in ("cbpf", "hash", "single"):
        with SteeringGroup.open("127.0.0.1:0", 1, mode=mode) as group:
            stats = group.stats()
            assert set(stats.outcomes.values()) == {None}
            assert {stats.slots[0].routed, stats.slots[0].dispatched} == {None}
            assert (stats.sink is None) == (mode in ("hash", "single"))


def test_a_snapshot_is_immutable_and_plain_in_json(any_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode) as group:
        stats = group.stats()
        with pytest.raises(dataclasses.FrozenInstanceError):
            stats.sink = 5  # type: ignore[misc]
        shown = json.loads(json.dumps(stats.to_dict()))
        assert shown["mode"] == any_mode
        names = "time mode fallback outcomes dropped parked sink sink_outcomes host slots"
        assert list(shown) == names.split()
        assert shown["slots"][0]["address"] == list(group.addresses[0])


def test_a_counter_goes_on_past_32_bits() -> None:
    counter = DropCounter()
    counter.update(5)
    counter.parked = False
    for raw in (2**32 - 1, 3, 2**32 - 6, 0):
        counter.update(raw)
    assert counter.swallowed == 5
    assert counter.dropped == (2**32 - 6) + 4 + (2**32 - 9) + 6


def test_two_readings_of_256_workers_agree_with_ss(ebpf: SteeringMode, client: socket.socket) -> None:
    with SteeringGroup.open("127.0.0.1:0", 256, mode=ebpf) as group:
        for worker in group.workers:
            client.sendto(short_header(worker.connection_ids.issue()), group.addresses[0])
        stats = group.stats()
        assert [slot.routed for slot in stats.slots] == [1] * 256
        port = group.addresses[0][1]
        listed = subprocess.run(["ss", "-Hulna", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
        assert len(listed.splitlines()) == 257
        assert len(worker_sockets(group)) == 256
