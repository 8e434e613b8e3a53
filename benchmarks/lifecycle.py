"""``lifecycle``: connections and datagrams that a reload and a crash of a worker lose, with quicsteer and without."""

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from quicsteer.control import command
from quicsteer.demo import make_identity
from quicsteer.errors import QuicSteerError

from ._echo import FRESH_PATIENCE, PER_SECOND, Client, open_all, open_fresh, pace, write_identity
from .report import Bar, Report, Table, spread
from .rules import RECEIVE_BUFFER

WORKERS = 4
CONNECTIONS = 100
FRESH = 20
BEFORE, AFTER = 0.5, 1.0
"""The window in which datagrams are counted: seconds before the event, and after it is over."""

_FRESH_INTERVAL = 0.05
_QUIET = 0.5
_LAST_ECHOES = 3.0
_PATIENCE = 20.0
_LEAVE = 0.3
_POLL = 0.02
_SEED = 1

RELOAD, CRASH = "reload", "crash"

_NOTES = (
    "Lost is a connection that has no echo of anything that it sent after the event was over. New connections "
    f"come one each {_FRESH_INTERVAL * 1000:g} ms, from the beginning of the event, and failed if they do not "
    f"complete their handshake and have one datagram echoed within {FRESH_PATIENCE:g} s. Datagrams within the window "
    "count as lost without an echo; QUIC does not send DATAGRAM frames again. All server sockets have a receive buffer "
    f"of {RECEIVE_BUFFER >> 20} MiB, so that a busy CPU alone loses none. Seconds are those of the event, until all "
    "workers serve that shall; old ones of quicsteer go on with the connections that they have.",
    "`SO_REUSEPORT`: aioquic's own server; a reload starts new processes, waits until they serve, and ends the old "
    "ones with SIGTERM, which close their connections at once. `classic group, renumbered` does the same in a group "
    "that has had Envoy's published filter from its first socket on: its connection IDs lead to the index of a socket, "
    "and the index changes when a socket is closed. A server that lets its old processes drain would lose fewer "
    "connections in a reload.",
)


class _Service(Protocol):
    """Worker processes that can be replaced, and killed."""

    address: tuple[str, int]

    def reload(self) -> None:
        """Put new processes in the place of all; return when those serve that shall."""

    def crash(self, index: int) -> int:
        """Kill a worker, return its pid when there is another."""


