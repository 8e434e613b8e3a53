"""The benchmarks' rules of other servers do what is published, so that the comparison is a fair one."""

import contextlib
import os
import socket
from collections.abc import Iterator

import benchmark_package
import pytest

benchmark_package.load()

from benchmarks import cost, rules  # noqa: E402
from benchmarks._aes import inverse_substitutions, substitutions  # noqa: E402
from benchmarks._native import Arrival  # noqa: E402
from benchmarks.lanes import Astray, Path, Plan, Traffic, loopback, make_load, measure, open_lane  # noqa: E402
from benchmarks.report import from_json, render  # noqa: E402
from benchmarks.rules import Rule, Steered  # noqa: E402

WORKERS = 5
PLAN = Plan(rounds=2, seed=1, cpu=min(os.sched_getaffinity(0)))
STEERING = [rule for rule in (rules.EBPF, rules.CBPF, *rules.OTHERS) if rule.steers]


@pytest.fixture
def path() -> Iterator[Path]:
    with loopback() as path:
        yield path


def reached(steered: Steered, datagram: bytes) -> list[int]:
    """Send a datagram from a new port; return who got one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(datagram, (rules.LOOPBACK.host, steered.port))
    found = []
    for worker, sock in enumerate(steered.sockets):
        with contextlib.suppress(BlockingIOError):
            sock.recv(2048)
            found.append(worker)
    return found


@pytest.mark.parametrize("rule", STEERING, ids=str)
def test_a_connection_id_leads_to_the_worker_that_issued_it(rule: Rule) -> None:
    with contextlib.ExitStack() as stack:
        steered = rule.open(stack, rules.LOOPBACK, WORKERS)
        for number in range(20 * WORKERS):
            cid = steered.issue(number % WORKERS, None)
            assert len(cid) == rule.cid_length
            assert reached(steered, b"\x40" + cid + bytes(32)) == [number % WORKERS]


@pytest.mark.parametrize("rule", [rules.EBPF, rules.CBPF, rules.ENVOY, rules.ours_with_table(256)], ids=str)
def test_a_dcid_of_a_client_leads_where_the_rule_says(rule: Rule) -> None:
    with contextlib.ExitStack() as stack:
        steered = rule.open(stack, rules.LOOPBACK, 4)
        for number in range(100):
            dcid = rules.random_cid(8 + number % 13)(0, None)
            datagram = b"\xc3\x00\x00\x00\x01" + bytes([len(dcid)]) + dcid + bytes(32)
            assert reached(steered, datagram) == [steered.initial(dcid)]


@pytest.mark.parametrize(
    ("dcid", "cid"),
    [("0102030405060708090a0b0c0d0e0f10", "010203044ffbece7"), ("8394c8f03e515708", "8394c8f032f7c8a3")],
)
def test_connection_ids_follow_each_other_as_envoys_do(dcid: str, cid: str) -> None:
    assert rules.envoy_cid(bytes.fromhex(dcid)).hex() == cid


@pytest.mark.parametrize(
    ("generation", "index", "cookie"),
    [(0, 0, 0x0080), (1, 0, 0x00A1), (31, 0, 0x007F), (0, 1, 0x01A0), (3, 5, 0x0543), (1, 255, 0xFFA1)],
)
def test_cookies_are_those_of_udpgrm(generation: int, index: int, cookie: int) -> None:
    assert rules.udpgrm_cookie(generation, index) == cookie.to_bytes(2)


def test_the_s_box_is_the_one_of_fips_197() -> None:
    assert substitutions()[:4].hex() == "637c777b"
    assert inverse_substitutions()[0xED] == 0x53


@pytest.mark.filterwarnings("ignore::quicsteer.ForeignConnectionIdWarning")
def test_all_variants_of_the_cost_are_measured_and_nothing_goes_astray(path: Path) -> None:
    report = cost.run(4, make_load(64, 64, 2), path, PLAN)
    assert [row[0] for row in report.tables[0].rows] == [variant.name for variant in cost.VARIANTS]
    assert not any(note.startswith("Left out") for note in report.notes)
    assert render(from_json(report.to_json())) == render(report)


def test_there_are_no_figures_when_a_datagram_goes_astray(path: Path) -> None:
    with contextlib.ExitStack() as stack:
        load = make_load(64, 64, 1)
        lane = open_lane(stack, "plain", rules.NONE, Traffic.OURS, workers=4, load=load, path=path)
        misled = lane._replace(arrival=Arrival.AT_NAMED_SOCKET)
        with pytest.raises(Astray, match="at the wrong socket"):
            measure([misled], path, load.batches, PLAN)
