"""``readout``: what it costs to look: reading a large group, a look at any port, a scrape under load."""

import contextlib
import mmap
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from quicsteer import SteeringGroup, SteeringMode, SteeringUnavailable
from quicsteer.control import command
from quicsteer.errors import QuicSteerError

from ._drain import COUNT
from .report import RATIO, Bar, Report, Table, differences, first_line, ratio, spread

WORKERS = 256
STATS_LIMIT_MS = 3.0
OTHERS = 1000
COMMAND_LIMIT_MS = 200.0
RATE = 30_000
SECONDS = 1.0
SCRAPE_LIMIT = 1.02

_SERVICE_WORKERS = 4
_TICKS = 100
_PATIENCE = 20.0
_FORMS = {"plain": (False, 1), "split": (True, 1), "split, 2 banks": (True, 2)}


def run(rounds: int, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure all three."""
    notes: list[str] = []
    progress(f"reading groups of {WORKERS} workers")
    times = _measure_stats(rounds, notes)
    progress("the command that looks at a port")
    start, look = _measure_command(rounds)
    progress("scrapes under load")
    quiet, scraped, scrapes = _measure_scrapes(rounds)
    spent = differences(look, start)
    slower = ratio(quiet, scraped)
    return Report(
        "readout",
        {"rounds": rounds},
        [
            Table(
                f"Reading a group of {WORKERS} workers, ms",
                ("mode", "form", "slots", "stats()"),
                [[str(mode), form, slots, spread(values)] for (mode, form, slots), values in times.items()],
            ),
            Table(
                f"A look at a port, with {OTHERS:,} other UDP sockets on the host, ms of the whole process",
                ("python -c pass", "quicsteer stats HOST:PORT", "difference"),
                [[spread(start), spread(look), spent]],
            ),
            Table(
                f"Throughput of {_SERVICE_WORKERS} workers at {RATE:,} datagrams/s, with one scrape per {SECONDS:g} s",
                ("datagrams/s, no scrape", "with a scrape", "a scrape, ms"),
                [[spread(quiet), spread(scraped), spread(scrapes)]],
            ),
        ],
        [
            *(
                Bar(f"{mode}: reading {WORKERS} workers, {form}", spread(values).median, STATS_LIMIT_MS, "ms")
                for (mode, form, _), values in times.items()
                if form in ("plain", "split")
            ),
            Bar("quicsteer stats HOST:PORT beyond the start of Python", spent.median, COMMAND_LIMIT_MS, "ms"),
            Bar("throughput without a scrape over that with one", slower, SCRAPE_LIMIT, RATIO),
        ],
        notes,
        {"no scrape": quiet, "with a scrape": scraped},
    )


def _measure_stats(rounds: int, notes: list[str]) -> dict[tuple[SteeringMode, str, int], list[float]]:
    times: dict[tuple[SteeringMode, str, int], list[float]] = {}
    for mode in (SteeringMode.CBPF, SteeringMode.EBPF):
        for form, (split, banks) in _FORMS.items():
            try:
                group = SteeringGroup.open("127.0.0.1:0", WORKERS, mode=mode, split=split, banks=banks)
            except SteeringUnavailable as error:
                notes.append(f"Left out: {mode}. {first_line(error)}")
                break
            with group:
                values = [_timed(group.stats) for _ in range(max(rounds, 15))]
                times[mode, form, len(group.stats().slots)] = values
    return times


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _measure_command(rounds: int) -> tuple[list[float], list[float]]:
    """Return the milliseconds of an empty program, and of a look at one of very many ports."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(OTHERS + 1)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{sockets[-1].getsockname()[1]}"
        empty = [sys.executable, "-c", "pass"]
        look = [sys.executable, "-m", "quicsteer", "stats", target]
        pairs = [(_timed(lambda: _run(empty)), _timed(lambda: _run(look))) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _run(arguments: list[str]) -> None:
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)


class _Service(NamedTuple):
    address: tuple[str, int]
    metrics: str
    counts: mmap.mmap

    def received(self) -> int:
        return sum(COUNT.unpack_from(self.counts, index * COUNT.size)[0] for index in range(_SERVICE_WORKERS))


@contextlib.contextmanager
def _service() -> Iterator[_Service]:
    """A ``quicsteer run`` whose workers count what they read."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        counts = Path(directory, "counts")
        counts.write_bytes(bytes(mmap.PAGESIZE))
        file = stack.enter_context(counts.open("r+b"))
        shared = stack.enter_context(mmap.mmap(file.fileno(), 0))
        with socket.create_server(("127.0.0.1", 0)) as free:
            metrics = f"127.0.0.1:{free.getsockname()[1]}"
        control = Path(directory, "control.sock")
        options = ["--bind", "127.0.0.1:0", "--workers", str(_SERVICE_WORKERS), "--receive-buffer", str(4 << 20)]
        options += ["--control", str(control), "--metrics", metrics]
        program = [sys.executable, "-m", "benchmarks._drain", str(counts)]
        process = subprocess.Popen(
            [sys.executable, "-m", "quicsteer", "run", *options, "--", *program],
            stderr=subprocess.DEVNULL,
        )
        try:
            yield _Service(_await_service(control), f"http://{metrics}/metrics", shared)
        finally:
            process.terminate()
            process.terminate()  # once more: kill the workers, which know of no orderly end
            try:
                process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await_service(control: Path) -> tuple[str, int]:
    deadline = time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(QuicSteerError):
            status = command(control, {"command": "status"}, lambda _: None)
            if [worker["state"] for worker in status["workers"]] == ["serving"] * _SERVICE_WORKERS:
                host, port = status["addresses"][0]
                return host, port
        if time.monotonic() > deadline:
            raise TimeoutError("the service does not start")
        time.sleep(0.05)


def _measure_scrapes(rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Return datagrams per second without and with a scrape, in turns, and the milliseconds of the scrapes."""
    with _service() as service:
        ours, theirs = get_context("fork").Pipe()
        scraper = get_context("fork").Process(target=_scrape_when_told, args=(theirs, service.metrics))
        scraper.start()
        quiet, scraped, scrapes = [], [], []
        _send_and_count(service, lambda: None)  # warm
        for _ in range(rounds):
            quiet.append(_send_and_count(service, lambda: None))
            scraped.append(_send_and_count(service, lambda: ours.send(True)))
            scrapes.append(ours.recv())
        ours.send(False)
        scraper.join()
    return quiet, scraped, scrapes


def _scrape_when_told(pipe: "Connection[float, bool]", url: str) -> None:
    while pipe.recv():
        pipe.send(_timed(lambda: urllib.request.urlopen(url).read()))


def _send_and_count(service: _Service, in_the_middle: Callable[[], None]) -> float:
    """Send at the rate for a while; return how many datagrams per second were read until all were."""
    datagrams = [b"\xc0\0\0\0\1\x0c" + secrets.token_bytes(12) + bytes(46) for _ in range(RATE // _TICKS)]
    before, start = service.received(), time.perf_counter()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        ticks = round(SECONDS * _TICKS)
        for tick in range(ticks):
            if tick == ticks // 2:
                in_the_middle()
            for datagram in datagrams:
                client.sendto(datagram, service.address)
            left = start + (tick + 1) / _TICKS - time.perf_counter()
            if left > 0:
                time.sleep(left)
    sent = ticks * len(datagrams)
    deadline = time.perf_counter() + SECONDS
    while (received := service.received() - before) < sent and time.perf_counter() < deadline:
        os.sched_yield()
    return received / (time.perf_counter() - start)