class _Supervised:
    """``quicsteer run``."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: Path) -> None:
        self._process = process
        self._control = control
        host, port = self._await(lambda status: True)["addresses"][0]
        self.address = (host, port)

    def _await(self, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Return the status in which all workers serve and something is done."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            with contextlib.suppress(QuicSteerError):
                status = command(self._control, {"command": "status"}, lambda _: None)
                if len(_serving(status)) == WORKERS and done(status):
                    return status
            if self._process.poll() is not None:
                raise RuntimeError(f"quicsteer run has ended with status {self._process.returncode}")
            time.sleep(_POLL)
        raise TimeoutError(f"quicsteer run: not done after {_PATIENCE:g} s")

    def reload(self) -> None:
        self._process.send_signal(signal.SIGHUP)
        self._await(lambda status: bool(status["reloads"]) and not status["reloading"])

    def crash(self, index: int) -> int:
        victim = next(worker["pid"] for worker in _serving(self._await(lambda _: True)) if worker["index"] == index)
        os.kill(victim, signal.SIGKILL)
        self._await(lambda status: victim not in [worker["pid"] for worker in status["workers"]])
        return int(victim)


def _serving(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [worker for worker in status["workers"] if worker["state"] == "serving"]


@contextlib.contextmanager
def _supervised(directory: Path, identity: Path) -> Iterator[_Service]:
    control = directory / "control.sock"
    options = ["--bind", "127.0.0.1:0", "--workers", str(WORKERS), "--control", str(control)]
    options += ["--receive-buffer", str(RECEIVE_BUFFER)]
    program = [sys.executable, "-m", "benchmarks._echo", str(identity)]
    process = subprocess.Popen(
        [sys.executable, "-m", "quicsteer", "run", *options, "--", *program],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield _Supervised(process, control)
    finally:
        _end_supervised(process)


def _end_supervised(process: "subprocess.Popen[bytes]") -> None:
    """Let the workers end; if they do not, have them killed; if that fails, kill them and their supervisor."""
    for patience in (_LEAVE, _PATIENCE):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    for pid in map(int, workers):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class _Alone:
    """Processes that share a port, with the kernel's hash or with Envoy's filter, and this process as their parent."""

    def __init__(self, identity: Path, envoy: bool) -> None:
        self._command = [sys.executable, "-m", "benchmarks._echo", str(identity), str(WORKERS if envoy else 0)]
        self._started: list[subprocess.Popen[bytes]] = []
        self._workers: list[subprocess.Popen[bytes]] = []
        self.address = ("127.0.0.1", 0)

    def start(self) -> None:
        """Start the first workers."""
        self._workers = self._start(WORKERS)

    def _start(self, count: int) -> "list[subprocess.Popen[bytes]]":
        """Start processes, have them bind one after the other, and wait until they serve."""
        fresh = []
        for _ in range(count):
            fresh.append(subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            self._started.append(fresh[-1])
        for process in fresh:
            assert process.stdin
            assert process.stdout
            process.stdin.write(b"%d\n" % self.address[1])
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("a worker process does not start")
            self.address = (self.address[0], int(line))
        return fresh

    def reload(self) -> None:
        fresh = self._start(WORKERS)
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            process.wait(_PATIENCE)
        self._workers = fresh

    def crash(self, index: int) -> int:
        victim = self._workers[index]
        victim.kill()
        victim.wait()
        (self._workers[index],) = self._start(1)
        return victim.pid

    def stop(self) -> None:
        """End all that were started."""
        for process in self._started:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()


@contextlib.contextmanager
def _alone(_directory: Path, identity: Path, envoy: bool = False) -> Iterator[_Service]:
    service = _Alone(identity, envoy)
    try:
        service.start()
        yield service
    finally:
        service.stop()


@contextlib.contextmanager
def _renumbered(directory: Path, identity: Path) -> Iterator[_Service]:
    with _alone(directory, identity, envoy=True) as service:
        yield service


OURS = "quicsteer run"
VARIANTS: dict[str, Callable[[Path, Path], contextlib.AbstractContextManager[_Service]]] = {
    OURS: _supervised,
    "SO_REUSEPORT": _alone,
    "classic group, renumbered": _renumbered,
}


class _Trial(NamedTuple):
    """One event. ``touched`` are connections of the workers that were replaced or killed."""

    touched: int
    touched_lost: int
    bystanders: int
    bystanders_lost: int
    fresh_failed: int
    sent: int
    sent_lost: int
    survivors_lost: int
    seconds: float


def run(rounds: int, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Have each variant go through a reload and a crash in every round, in an order that is shuffled anew."""
    trials: dict[tuple[str, str], list[_Trial]] = {(event, name): [] for event in (RELOAD, CRASH) for name in VARIANTS}
    order = random.Random(_SEED)
    with tempfile.TemporaryDirectory() as directory:
        identity = Path(directory, "identity.pem")
        write_identity(make_identity(), identity)
        for number in range(rounds):
            for name in order.sample(list(VARIANTS), len(VARIANTS)):
                progress(f"lifecycle: round {number + 1} of {rounds}, {name}")
                with VARIANTS[name](Path(directory), identity) as service:
                    trials[RELOAD, name].append(asyncio.run(_reload(service)))
                    trials[CRASH, name].append(asyncio.run(_crash(service, order.randrange(WORKERS))))
    return _report(rounds, trials)


async def _reload(service: _Service) -> _Trial:
    def event(workers: set[int]) -> set[int]:
        service.reload()
        return workers

    return await _go_through(service, event)


async def _crash(service: _Service, index: int) -> _Trial:
    return await _go_through(service, lambda _: {service.crash(index)})


