"""``servers``: HTTP/3 requests per second and CPU per request, steered and not, and where the time goes."""

import contextlib
import functools
import mmap
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from quicsteer import SteeringGroup, SteeringMode, SteeringUnavailable
from quicsteer.demo import Identity, make_identity

from . import _stacks
from ._http3 import (
    ANSWERED,
    BODY,
    CONNECTIONS,
    GO,
    IN_FLIGHT,
    RECEIVED,
    STOP,
    Serve,
    Tally,
    add_up,
    keep_busy,
    serve_plain,
    serve_steered,
    work,
)
from .report import Report, Table, first_line, ratio, spread

WORKERS = (1, 2, 4)
PLAIN = "plain"
MODES = {SteeringMode.HASH: (4,), SteeringMode.CBPF: WORKERS, SteeringMode.EBPF: WORKERS}
"""The modes, and with how many workers each is measured: ``hash`` to tell our server from steering."""

_CLIENTS = 2
_WARM = 0.1
_SEED = 1
_PATIENCE = 20.0
_COUNTER_STRIDE = 8  # of 8 bytes: a cache line for each client process
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

_PROFILED = (PLAIN, str(SteeringMode.CBPF), str(SteeringMode.EBPF))
_PROFILED_WORKERS = 1
_PROFILE_SECONDS_MAX = 30
_FUNCTIONS = 12


_NOTES = (
    "Clients and workers share the CPUs, so requests/s is what both together reach; CPU per request is that of the "
    "worker processes alone. A client has as many requests in flight as it is allowed, always.",
    "Over loopback the kernel's receive path, and in it the steering program, runs in the system call of the client "
    "that sends: it is in no figure of this table, but in those of `cost`.",
    "`plain`: aioquic's own QuicServer in every process, each with a socket of its own (SO_REUSEPORT), no program. All "
    "other variants are quicsteer.aioquic; `hash` is that without steering. Datagrams are those that the server sends.",
)


@dataclass
class _Variant:
    """Worker processes behind one port, and what was measured of them: a value per round, ticks of all rounds."""

    name: str
    workers: int
    address: tuple[str, int]
    pids: list[int]
    rates: list[float] = field(default_factory=list)
    costs: list[float] = field(default_factory=list)
    datagrams: list[float] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    ticks: int = 0
    kernel_ticks: int = 0


class _Sample(NamedTuple):
    """What there is to see at one moment: counts, and seconds."""

    answers: int
    datagrams: int
    cpu: float
    ticks: int
    kernel_ticks: int
    now: float


