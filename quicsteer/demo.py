"""``quicsteer demo``: what steering is worth on this host, shown with QUIC servers and clients over loopback.

For each mode it starts worker processes with echo servers, connects clients, and has every client change its UDP
source port in mid-connection, as a NAT does, and exchange data again. An answer names the worker that gave it.
"""

import argparse
import asyncio
import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import resource
import secrets
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .abi import Outcome
from .counters import GroupStats
from .errors import SteeringUnavailable
from .group import SteeringGroup
from .modes import SteeringMode
from .worker import Worker

MODES = (SteeringMode.HASH, SteeringMode.CBPF, SteeringMode.EBPF)
"""The modes that are shown, the one that everybody has first."""

START_TIMEOUT = 20.0
HANDSHAKE_TIMEOUT = 15.0
ANSWER_TIMEOUT = 2.5
"""Seconds that a client waits for an answer, plus one for every 100 connections that there are."""

_HANDSHAKES_AT_ONCE = 20
_SPARE_FILES = 256
_REQUEST_LENGTH = 32
_COLUMNS = (
    "mode",
    "connections",
    "survived",
    "same worker",
    "routed",
    "dispatched",
    "unroutable",
    "malformed",
    "dropped",
)


class Identity(NamedTuple):
    """A certificate and its key, made anew for each run and kept in memory."""

    certificate: Any
    key: Any
    pem: bytes


@dataclass
class ModeResult:
    """What a mode did. ``reason`` says why it is not available here; then there are no figures."""

    mode: SteeringMode
    connections: int
    reason: str = ""
    connected: int = 0
    lost: int = 0
    survived: int = 0
    same_worker: int = 0
    seconds: float = 0.0
    outcomes: dict[str, int | None] = field(default_factory=dict)
    dropped: int | None = None
    workers: Counter[int] = field(default_factory=Counter)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain types for JSON."""
        if self.reason:
            return {"mode": str(self.mode), "available": False, "reason": self.reason}
        return {
            "mode": str(self.mode),
            "available": True,
            "connections": self.connections,
            "survived": self.survived,
            "same_worker": self.same_worker,
            "outcomes": self.outcomes,
            "dropped": self.dropped,
            "seconds": round(self.seconds, 2),
            "connections_by_worker": {str(index): self.workers[index] for index in sorted(self.workers)},
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``quicsteer demo``."""
    parser.add_argument("--connections", type=_positive, default=100, metavar="N", help="clients (default: 100)")
    parser.add_argument("--workers", type=_positive, default=4, metavar="N", help="worker processes (default: 4)")
    parser.add_argument(
        "--changes", type=_positive, default=3, metavar="N", help="port changes per client (default: 3)"
    )
    parser.add_argument("--mode", choices=[str(mode) for mode in MODES], help="show this mode only")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Show the modes; return 0 when no connection was lost in a mode that steers, 1 otherwise, 130 after Ctrl-C."""
    try:
        from . import aioquic  # noqa: F401
    except ImportError as error:
        print(f"quicsteer demo: {error}", file=sys.stderr)
        return 1
    _allow_files(arguments.connections + _SPARE_FILES)
    identity = make_identity()
    modes = [SteeringMode(arguments.mode)] if arguments.mode else MODES
    progress = Progress()
    try:
        results = [_show(mode, arguments, identity, progress) for mode in modes]
    except KeyboardInterrupt:
        progress.end("interrupted")
        return 128 + signal.SIGINT
    if arguments.json:
        keys = {"workers": arguments.workers, "changes": arguments.changes}
        print(json.dumps({**keys, "modes": [result.to_dict() for result in results]}, indent=2))
    else:
        print(format_table(results))
        print()
        print(summarize(results, arguments.changes))
    return exit_status(results)


def _show(mode: SteeringMode, arguments: argparse.Namespace, identity: Identity, progress: "Progress") -> ModeResult:
    result = ModeResult(mode, arguments.connections)
    start = time.monotonic()
    try:
        group = SteeringGroup.open("127.0.0.1:0", arguments.workers, mode=mode)
    except SteeringUnavailable as error:
        result.reason = error.reason
        progress.end(f"{mode}: not available, {error.reason}")
        return result
    with group, _processes(group, identity):
        asyncio.run(_Clients(group.addresses[0], arguments.changes, identity, result, progress).run())
        _read_stats(group.stats(), result)
    result.seconds = time.monotonic() - start
    progress.end(f"{mode}: {result.survived} of {result.connections} connections survived, {result.seconds:.1f} s")
    return result


def _read_stats(stats: GroupStats, result: ModeResult) -> None:
    result.outcomes = {outcome.name.lower(): stats.outcomes[outcome] for outcome in Outcome}
    result.dropped = stats.dropped


@contextlib.contextmanager
def _processes(group: SteeringGroup, identity: Identity) -> Iterator[None]:
    """Run a process per worker until the block ends, however it ends.

    The processes live as long as somebody holds the writing end of a pipe, which is this process alone: no kill, no
    signal and no crash of it leaves them behind.
    """
    context = multiprocessing.get_context("fork")
    life, alive = os.pipe()
    waiting, ready = os.pipe()
    processes = []
    try:
        for worker in group.workers:
            process = context.Process(
                target=_work, args=(worker, identity, life, ready, (alive, waiting)), name=f"worker {worker.index}"
            )
            process.start()
            processes.append(process)
        os.close(ready)
        _await_ready(waiting, len(processes))
        yield
    finally:
        for fd in (alive, life, waiting):
            os.close(fd)
        for process in processes:
            process.join(START_TIMEOUT)
            if process.is_alive():
                process.kill()
                process.join()


def _await_ready(waiting: int, count: int) -> None:
    """Wait until each process has written a byte; the pipe ends early when one died before that."""
    for number in range(count):
        if not os.read(waiting, 1):
            raise RuntimeError(f"{count - number} of {count} worker processes did not start")


def _work(worker: Worker, identity: Identity, life: int, ready: int, others: tuple[int, ...]) -> None:
    """Be a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    for fd in others:
        os.close(fd)
    with worker:
        asyncio.run(_serve(worker, identity, life, ready))


