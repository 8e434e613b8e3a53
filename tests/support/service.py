"""Services for the tests: ``quicsteer run`` as a program, or forked, with forked workers that need no time for imports.

A forked service runs the very code of the command; only the start of a worker is another.
"""

import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import logging
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import privileges
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from quic import IDENTITY, TIMEOUT, serve_echo

from quicsteer import SteeringGroup, Worker
from quicsteer import run as run_command
from quicsteer import supervisor as supervisor_module
from quicsteer.control import command
from quicsteer.errors import QuicSteerError

T = TypeVar("T")
Work = Callable[[Worker], Awaitable[None]]

_PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h
_LISTENING = 0x10000  # __SO_ACCEPTCON of include/uapi/linux/net.h
_ENDED = re.compile(r"worker \d+ \(pid (\d+), bank \d+\) (ended with status \d+|was ended by \w+)$", re.M)


class Manager:
    """What systemd is for a service: the owner of NOTIFY_SOCKET, who hears what the service says."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.messages: list[list[str]] = []
        self._news = threading.Condition()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self.path.chmod(0o666)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while True:
            message = self._socket.recv(65536)
            if not message:
                return
            with self._news:
                self.messages.append(message.decode().splitlines())
                self._news.notify_all()

    def wait_for(self, start: str, after: int = 0) -> int:
        """Wait for a message with a line that starts so, behind the first ``after``; return its place from 1."""
        deadline = time.monotonic() + TIMEOUT
        with self._news:
            while True:
                for place, lines in enumerate(self.messages[after:], after + 1):
                    if any(line.startswith(start) for line in lines):
                        return place
                left = deadline - time.monotonic()
                assert left > 0, f"the service never said {start}: {self.messages[after:]}"
                self._news.wait(left)

    def said(self, start: str) -> list[str]:
        """All lines so far that start so."""
        with self._news:
            return [line for lines in self.messages for line in lines if line.startswith(start)]

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", str(self.path))
        self._thread.join()
        self._socket.close()


class Service:
    """A running service."""

    def __init__(self, pid: int, directory: Path, manager: Manager) -> None:
        self.pid = pid
        self.directory = directory
        self.manager = manager
        self.control = directory / "control"
        self.status: int | None = None
        self._pidfd = os.pidfd_open(pid)
        self._left_behind: dict[int, int] = {}

    # What the operator does

    def command(self, name: str, **details: Any) -> dict[str, Any]:
        """Send a command to the control socket; what comes before the last answer goes to ``progress``."""
        self.progress: list[str] = []
        request = {"command": name, **details}
        return command(self.control, request, lambda said: self.progress.append(said["progress"]))

    def reload(self, workers: int | None = None) -> dict[str, Any]:
        return self.command("reload", workers=workers)

    def kill(self, number: signal.Signals) -> None:
        signal.pidfd_send_signal(self._pidfd, number)

    def wait(self) -> int:
        """Wait for the end, and return the exit status as ``Popen.returncode`` has it."""
        if self.status is None:
            assert select.select([self._pidfd], [], [], 2 * TIMEOUT)[0], f"the service does not end\n{self.log}"
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
            assert result is not None
            self.status = result.si_status if result.si_code == os.CLD_EXITED else -result.si_status
        return self.status

    # What can be seen

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def wait_for_log(self, pattern: str, times: int = 1) -> list[Any]:
        """Wait until the log has so many matches, and return them as ``re.findall`` does."""

        def found() -> list[Any]:
            matches: list[Any] = re.findall(pattern, self.log)
            return matches if len(matches) >= times else []

        return self.wait_until(found)

    def wait_until(self, good: Callable[[], T]) -> T:
        """Wait until something is true, and return it."""
        deadline = time.monotonic() + TIMEOUT
        while not (value := good()):
            assert time.monotonic() < deadline, f"it never came to {good}\n{self.log}"
            time.sleep(0.01)
        return value

    def describe(self) -> dict[str, Any]:
        return self.command("status")

    @property
    def address(self) -> tuple[str, int]:
        [(host, port)] = set(re.findall(r"<SteeringGroup ([\d.]+):(\d+) ", self.log))
        return host, int(port)

    def workers(self, state: str | None = None) -> dict[int, int]:
        """The pid of each worker in a state, by index."""
        members = self.describe()["workers"]
        return {member["index"]: member["pid"] for member in members if state in (None, member["state"])}

    def wait_for_workers(self, good: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
        """Wait until the list of workers is as it should be."""

        def found() -> list[dict[str, Any]]:
            workers: list[dict[str, Any]] = self.describe()["workers"]
            return workers if good(workers) else []

        return self.wait_until(found)

    def descriptors(self) -> list[str]:
        """What the supervisor has open: kinds, sorted; without what it opens for one message or one command."""
        before = self._list_descriptors()
        passing = {f"socket:[{inode}]" for inode in self._passing_sockets()}
        found = [target for _, target in before & self._list_descriptors()]
        lasting = [target for target in found if target not in passing and not target.startswith("/proc/")]
        return sorted(re.sub(r"\d+", "N", target) for target in lasting)

    def _list_descriptors(self) -> set[tuple[str, str]]:
        found = set()
        for number in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(OSError):  # closed meanwhile
                found.add((number, os.readlink(f"/proc/{self.pid}/fd/{number}")))
        return found

    def _passing_sockets(self) -> Iterator[str]:
        """The inodes of datagram sockets, and of connections to the control socket."""
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            _, _, _, flags, kind, _, inode, *path = line.split()
            if int(kind, 16) == socket.SOCK_DGRAM or (path == [str(self.control)] and not int(flags, 16) & _LISTENING):
                yield inode

    def children(self) -> list[int]:
        return children_of(self.pid)

    def endings(self) -> list[str]:
        """How each worker that is gone has ended."""
        return [ending for _, ending in _ENDED.findall(self.log)]

    def ending(self, pid: int) -> str:
        """How a worker has ended, when it has."""
        self.wait_for_log(rf"worker \d+ \(pid {pid}, bank \d+\) (?:ended|was ended)")
        endings: dict[str, str] = dict(_ENDED.findall(self.log))
        return endings[str(pid)]

    # The end of a test

    def remember_children(self) -> None:
        """Take note of processes that may outlive the supervisor, so that the end of the test ends them too."""
        for pid in self.children():
            if pid not in self._left_behind:
                with contextlib.suppress(ProcessLookupError):
                    self._left_behind[pid] = os.pidfd_open(pid)

    def close(self) -> None:
        if self.status is None:
            self.remember_children()
            with contextlib.suppress(ProcessLookupError):
                self.kill(signal.SIGKILL)
            self.wait()
        for pidfd in self._left_behind.values():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        os.close(self._pidfd)
        self.manager.close()
        shutil.rmtree(self.directory)


@contextlib.contextmanager
def service(
    *arguments: str,
    uid: int | None = None,
    serve: Work | None = None,
    start: Callable[[Worker], int] | None = None,
    limits: dict[str, float] | None = None,
    key: bytes | None = None,
    wait: bool = True,
) -> Iterator[Service]:
    """A forked service with these arguments of ``quicsteer run``; its workers run ``serve``, by default an echo server.

    With ``uid`` it runs as that user without capabilities. ``start`` starts the workers in another way. ``limits`` are
    constants of the supervisor that the command line cannot change, by name. ``key`` is the group's key. Without
    ``wait`` it may not be ready yet.
    """
    directory = _make_directory(uid)
    manager = Manager(directory)
    parser = ArgumentParser()
    run_command.add_arguments(parser)
    control = str(directory / "control")
    (directory / "log").touch()
    options = parser.parse_args(["--bind", "127.0.0.1:0", "--control", control, *arguments, "--", "forked"])
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        with _last_resort():
            _become_service(directory, manager, uid)
            for name, seconds in (limits or {}).items():
                assert hasattr(supervisor_module, name)
                setattr(supervisor_module, name, seconds)
            if key is not None:
                SteeringGroup.open = partial(SteeringGroup.open, key=key)  # type: ignore[method-assign]
            os._exit(_run(options, start or _Forker(serve or echo)))
    yield from _until_closed(Service(pid, directory, manager), wait)


@contextlib.contextmanager
def program(
    *arguments: str,
    command_line: Sequence[str] | None = None,
    entry: Sequence[str] = (sys.executable, "-m", "quicsteer"),
    environment: dict[str, str] | None = None,
    control: Path | None = None,
    wait: bool = True,
) -> Iterator[Service]:
    """``quicsteer run`` itself, with an echo server as its command unless another is named.

    ``entry`` is how quicsteer is started, and ``environment`` comes on top of this process's.
    """
    directory = _make_directory(None)
    manager = Manager(directory)
    control = control or directory / "control"
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [
                *[*entry, "run", "--control", str(control)],
                *([] if "--bind" in arguments else ["--bind", "127.0.0.1:0"]),
                *arguments,
                "--",
                *(command_line or echo_command(directory)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            env={**os.environ, "NOTIFY_SOCKET": str(manager.path), **(environment or {})},
        )
    process.returncode = 0  # the service is waited for by its pidfd
    running = Service(process.pid, directory, manager)
    running.control = control
    yield from _until_closed(running, wait)


def echo_command(directory: Path) -> list[str]:
    """The command line of an echo server with the certificate that the clients know."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    certificate.write_bytes(IDENTITY.pem)
    key.write_bytes(IDENTITY.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    for path in (certificate, key):
        path.chmod(0o644)
    return [sys.executable, str(Path(__file__).with_name("echo_worker.py")), str(certificate), str(key), "50"]


def children_of(pid: int) -> list[int]:
    """The children of all threads of a process, zombies too."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def stop_process(pid: int) -> None:
    """Stop a process with SIGSTOP, and wait until it runs no more."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + TIMEOUT
    while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "T":
        assert time.monotonic() < deadline
        time.sleep(0.001)


async def echo(worker: Worker) -> None:
    """What a worker does: an echo server that ends when its supervisor says so."""
    server = await serve_echo(worker)
    await server.wait_closed()


def _until_closed(running: Service, wait: bool) -> Iterator[Service]:
    try:
        if wait:
            try:
                running.manager.wait_for("READY=1")
            except AssertionError as error:
                raise AssertionError(f"{error}\n{running.log}") from None
        yield running
    finally:
        running.close()


def _make_directory(uid: int | None) -> Path:
    """A directory that the service's user can reach and nobody else can change."""
    directory = Path(tempfile.mkdtemp(prefix="quicsteer-"))
    directory.chmod(0o755)
    if uid is not None:
        os.chown(directory, uid, uid)
    return directory


@contextlib.contextmanager
def _last_resort() -> Iterator[None]:
    """A forked child must not go on in the test runner, whatever happens."""
    try:
        yield
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(70)


def _become_service(directory: Path, manager: Manager, uid: int | None) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    log = os.open(directory / "log", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.disable()
    logging.basicConfig(format="%(message)s", stream=sys.stderr, force=True)
    _reset_signals()
    _close_all_but({0, 1, 2})
    os.environ["NOTIFY_SOCKET"] = str(manager.path)
    if uid is not None:
        privileges.become(uid=uid)


def _run(options: Namespace, start: Callable[[Worker], int]) -> int:
    class Forked(run_command._Service):
        def _start_worker(self, worker: Worker) -> int:
            return start(worker)

    logging.getLogger("quicsteer").setLevel(logging.INFO)
    try:
        return asyncio.run(Forked(options).run())
    except (QuicSteerError, ValueError) as error:
        print(f"quicsteer: {error}")
        return 2


class _Forker:
    """Starts a worker in a fork of the supervisor."""

    def __init__(self, serve: Work) -> None:
        self._serve = serve

    def __call__(self, worker: Worker) -> int:
        # A signal that comes before the child has reset its handlers would reach the supervisor's event loop.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return pid
        with _last_resort():
            _reset_signals()
            channel = worker.channel
            assert channel is not None
            ours = {sock.fileno() for sock in worker.sockets} | {channel.socket.fileno(), worker.store.descriptor}
            _close_all_but({0, 1, 2, *ours}, keep_memory=True)  # what all workers share is in memory
            asyncio.run(self._work(worker))
            os._exit(0)

    async def _work(self, worker: Worker) -> None:
        with worker:
            await self._serve(worker)


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            if signal.getsignal(number) not in (signal.SIG_DFL, signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def _close_all_but(keep: set[int], keep_memory: bool = False) -> None:
    """Close what a fork inherited. What the parent left to be collected stays: it would close others of its numbers."""
    gc.freeze()
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            is_memory = os.readlink(f"/proc/self/fd/{number}").startswith("/memfd:")
            if number not in keep and not (is_memory and keep_memory):
                os.close(number)
