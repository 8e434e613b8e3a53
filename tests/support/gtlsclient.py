"""Debian's ngtcp2-client, which ends with status 0 even after a timeout: its output is what counts."""

import os
import re
import shutil
import subprocess

import pytest

REBIND = ["--change-local-addr=250ms", "--nat-rebinding", "--delay-stream=500ms"]


def need_gtlsclient() -> None:
    """Skip a test where the client is not installed; never in CI."""
    if shutil.which("gtlsclient") is None and os.environ.get("QUICSTEER_REQUIRE_KERNEL") != "1":
        pytest.skip("gtlsclient is not installed (Debian: ngtcp2-client)")


def fetch(address: tuple[str, int], *options: str) -> str:
    """Fetch a page; return the client's log."""
    host, port = address
    ending = ["--no-quic-dump", "--exit-on-all-streams-close", "--timeout=20s"]
    command = ["gtlsclient", *ending, *options, host, str(port), f"https://localhost:{port}/"]
    client = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return client.stdout + client.stderr


def was_served(log: str, moved: bool, body: int | None = 9) -> bool:
    """Whether the page arrived, after the client had moved if it was told to."""
    steps = ["Changing local address"] if moved else []
    size = r"\d+" if body is None else str(body)
    steps += [re.escape("[:status: 200]"), f"stream 0x0 body {size} bytes"]
    return bool(re.search(".*".join(steps), log, re.DOTALL))
