"""The shared table of decisions, by real datagrams to real groups."""

import socket

import pytest
from steer import VectorGroup, arrivals, load_decisions, outcomes, receive_all

from quicsteer import SteeringGroup, SteeringMode
from quicsteer.abi import Outcome

GROUPS = load_decisions()


def layout(table: VectorGroup) -> tuple[bool, int]:
    """The tables have their listeners first and whole banks of established slots, or no bank at all."""
    banks = table.slots // table.listeners - 1
    return banks > 0, max(banks, 1)


def group_sockets(group: SteeringGroup, table: VectorGroup) -> list[socket.socket]:
    """One socket of every slot, in the order of the slots."""
    split, banks = layout(table)
    workers = [[group.worker(index, bank) for index in range(table.listeners)] for bank in range(banks)]
    if not split:
        return [worker.socket for worker in workers[0]]
    established = [worker.established[0] for bank in workers for worker in bank]
    return [worker.listeners[0] for worker in workers[0]] + established


@pytest.mark.parametrize("drop_invalid", [False, True], ids=["serve-invalid", "drop-invalid"])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
@pytest.mark.parametrize("table", GROUPS, ids=lambda table: f"{table.cid_length}-{table.listeners}-{table.slots}")
def test_every_datagram_arrives_where_the_table_says(
    steering_mode: SteeringMode, table: VectorGroup, host: str, drop_invalid: bool
) -> None:
    split, banks = layout(table)
    with SteeringGroup.open(
        f"{host}:0",
        table.listeners,
        split=split,
        banks=banks,
        mode=steering_mode,
        cid_length=table.cid_length,
        key=table.key,
        drop_invalid=drop_invalid,
    ) as group:
        sockets = group_sockets(group, table)
        assert len(sockets) == table.slots
        expected = dict.fromkeys(Outcome, 0)
        with socket.socket(sockets[0].family, socket.SOCK_DGRAM) as client:
            client.connect(group.addresses[0])
            for vector in table.vectors:
                client.send(vector.datagram)
                expected[vector.outcome] += 1
                received = {slot: data for slot, sock in enumerate(sockets) if (data := receive_all(sock))}
                if drop_invalid and vector.outcome in (Outcome.UNROUTABLE, Outcome.MALFORMED):
                    assert received == {}, vector.name
                else:
                    [(slot, data)] = received.items()
                    assert data == [vector.datagram], vector.name
                    assert slot == vector.slot or (vector.slot is None and slot < table.listeners), vector.name
        stats = group.stats()
        assert stats.sink == (expected[Outcome.UNROUTABLE] + expected[Outcome.MALFORMED] if drop_invalid else 0)
        assert stats.dropped == 0
        if steering_mode is SteeringMode.EBPF:
            assert stats.outcomes == expected
        else:
            assert stats.outcomes == dict.fromkeys(Outcome)


def test_each_slot_counts_what_it_was_sent(ebpf: SteeringMode) -> None:
    [table] = [table for table in GROUPS if table.slots == 3]
    with SteeringGroup.open("127.0.0.1:0", 3, mode=ebpf, cid_length=8, key=table.key) as group:
        sockets = group_sockets(group, table)
        counts = [dict.fromkeys(Outcome, 0) for _ in sockets]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for vector in table.vectors:
                client.sendto(vector.datagram, group.addresses[0])
                counts[arrivals(sockets).index(1)][vector.outcome] += 1
        for slot in group.stats().slots:
            assert {
                Outcome.ROUTED: slot.routed,
                Outcome.DISPATCHED: slot.dispatched,
                Outcome.UNROUTABLE: slot.unroutable,
                Outcome.MALFORMED: slot.malformed,
            } == counts[slot.slot]


@pytest.mark.parametrize("size", [1200, 9000, 30000, 60000])
def test_large_datagrams_are_steered_though_they_lie_in_pages(steering_mode: SteeringMode, size: int) -> None:
    with SteeringGroup.open("127.0.0.1:0", 4, mode=steering_mode) as group:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for worker in group.workers:
                client.sendto((b"\x40" + worker.connection_ids.issue()).ljust(size, b"\0"), group.addresses[0])
        assert arrivals(worker.socket for worker in group.workers) == [1, 1, 1, 1]
        if steering_mode is SteeringMode.EBPF:
            assert outcomes(group.stats()) == {"routed": 4, "dispatched": 0, "unroutable": 0, "malformed": 0}


def test_a_train_of_segments_follows_its_first_datagram(steering_mode: SteeringMode) -> None:
    udp_segment = 103  # UDP_SEGMENT of include/uapi/linux/udp.h
    with SteeringGroup.open("127.0.0.1:0", 4, mode=steering_mode) as group:
        train = b"".join((b"\x40" + group.workers[2].connection_ids.issue()).ljust(100, b"\0") for _ in range(5))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.IPPROTO_UDP, udp_segment, 100)
            client.sendto(train, group.addresses[0])
        assert arrivals(worker.socket for worker in group.workers) == [0, 0, 5, 0]


def test_a_dual_stack_group_steers_ipv4_too(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("[::]:0", 4, mode=steering_mode) as group:
        port = group.addresses[0][1]
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as v4,
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as v6,
        ):
            for worker in group.workers:
                v4.sendto(b"\x40" + worker.connection_ids.issue() + bytes(30), ("127.0.0.1", port))
                v6.sendto(b"\x40" + worker.connection_ids.issue() + bytes(30), ("::1", port))
        assert arrivals(worker.socket for worker in group.workers) == [2, 2, 2, 2]
