"""A foreign client, Debian's ngtcp2-client, against aioquic HTTP/3 workers.

``gtlsclient`` ends with status 0 even after a timeout, so its output is what counts.
"""

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from quic import Processes, processes, serve_h3

from quicsteer import Outcome, SteeringGroup, SteeringMode

RUNS = 12
AT_ONCE = 6
WORKERS = 4

REBIND = ["--change-local-addr=250ms", "--nat-rebinding", "--delay-stream=500ms"]
MIGRATE = ["--change-local-addr=250ms", "--delay-stream=500ms"]
SCENARIOS = {
    "none": [],
    "rebinding": REBIND,
    "migration": MIGRATE,
    "zero-length client connection ID": ["--scid=", *REBIND],
}

GTLSCLIENT = shutil.which("gtlsclient")
if GTLSCLIENT is None and os.environ.get("QUICSTEER_REQUIRE_KERNEL") != "1":
    pytest.skip("gtlsclient is not installed (Debian: ngtcp2-client)", allow_module_level=True)


def command(address: tuple[str, int], *options: str) -> list[str]:
    host, port = address
    ending = ["--no-quic-dump", "--exit-on-all-streams-close", "--timeout=20s"]
    return ["gtlsclient", *ending, *options, host, str(port), f"https://localhost:{port}/"]


def fetch(address: tuple[str, int], *options: str) -> str:
    """Fetch a page; return the client's log."""
    client = subprocess.run(command(address, *options), capture_output=True, text=True, timeout=60, check=False)
    return client.stdout + client.stderr


def was_served(log: str, moved: bool) -> bool:
    """Whether the page arrived, after the client had moved if it was told to."""
    steps = ["Changing local address"] if moved else []
    return bool(re.search(".*".join([*steps, re.escape("[:status: 200]"), "stream 0x0 body 9 bytes"]), log, re.DOTALL))


def assert_all_served(group: SteeringGroup, options: list[str]) -> None:
    moved = any("change-local-addr" in option for option in options)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        logs = list(pool.map(lambda _: fetch(group.addresses[0], *options), range(RUNS)))
    failed = [log for log in logs if not was_served(log, moved)]
    assert not failed, f"{len(failed)} of {RUNS} failed, the first one:\n{failed[0][-4000:]}"
    outcomes = group.stats().outcomes
    assert outcomes[Outcome.UNROUTABLE] == outcomes[Outcome.MALFORMED] in (0, None)


@pytest.mark.parametrize("options", SCENARIOS.values(), ids=list(SCENARIOS))
@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
def test_every_client_is_served_wherever_it_moves(steering_mode: SteeringMode, split: bool, options: list[str]) -> None:
    with (
        SteeringGroup.open("127.0.0.1:0", WORKERS, mode=steering_mode, split=split) as group,
        processes(group, serve_h3),
    ):
        assert_all_served(group, options)


def test_every_client_is_served_behind_a_retry(steering_mode: SteeringMode) -> None:
    serve = functools.partial(serve_h3, retry=True)
    with (
        SteeringGroup.open("127.0.0.1:0", WORKERS, mode=steering_mode, split=True) as group,
        processes(group, serve),
    ):
        assert_all_served(group, MIGRATE)


def test_a_client_of_a_worker_that_was_killed_learns_it_by_a_stateless_reset(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode, split=True) as group:
        started = Processes()
        try:
            victim = started.start(group.workers[0], serve_h3)
            arguments = command(group.addresses[0], "--delay-stream=2s")
            with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as client:
                assert client.stderr
                assert any("QUIC handshake has been confirmed" in line for line in client.stderr)
                victim.kill()
                victim.join()
                started.start(group.worker(0), serve_h3)
                log = client.stderr.read()
        finally:
            started.stop()
    assert re.search("pkt rx 0 SR token=.*ERR_DRAINING", log, re.DOTALL), log[-4000:]
