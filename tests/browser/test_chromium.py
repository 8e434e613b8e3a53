"""Headless Chromium, which nobody here wrote, on ``quicsteer hypercorn``: TCP and HTTP/3 on one port.

It meets the server over TCP, finds HTTP/3 by alt-svc, and goes on there, through a relay that changes its port three
times a second. ``make test-browser`` runs this, and installs the browser (Debian: chromium, chromium-driver).
"""

import contextlib
import os
import socket
import statistics
import struct
from pathlib import Path

import pytest
from browser_app import DELAY, REQUESTS
from hypercorn_service import HypercornService, hypercorn
from quic import IDENTITY
from webdriver import Browser, browser

from quicsteer import SteeringMode
from quicsteer.testing import OpenRelay, UdpRelay

if os.environ.get("QUICSTEER_REQUIRE_BROWSER") != "1":
    pytest.skip("make test-browser runs this", allow_module_level=True)

APPLICATION = f"{Path(__file__).parents[1] / 'support' / 'browser_app.py'}:app"
QUIC_HOST = "127.0.0.2"
REBIND_EVERY = 0.3
LOADS = 3
SLOWER_AT_MOST = 1.3

UNKNOWN_ROOTS = "--origin-to-force-quic-on=127.0.0.1:1"
"""Lets Chromium speak QUIC to 127.0.0.1 although no public authority has signed; it forces nothing on other ports."""


def free_port() -> int:
    """A port that is free for TCP on one address, and for UDP on two."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def ask(window: Browser, count: int = REQUESTS) -> tuple[list[dict[str, object]], float]:
    """Let the page ask the server; return its answers and how many seconds it took."""
    result = window.run(f"ask({count})")
    assert isinstance(result, dict), result
    return result["answers"], result["seconds"]


def visit(window: Browser, port: int, relay: UdpRelay) -> list[float]:
    """Load the page and let it ask again and again; return how long each round took."""
    window.open(f"https://127.0.0.1:{port}/")
    found, _ = ask(window, 4)
    assert found[-1]["http"] == "3", "the browser did not find HTTP/3"
    seconds = []
    workers = set()
    for _ in range(LOADS):
        before = len(relay.ports)
        answers, taken = ask(window)
        assert len(answers) == REQUESTS
        assert {answer["http"] for answer in answers} == {"3"}
        workers |= {answer["worker"] for answer in answers}
        assert len(relay.ports) - before >= REQUESTS * DELAY / REBIND_EVERY / 2
        seconds.append(taken)
    assert len(workers) == 1
    return seconds


def serve(port: int, mode: str, workers: int) -> "contextlib.AbstractContextManager[HypercornService]":
    addresses = ("--bind", f"127.0.0.1:{port}", "--quic-bind", f"{QUIC_HOST}:{port}")
    return hypercorn(*addresses, "--mode", mode, workers=workers, application=APPLICATION)


def measure(mode: str, workers: int, udp_relay: OpenRelay, directory: Path, picture: Path | None = None) -> float:
    """Return the median time of a round of requests."""
    port = free_port()
    directory.mkdir()
    with serve(port, mode, workers), browser(directory, IDENTITY.pem, UNKNOWN_ROOTS) as window:
        relay = udp_relay((QUIC_HOST, port), ("127.0.0.1", port), rebind_every=REBIND_EVERY)
        seconds = visit(window, port, relay)
        image = window.screenshot()
        assert struct.unpack(">II", image[16:24])[0] > 900  # the width in its header
        if picture:
            picture.write_bytes(image)
        relay.close()
    return statistics.median(seconds)


def test_a_page_stays_with_one_worker_and_is_as_fast_as_with_one(
    steering_mode: SteeringMode, udp_relay: OpenRelay, tmp_path: Path
) -> None:
    single = measure(steering_mode, 1, udp_relay, tmp_path / "single")
    picture = os.environ.get("QUICSTEER_SCREENSHOT")
    steered = measure(steering_mode, 4, udp_relay, tmp_path / "four", Path(picture) if picture else None)
    print(f"one worker {single:.2f} s, four steered workers {steered:.2f} s")
    assert steered <= SLOWER_AT_MOST * single
