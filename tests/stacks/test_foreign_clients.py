"""Debian's ngtcp2-client on ``quicsteer hypercorn``: forty of forty in each of its scenarios; without steering, not."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from gtlsclient import REBIND, fetch, need_gtlsclient, was_served
from hypercorn_service import hypercorn

from quicsteer import SteeringMode

RUNS = 40
AT_ONCE = 8

SCENARIOS = {
    "none": [],
    "rebinding": REBIND,
    "migration": ["--change-local-addr=250ms", "--delay-stream=500ms"],
    "zero-length client connection ID": ["--scid=", *REBIND],
    "another version first": ["--version=v2draft", "--preferred-versions=v2draft,v1", *REBIND],
}
"""This client speaks a draft of QUIC version 2 that nobody else does: it is told our versions, and goes on in 1."""


@pytest.fixture(autouse=True)
def client() -> None:
    need_gtlsclient()


def fetch_all(address: tuple[str, int], options: list[str]) -> list[str]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda _: fetch(address, *options), range(RUNS)))


def failures(logs: list[str], options: list[str]) -> list[str]:
    moved = any("change-local-addr" in option for option in options)
    return [log for log in logs if not was_served(log, moved, body=None)]


def test_forty_of_forty_are_served(steering_mode: SteeringMode) -> None:
    with hypercorn("--mode", steering_mode) as running:
        for name, options in SCENARIOS.items():
            failed = failures(fetch_all(running.quic_address, options), options)
            assert not failed, f"{name}: {len(failed)} of {RUNS} failed, the first one:\n{failed[0][-4000:]}"
        stats = running.command("stats")["group"]
        assert (stats["dropped"], stats["outcomes"]["unroutable"] or 0) == (0, 0)


def test_behind_a_retry_forty_of_forty_are_served(steering_mode: SteeringMode) -> None:
    with hypercorn("--mode", steering_mode, "--retry-above", "0") as running:
        logs = fetch_all(running.quic_address, SCENARIOS["migration"])
        assert not failures(logs, SCENARIOS["migration"])


def test_without_steering_they_are_not_all_served() -> None:
    """The control: the same clients and workers where the kernel's hash decides."""
    with hypercorn("--mode", "hash") as running:
        logs = fetch_all(running.quic_address, ["--timeout=2s", *REBIND])
        assert 0 < len(failures(logs, REBIND)) < RUNS


def test_the_page_says_which_process_answered() -> None:
    with hypercorn(workers=2) as running:
        log = fetch(running.quic_address)
        text = "".join(
            line.rpartition("|")[0].rpartition("|")[2] for line in log.splitlines() if re.match(r"[0-9a-f]{8}  ", line)
        )
        assert json.loads(text)["pid"] in running.workers("serving").values()