class _Processes:
    """Forked processes that live until the block ends, or this process, whatever ends it."""

    def __init__(self) -> None:
        self._context = get_context("fork")
        self._life, self._alive = os.pipe()
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> "_Processes":
        return self

    def start(self, target: Callable[..., None], *arguments: Any) -> int:
        process = self._context.Process(target=self._run, args=(target, *arguments))
        process.start()
        self._processes.append(process)
        assert process.pid
        return process.pid

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
        os.close(self._alive)
        target(self._life, *arguments)

    def __exit__(self, *exception: object) -> None:
        os.close(self._alive)
        os.close(self._life)
        for process in self._processes:
            process.join(_PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


class _Clients:
    """Processes that keep a server busy."""

    def __init__(self, processes: _Processes) -> None:
        self.pids: list[int] = []
        self._pipes: list[Connection[Any, Any]] = []
        self._counters = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("B").cast("Q")
        for index in range(_CLIENTS):
            ours, theirs = get_context("fork").Pipe()
            pid = processes.start(keep_busy, theirs, self._counters[index * _COUNTER_STRIDE :])
            theirs.close()
            self.pids.append(pid)
            self._pipes.append(ours)

    def _count(self, what: int) -> int:
        return sum(self._counters[index * _COUNTER_STRIDE + what] for index in range(_CLIENTS))

    @contextlib.contextmanager
    def busy(self, variant: _Variant) -> Iterator[None]:
        """Have requests made of a variant until the block ends; then note what became of them all."""
        self._tell(variant.address)
        self._hear()
        self._tell(GO)
        time.sleep(_WARM)
        yield
        self._tell(STOP)
        variant.tallies.append(add_up(self._hear()))

    def _tell(self, what: object) -> None:
        for pipe in self._pipes:
            pipe.send(what)

    def _hear(self) -> list[Any]:
        return [pipe.recv() for pipe in self._pipes]

    def sample(self, variant: _Variant) -> _Sample:
        ticks = [_cpu_ticks(pid) for pid in variant.pids]
        return _Sample(
            self._count(ANSWERED),
            self._count(RECEIVED),
            sum(time.clock_gettime(_cpu_clock(pid)) for pid in variant.pids),
            sum(map(sum, ticks)),
            sum(kernel for _, kernel in ticks),
            time.perf_counter(),
        )


def _cpu_clock(pid: int) -> int:
    """Return the clock of the CPU time of a process, to the nanosecond (clock_getcpuclockid(3))."""
    return ~pid << 3 | 2


def _cpu_ticks(pid: int) -> tuple[int, int]:
    """Return the clock ticks of a process in user space and in the kernel (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]), int(fields[12])


def run(rounds: int, seconds: float = 2.0, progress: Callable[[str], None] = lambda _: None) -> Report:
    """Measure all variants, ``seconds`` each in every round, in an order that is shuffled anew."""
    notes: list[str] = []
    with contextlib.ExitStack() as groups, _Processes() as processes:
        variants = list(_start_variants(groups, processes, notes))
        clients = _Clients(processes)
        order = random.Random(_SEED)
        for number in range(rounds):
            progress(f"servers: round {number + 1} of {rounds}")
            for variant in order.sample(variants, len(variants)):
                _measure(clients, variant, seconds)
        progress("servers: where the time goes")
        profile_seconds = min(max(1, round(rounds * seconds)), _PROFILE_SECONDS_MAX)
        profiles = _profile(clients, variants, profile_seconds, notes)
    return Report(
        "servers",
        {
            "aioquic": version("aioquic"),
            "rounds": rounds,
            "seconds": seconds,
            "client processes": _CLIENTS,
            "connections": _CLIENTS * CONNECTIONS,
            "requests in flight per connection": IN_FLIGHT,
            "bytes of an answer": len(BODY),
        },
        [_table(variants), *_profile_tables(variants, profiles)],
        [],
        [*_NOTES, *notes],
        {f"{variant.workers} x {variant.name}, us": variant.costs for variant in variants},
    )


def _start_variants(stack: contextlib.ExitStack, processes: _Processes, notes: list[str]) -> Iterator[_Variant]:
    identity = make_identity()
    for workers in WORKERS:
        yield _start_plain(processes, workers, identity)
        for mode in (mode for mode, counts in MODES.items() if workers in counts):
            try:
                group = SteeringGroup.open("127.0.0.1:0", workers, mode=mode, split=mode.steers)
            except SteeringUnavailable as error:
                notes.append(f"Left out: {workers} x {mode}. {first_line(error)}")
                continue
            stack.enter_context(group)
            starts = [functools.partial(serve_steered, worker, identity) for worker in group.workers]
            yield _Variant(str(mode), workers, group.addresses[0], _start_workers(processes, starts))


def _start_plain(processes: _Processes, workers: int, identity: Identity) -> _Variant:
    with contextlib.ExitStack() as stack:
        sockets: list[socket.socket] = []
        for _ in range(workers):
            sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind(sockets[0].getsockname() if sockets else ("127.0.0.1", 0))
            sockets.append(sock)
        starts = [functools.partial(serve_plain, sock, identity) for sock in sockets]
        return _Variant(PLAIN, workers, sockets[0].getsockname(), _start_workers(processes, starts))


def _start_workers(processes: _Processes, starts: Sequence[Serve]) -> list[int]:
    """Start a process for each, and wait until they serve."""
    waiting, ready = os.pipe()
    try:
        pids = [processes.start(work, start, ready) for start in starts]
        os.close(ready)
        for _ in pids:
            if not os.read(waiting, 1):
                raise RuntimeError("a worker process does not start")
    finally:
        os.close(waiting)
    return pids


def _measure(clients: _Clients, variant: _Variant, seconds: float) -> None:
    with clients.busy(variant):
        before = clients.sample(variant)
        time.sleep(seconds)
        after = clients.sample(variant)
    answers = after.answers - before.answers
    if not answers:
        raise RuntimeError(f"{variant.workers} x {variant.name}: no answer in {seconds:g} s")
    variant.rates.append(answers / (after.now - before.now))
    variant.costs.append((after.cpu - before.cpu) / answers * 1e6)
    variant.datagrams.append((after.datagrams - before.datagrams) / answers)
    variant.kernel_ticks += after.kernel_ticks - before.kernel_ticks
    variant.ticks += after.ticks - before.ticks


def _table(variants: Sequence[_Variant]) -> Table:
    plain = {variant.workers: variant.costs for variant in variants if variant.name == PLAIN}
    rows: list[list[Any]] = []
    for variant in variants:
        total = add_up(variant.tallies)
        rows.append(
            [
                variant.workers,
                variant.name,
                spread(variant.rates),
                spread(variant.costs),
                ratio(variant.costs, plain[variant.workers]) if variant.name != PLAIN else None,
                f"{variant.kernel_ticks / max(variant.ticks, 1):.0%}",
                spread(variant.datagrams),
                *total,
            ]
        )
    columns = (
        "workers",
        "variant",
        "requests/s",
        "CPU per request, us",
        "over plain",
        "in the kernel",
        "datagrams per request",
        "requests answered",
        "not with 200",
        "unanswered",
    )
    return Table("HTTP/3, median [quartiles]", columns, rows)


def _profile(
    clients: _Clients, variants: Sequence[_Variant], seconds: int, notes: list[str]
) -> dict[str, _stacks.Profile]:
    """Return where the time of each profiled variant goes; without py-spy nothing."""
    py_spy = _stacks.find_py_spy()
    if py_spy is None:
        notes.append("Left out: where the time goes. There is no py-spy here (pip install py-spy).")
        return {}
    profiles = {}
    for variant in variants:
        if variant.workers == _PROFILED_WORKERS and variant.name in _PROFILED:
            try:
                with _apart(variant.pids, clients.pids), clients.busy(variant):
                    profiles[variant.name] = _stacks.record(py_spy, variant.pids[0], seconds)
            except _stacks.ProfileFailed as error:
                notes.append(f"Left out: where the time of {variant.name} goes. {error}")
    if profiles:
        seen = ", ".join(f"{profile.samples:,} of {name}" for name, profile in profiles.items())
        notes.append(
            f"Where the time goes: shares of py-spy's samples ({seen}) times the median CPU per request from the "
            "table above; py-spy was not attached then. For the samples the worker has a CPU of its own. What belongs "
            "to no part, like enum or malloc, counts for its caller."
        )
    return profiles


@contextlib.contextmanager
def _apart(workers: Sequence[int], clients: Sequence[int]) -> Iterator[None]:
    """Give workers a CPU of their own: py-spy cannot tell a process that runs from one that waits for a CPU."""
    cpus = os.sched_getaffinity(0)
    if len(cpus) == 1:
        yield
        return
    own = {max(cpus)}
    for pid in (os.getpid(), *clients):  # py-spy inherits ours
        os.sched_setaffinity(pid, cpus - own)
    for pid in workers:
        os.sched_setaffinity(pid, own)
    try:
        yield
    finally:
        for pid in (os.getpid(), *clients, *workers):
            os.sched_setaffinity(pid, cpus)


def _profile_tables(variants: Sequence[_Variant], profiles: dict[str, _stacks.Profile]) -> list[Table]:
    costs = {variant.name: variant.costs for variant in variants if variant.workers == _PROFILED_WORKERS}
    columns = {name: spread(costs[name]).median for name in profiles}
    parts = {name: profile.parts for name, profile in profiles.items()}
    functions = {name: profile.functions for name, profile in profiles.items()}
    if not profiles:
        return []
    return [
        _shares_table("Where the time goes, us per request, one worker", "part", parts, columns),
        _shares_table("By function, without what it calls, us per request", "function", functions, columns, _FUNCTIONS),
    ]


def _shares_table(
    title: str, what: str, shares: dict[str, dict[str, float]], costs: dict[str, float], limit: int | None = None
) -> Table:
    """Make a table with a column per variant, in the order of the last one."""
    names = {name: None for each in reversed(shares.values()) for name in each}
    rows: list[list[Any]] = [
        [name, *(f"{each.get(name, 0.0) * costs[variant]:.1f}" for variant, each in shares.items())]
        for name in list(names)[:limit]
    ]
    return Table(title, (what, *shares), rows)