async def _go_through(service: _Service, event: Callable[[set[int]], set[int]]) -> _Trial:
    """Have clients send through an event, which gets the workers' pids and returns those that are no more."""
    clients = await open_all(service.address, CONNECTIONS)
    pacing = asyncio.create_task(pace(clients))
    try:
        await asyncio.sleep(BEFORE)
        workers = {client: client.worker for client in clients}
        start = time.monotonic()
        fresh = asyncio.create_task(open_fresh(service.address, FRESH, _FRESH_INTERVAL))
        touched = await asyncio.to_thread(event, set(workers.values()))
        over = time.monotonic()
        await asyncio.sleep(AFTER)
        end = time.monotonic()
        pacing.cancel()
        fresh_failed = await fresh
        await _hear_last(clients)
    finally:
        pacing.cancel()
        for client in clients:
            client.leave()
    alive = {client for client in clients if _answers(client, over)}
    counts = {client: client.lost(start - BEFORE, end) for client in clients}
    mine = [client for client in clients if workers[client] in touched]
    others = [client for client in clients if workers[client] not in touched]
    return _Trial(
        len(mine),
        sum(client not in alive for client in mine),
        len(others),
        sum(client not in alive for client in others),
        fresh_failed,
        sum(sent for sent, _ in counts.values()),
        sum(lost for _, lost in counts.values()),
        sum(counts[client][1] for client in alive),
        over - start,
    )


def _answers(client: Client, moment: float) -> bool:
    """Tell whether anything was echoed that a client sent after a moment."""
    return any(client.sent[number] >= moment for number in client.echoes)


async def _hear_last(clients: Sequence[Client]) -> None:
    """Wait for the last echoes: until none has come for a while."""
    deadline, heard = time.monotonic() + _LAST_ECHOES, -1
    while time.monotonic() < deadline:
        count = sum(len(client.echoes) for client in clients)
        if count == heard:
            return
        heard = count
        await asyncio.sleep(_QUIET)


def _report(rounds: int, trials: dict[tuple[str, str], list[_Trial]]) -> Report:
    reloads = {name: trials[RELOAD, name] for name in VARIANTS}
    crashes = {name: trials[CRASH, name] for name in VARIANTS}
    return Report(
        "lifecycle",
        {
            "aioquic": version("aioquic"),
            "rounds": rounds,
            "workers": WORKERS,
            "connections": CONNECTIONS,
            "datagrams/s of each": PER_SECOND,
            "window": f"{BEFORE:g} s before until {AFTER:g} s after",
        },
        [_reload_table(reloads), _crash_table(crashes)],
        [
            Bar("quicsteer run: connections lost in a reload, at worst", _worst(reloads[OURS], 1), 0, "connections"),
            Bar("quicsteer run: bystanders lost in a crash, at worst", _worst(crashes[OURS], 3), 0, "connections"),
        ],
        list(_NOTES),
        {
            f"{event}, {name}: connections lost": [trial.touched_lost + trial.bystanders_lost for trial in each]
            for (event, name), each in trials.items()
        },
    )


def _worst(trials: Sequence[_Trial], column: int) -> float:
    return max(trial[column] for trial in trials)


def _of(trials: Sequence[_Trial], part: str, whole: str) -> str:
    """Say how many of how many, in all rounds."""
    parts, wholes = (sum(getattr(trial, name) for trial in trials) for name in (part, whole))
    return f"{parts:,} of {wholes:,}"


def _common_cells(trials: Sequence[_Trial]) -> list[Any]:
    seconds = [trial.seconds for trial in trials]
    return [
        f"{sum(trial.fresh_failed for trial in trials)} of {FRESH * len(trials)}",
        _of(trials, "sent_lost", "sent"),
        sum(trial.survivors_lost for trial in trials),
        spread(seconds) if len(seconds) > 1 else seconds[0],
    ]


_COMMON = ("new connections failed", "datagrams lost", "of them by connections that live on", "seconds")


def _reload_table(reloads: dict[str, list[_Trial]]) -> Table:
    return Table(
        "Reload of all workers, all rounds",
        ("variant", "connections lost", *_COMMON),
        [[name, _of(trials, "touched_lost", "touched"), *_common_cells(trials)] for name, trials in reloads.items()],
    )


def _crash_table(crashes: dict[str, list[_Trial]]) -> Table:
    rows = []
    for name, trials in crashes.items():
        lost = _of(trials, "touched_lost", "touched"), _of(trials, "bystanders_lost", "bystanders")
        rows.append([name, *lost, *_common_cells(trials)])
    columns = ("variant", "of the killed worker lost", "of other workers lost", *_COMMON)
    return Table("SIGKILL of one worker, all rounds", columns, rows)