async def _serve(worker: Worker, identity: Identity, life: int, ready: int) -> None:
    from aioquic.quic.configuration import QuicConfiguration

    from .aioquic import serve

    configuration = QuicConfiguration(is_client=False, connection_id_length=worker.connection_ids.length)
    configuration.certificate, configuration.private_key = identity.certificate, identity.key
    answer = functools.partial(_answer, worker.index)
    server = await serve(worker, configuration=configuration, stream_handler=answer)
    os.write(ready, b".")
    os.close(ready)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(life, ended.set)
    await ended.wait()
    server.close()


def _answer(index: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back what a stream brings, behind the number of the worker."""

    async def echo() -> None:
        writer.write(b"%d:" % index + await reader.read())
        writer.write_eof()

    task = asyncio.ensure_future(echo())
    task.add_done_callback(_tasks.discard)
    _tasks.add(task)


_tasks: set[asyncio.Future[None]] = set()


class _Clients:
    """The clients of a mode, all in one event loop."""

    def __init__(
        self, address: tuple[str, int], changes: int, identity: Identity, result: ModeResult, progress: "Progress"
    ) -> None:
        self._address = address
        self._changes = changes
        self._identity = identity
        self._result = result
        self._progress = progress
        self._gate = asyncio.Semaphore(_HANDSHAKES_AT_ONCE)
        self._timeout = ANSWER_TIMEOUT + result.connections / 100

    async def run(self) -> None:
        """Run all clients to their end."""
        await asyncio.gather(*(self._run_one() for _ in range(self._result.connections)))

    async def _run_one(self) -> None:
        result = self._result
        client = Client(self._identity)
        answered_by: list[int] = []
        try:
            async with self._gate:
                await client.connect(self._address, HANDSHAKE_TIMEOUT)
                answered_by.append(await client.exchange(self._timeout))
            result.connected += 1
            self._progress.show(result)
            for _ in range(self._changes):
                await client.change_port()
                answered_by.append(await client.exchange(self._timeout))
            result.survived += 1
            result.same_worker += len(set(answered_by)) == 1
        except (TimeoutError, ConnectionError):
            result.lost += 1
        finally:
            result.workers.update(answered_by[:1])
            self._progress.show(result)
            client.close()


class Client:
    """A QUIC client that can move its connection to another UDP port."""

    def __init__(self, identity: Identity) -> None:
        from aioquic.asyncio.protocol import QuicConnectionProtocol
        from aioquic.quic.configuration import QuicConfiguration
        from aioquic.quic.connection import QuicConnection

        configuration = QuicConfiguration(is_client=True, server_name="localhost", cadata=identity.pem)
        self._protocol = QuicConnectionProtocol(QuicConnection(configuration=configuration))
        self._transport: asyncio.DatagramTransport | None = None

    async def connect(self, address: tuple[str, int], timeout: float) -> None:
        """Complete the handshake.

        Raises:
            TimeoutError, ConnectionError: it failed.
        """
        await self.change_port()
        self._protocol.connect(address)
        async with asyncio.timeout(timeout):
            await self._protocol.wait_connected()

    async def change_port(self) -> None:
        """Send from a new UDP socket from now on; the server is told nothing."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))
        loop = asyncio.get_running_loop()
        previous = self._transport
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self._protocol, sock=sock)
        if previous:
            previous.close()

    async def exchange(self, timeout: float) -> int:
        """Send random bytes, check that they come back, and return which worker answered.

        Raises:
            TimeoutError: no answer.
            ConnectionError: another answer.
        """
        request = secrets.token_bytes(_REQUEST_LENGTH)
        reader, writer = await self._protocol.create_stream()
        writer.write(request)
        writer.write_eof()
        async with asyncio.timeout(timeout):
            index, _, echo = (await reader.read()).partition(b":")
        if echo != request:
            raise ConnectionError("the answer is not what was sent")
        return int(index)

    def close(self) -> None:
        """Close the connection without waiting for the server."""
        if self._transport:
            self._protocol.close()
            self._transport.close()


