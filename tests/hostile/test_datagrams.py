"""Each datagram that anybody may send is delivered once, where the model says, or swallowed; nothing is answered."""

import random
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hostile import SIZES, hostile_set, issue, long_header, short_header
from namespaces import ICMP_ERRORS, SERVER_HOSTS, Network, isolated, read_counters
from trial import Trial, open_group

from quicsteer import SteeringMode
from quicsteer.abi import CID_LENGTH_DEFAULT, CID_LENGTH_MAX, Outcome
from quicsteer.decision import Rules, decide

UDP_SEGMENT = 103  # include/uapi/linux/udp.h
MTU_SMALL = 1280  # the least that IPv6 works with
KEY = bytes(range(16))
LISTENERS, SLOTS = 3, 9

V4, V6, MAPPED = "IPv4", "IPv6", "IPv4 to a group of IPv6"
LOOPBACK = {V4: ("127.0.0.1:0", "127.0.0.1"), V6: ("[::1]:0", "::1"), MAPPED: ("[::]:0", "127.0.0.1")}
VETH = {
    V4: ("0.0.0.0:0", SERVER_HOSTS[socket.AF_INET]),
    V6: ("[::]:0", SERVER_HOSTS[socket.AF_INET6]),
    MAPPED: ("[::]:0", SERVER_HOSTS[socket.AF_INET]),
}

Send = Callable[[Trial, socket.socket], Any]


def rules_for(cid_length: int = CID_LENGTH_DEFAULT, drop_invalid: bool = False) -> Rules:
    return Rules(KEY, cid_length, LISTENERS, SLOTS, drop_invalid)


def over_loopback(kind: str, rules: Rules, mode: SteeringMode, send: Send) -> int:
    """Let a client on loopback send; returns how many datagrams came or were swallowed."""
    bind, host = LOOPBACK[kind]
    Network()
    before = read_counters()
    with open_group(bind, rules, mode) as (group, sockets):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            client.connect((host, group.addresses[0][1]))
            return judge(Trial(group, rules, sockets), client, before, send)


def over_veth(kind: str, rules: Rules, mode: SteeringMode, send: Send, mtu: int) -> int:
    """Let a client in another namespace send, whose datagrams come in fragments when they are larger than ``mtu``."""
    bind, host = VETH[kind]
    network = Network(mtu)
    before = read_counters()
    with (
        open_group(bind, rules, mode) as (group, sockets),
        network.client((host, group.addresses[0][1])) as client,
    ):
        return judge(Trial(group, rules, sockets), client, before, send)


def judge(trial: Trial, client: socket.socket, before: dict[str, int], send: Send) -> int:
    send(trial, client)
    trial.verify()
    after = read_counters()
    assert {name: after[name] - before[name] for name in ICMP_ERRORS} == dict.fromkeys(ICMP_ERRORS, 0)
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    return trial.sent


def send_set(trial: Trial, client: socket.socket) -> None:
    trial.send(client, hostile_set(trial.rules))


@pytest.mark.parametrize("drop_invalid", [False, True], ids=["serve-invalid", "drop-invalid"])
@pytest.mark.parametrize("kind", [V4, V6, MAPPED])
def test_over_loopback(steering_mode: SteeringMode, kind: str, drop_invalid: bool) -> None:
    assert isolated(over_loopback, kind, rules_for(drop_invalid=drop_invalid), steering_mode, send_set) > 9000


@pytest.mark.parametrize("cid_length", [9, 14, CID_LENGTH_MAX])
def test_with_other_lengths_of_connection_ids(steering_mode: SteeringMode, cid_length: int) -> None:
    assert isolated(over_loopback, V4, rules_for(cid_length, drop_invalid=True), steering_mode, send_set) > 9000


@pytest.mark.parametrize("mtu", [1500, MTU_SMALL])
@pytest.mark.parametrize("kind", [V4, V6, MAPPED])
def test_over_a_network_that_fragments(steering_mode: SteeringMode, kind: str, mtu: int) -> None:
    drop_invalid = mtu == MTU_SMALL
    assert isolated(over_veth, kind, rules_for(drop_invalid=drop_invalid), steering_mode, send_set, mtu) > 9000


def test_the_fragments_were_fragments(steering_mode: SteeringMode) -> None:
    """The proof that the test above sees what it is about."""
    assert isolated(count_reassembled, steering_mode) == 6 * sum(size > MTU_SMALL - 28 for size in SIZES)


def count_reassembled(mode: SteeringMode) -> int:
    over_veth(V4, rules_for(), mode, send_set, MTU_SMALL)
    return read_counters()["Ip:ReasmOKs"]


@pytest.mark.parametrize("kind", [V4, V6])
def test_the_watch_sees_a_server_that_answers(kind: str) -> None:
    """The proof that silence is seen: a port that nobody has is answered."""
    assert isolated(count_answers, LOOPBACK[kind][1]) == 1


def count_answers(host: str) -> int:
    Network()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((host, 9))
        client.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            client.recv(1)
    counters = read_counters()
    return sum(counters[name] for name in ICMP_ERRORS)


def send_trains(trial: Trial, client: socket.socket, size: int) -> None:
    """Trains whose segments name different slots: the kernel asks once, and all go where the first one goes."""
    source = random.Random(1)
    client.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
    ours = [issue(trial.rules, slot, source) for slot in range(SLOTS)]
    for start in range(SLOTS):
        named = [ours[(start + step) % SLOTS] for step in range(10)]
        trial.send_train(client, [short_header(cid).ljust(size, b"\1") for cid in named])
        others = [source.randbytes(CID_LENGTH_DEFAULT) for _ in range(10)]
        trial.send_train(client, [long_header(0xC0, 1, dcid).ljust(size, b"\2") for dcid in others])
        trial.send_train(client, [short_header(dcid).ljust(size, b"\3") for dcid in others])


@pytest.mark.parametrize("drop_invalid", [False, True], ids=["serve-invalid", "drop-invalid"])
@pytest.mark.parametrize("size", [30, 1200])
@pytest.mark.parametrize("kind", [V4, V6])
def test_a_train_of_segments_goes_where_its_first_one_goes(
    steering_mode: SteeringMode, kind: str, size: int, drop_invalid: bool
) -> None:
    rules = rules_for(drop_invalid=drop_invalid)
    send = partial(send_trains, size=size)
    assert isolated(over_loopback, kind, rules, steering_mode, send) == SLOTS * 30
    assert isolated(over_veth, kind, rules, steering_mode, send, 1500) == SLOTS * 30


def test_the_set_has_every_outcome_and_every_length() -> None:
    rules = rules_for()
    trial_set = hostile_set(rules)
    print(f"{len(trial_set)} datagrams")
    lengths = {datagram[5] for datagram in trial_set if len(datagram) > 5 and datagram[0] >= 0x80}
    assert lengths == set(range(256))
    assert {datagram[0] for datagram in trial_set if datagram} == set(range(256))
    assert max(map(len, trial_set)) == max(SIZES)
    assert {decide(datagram, rules).outcome for datagram in trial_set} == set(Outcome)
