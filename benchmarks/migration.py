"""``migration``: who still reaches its worker after its address has changed, under each rule.

A client's first datagram, which carries a DCID that it chose, lands on some worker; that worker issues the connection
IDs of all that follow. What reaches the same worker is right.
"""

import asyncio
import contextlib
import functools
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic.events import QuicEvent, StreamDataReceived

from quicsteer import SteeringUnavailable
from quicsteer.demo import Identity, make_identity

from . import rules
from ._libbpf import ProgramUnavailable
from ._quic import connect, serve
from .lanes import LONG_HEADER, SHORT_HEADER
from .report import Bar, Report, Table, first_line
from .rules import LOOPBACK, Place, Rule, Steered

WORKERS = (2, 4, 8, 16)
CHANGES = (0, 1, 2, 4)
FLOWS = 200
CONNECTIONS = 25
PATIENCE = 3.0
"""Seconds after which a connection counts as lost; a living one answers within milliseconds."""

RULES = (rules.NONE, rules.EBPF, rules.CBPF, *rules.OTHERS, rules.CONNECTED)
_OURS = (rules.EBPF, rules.CBPF)
_MOVED_IN_USER_SPACE = (rules.MSQUIC, rules.CONNECTED)


class Case(NamedTuple):
    rule: Rule
    workers: int


Shares = dict[Case, list[float]]
"""For each number of changes, the share that still reached its worker."""


def run(progress: Callable[[str], None] = lambda _: None, quick: bool = False) -> Report:
    """Send datagrams and open connections under all rules."""
    sizes = (4,) if quick else WORKERS
    notes: list[str] = []
    cases = [case for case in (Case(rule, workers) for workers in sizes for rule in RULES) if _works(case, notes)]
    datagrams: Shares = {}
    connections: Shares = {}
    identity = make_identity()
    for case in cases:
        progress(f"{case.rule.name}, {case.workers} workers")
        datagrams[case] = _send_datagrams(case)
        if case.rule not in _MOVED_IN_USER_SPACE:
            connections[case] = asyncio.run(_open_connections(case, identity))
    notes.append(
        "msquic's rule chooses by the CPU that takes a datagram in, here that of the sending thread, which a hash of "
        "the flow chooses. Its servers, and those with a socket per flow, move in user space what is at the wrong "
        "worker; that is not done here, so they are in the first table only."
    )
    return Report(
        "migration",
        {"flows": FLOWS, "connections": CONNECTIONS},
        [
            _table(f"Share of {FLOWS} flows' datagrams that reach their worker after so many changes", datagrams),
            _table(f"Share of {CONNECTIONS} QUIC connections that are answered after so many changes", connections),
        ],
        list(_bars(datagrams, connections)),
        notes,
    )


def _works(case: Case, notes: list[str]) -> bool:
    try:
        with contextlib.ExitStack() as stack:
            case.rule.open(stack, LOOPBACK, case.workers)
    except (SteeringUnavailable, ProgramUnavailable) as error:
        notes.append(f"Left out: {case.rule.name} with {case.workers} workers. {first_line(error)}")
        return False
    return True


def _table(title: str, shares: Shares) -> Table:
    rows: list[list[Any]] = [[case.rule.name, case.workers, *values] for case, values in shares.items()]
    rows.sort(key=lambda row: [rule.name for rule in RULES].index(row[0]))
    columns = ("rule", "workers", *(f"after {count}" for count in CHANGES))
    return Table(title, columns, rows)


def _bars(datagrams: Shares, connections: Shares) -> list[Bar]:
    bars = []
    for rule in _OURS:
        for what, shares in (("datagrams", datagrams), ("connections", connections)):
            lost = [(1 - value) * 100 for case, values in shares.items() if case.rule is rule for value in values]
            if lost:
                bars.append(Bar(f"{rule.name}: {what} astray, at the worst", max(lost), 0, "%"))
    return bars


class _Senders:
    """A socket for each address of a flow, on the CPU that a network card might choose for it."""

    def __init__(self, stack: contextlib.ExitStack, count: int) -> None:
        self.sockets = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(count)]
        for sock in self.sockets:
            sock.bind((LOOPBACK.host, 0))
        self._cpus = sorted(os.sched_getaffinity(0))
        stack.callback(os.sched_setaffinity, 0, set(self._cpus))

    def send(self, number: int, datagram: bytes, port: int) -> None:
        source = self.sockets[number].getsockname()[1]
        os.sched_setaffinity(0, {self._cpus[hash((source, port)) % len(self._cpus)]})
        self.sockets[number].sendto(datagram, (LOOPBACK.host, port))


def _send_datagrams(case: Case) -> list[float]:
    right = [0] * len(CHANGES)
    with contextlib.ExitStack() as stack:
        addresses = max(CHANGES) + 1
        senders = _Senders(stack, FLOWS * addresses)
        sources = [sock.getsockname() for sock in senders.sockets[::addresses]]
        steered = case.rule.open(stack, Place(LOOPBACK.host, sources), case.workers)
        for flow in range(FLOWS):
            dcid = secrets.token_bytes(8)
            initial = (LONG_HEADER + bytes([len(dcid)]) + dcid).ljust(64, b"\0")
            senders.send(flow * addresses, initial, steered.port)
            home = _receive(case, steered.sockets)
            for place, changes in enumerate(CHANGES):
                datagram = (SHORT_HEADER + steered.issue(home, dcid)).ljust(64, b"\0")
                senders.send(flow * addresses + changes, datagram, steered.port)
                right[place] += _receive(case, steered.sockets) == home
    return [count / FLOWS for count in right]


def _receive(case: Case, sockets: Sequence[socket.socket]) -> int:
    """Return which worker's socket has the datagram; of connected sockets each worker has its share."""
    for number, sock in enumerate(sockets):
        with contextlib.suppress(BlockingIOError):
            sock.recv(2048)
            listener = number - (len(sockets) - case.workers)
            return listener if listener >= 0 else number % case.workers
    raise RuntimeError("a datagram got lost on loopback")


class _Answering(QuicConnectionProtocol):
    """Says which worker has got a request."""

    def __init__(self, *arguments: Any, worker: int, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._worker = worker

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self._quic.send_stream_data(event.stream_id, bytes([self._worker]), end_stream=True)
            self.transmit()


async def _open_connections(case: Case, identity: Identity) -> list[float]:
    with contextlib.ExitStack() as stack:
        steered = case.rule.open(stack, LOOPBACK, case.workers)
        servers = [await _serve(steered, worker, identity) for worker in range(case.workers)]
        try:
            reached = await asyncio.gather(*(_count_changes(steered.port, identity) for _ in range(CONNECTIONS)))
        finally:
            for server in servers:
                server.close()
    return [sum(count >= changes for count in reached) / CONNECTIONS for changes in CHANGES]


async def _serve(steered: Steered, worker: int, identity: Identity) -> QuicServer:
    return await serve(
        steered.sockets[worker].dup(),
        identity,
        functools.partial(_Answering, worker=worker),
        functools.partial(steered.issue, worker),
        connection_id_length=len(steered.issue(worker, None)),
    )


async def _count_changes(port: int, identity: Identity) -> int:
    """Return after how many changes of its address a connection is still answered; -1 if it never is."""
    answered = -1
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with connect(port, identity, PATIENCE) as client:
            for changes in range(max(CHANGES) + 1):
                if changes:
                    await client.change_address(new_cid=changes % 2 == 0)
                await client.ask(PATIENCE)
                answered = changes
    return answered