class Progress:
    """Says on stderr how far the run is: in one line on a terminal, in a few lines elsewhere."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._shown = ""

    def show(self, result: ModeResult) -> None:
        """Show the state of a mode that runs."""
        finished = result.survived + result.lost
        text = (
            f"{result.mode}: {result.connected} connected, {finished} of {result.connections} done, {result.lost} lost"
        )
        if self._tty:
            self._write(f"\r{text:<{len(self._shown)}}")
            self._shown = text
        elif result.connected == result.connections and finished == 0 and text != self._shown:
            self._write(f"{text}\n")
            self._shown = text

    def end(self, text: str) -> None:
        """Say how a mode ended."""
        self._write(f"\r{text:<{len(self._shown)}}\n" if self._tty else f"{text}\n")
        self._shown = ""

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def format_table(results: list[ModeResult]) -> str:
    """Return the results as a table, each row the sum over all workers."""
    rows = [_COLUMNS, *(_row(result) for result in results)]
    widths = [max(len(row[column]) for row in rows if len(row) > 2) for column in range(len(_COLUMNS))]
    lines = []
    for row in rows:
        first = row[0].ljust(max(widths[0], *(len(result.mode) for result in results)))
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False))
        lines.append("  ".join([first, *(row[1:] if len(row) == 2 else cells)]))
    return "\n".join(lines)


def _row(result: ModeResult) -> tuple[str, ...]:
    if result.reason:
        return str(result.mode), f"not available: {result.reason}"
    counts = [*(result.outcomes[outcome.name.lower()] for outcome in Outcome), result.dropped]
    figures = ("-" if count is None else str(count) for count in counts)
    return str(result.mode), str(result.connections), str(result.survived), str(result.same_worker), *figures


def summarize(results: list[ModeResult], changes: int) -> str:
    """Return the closing sentence."""
    counts = [f"{result.survived} in mode {result.mode}" for result in results if not result.reason]
    if not counts:
        return "Nothing could be shown."
    text = counts[0] if len(counts) == 1 else f"{', '.join(counts[:-1])} and {counts[-1]}"
    times = "one port change" if changes == 1 else f"{changes} port changes"
    return f"Of {results[0].connections} connections with {times} each, these survived: {text}."


def exit_status(results: list[ModeResult]) -> int:
    """Return 0 when the modes that steer, as far as they are available, lost no connection, and 1 otherwise."""
    steering = [result for result in results if result.mode.steers]
    ran = [result for result in steering if not result.reason]
    whole = all(result.survived == result.connections for result in ran)
    return 0 if whole and (ran or not steering) else 1


def make_identity() -> Identity:
    """Make a key and a self-signed certificate for localhost."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Identity(certificate, key, certificate.public_bytes(serialization.Encoding.PEM))


def _allow_files(count: int) -> None:
    """Raise the limit of open files, as far as it goes, when it is too low for all clients."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number
