"""Replaces a running supervisor by a new program in the same process, with its sockets, keys and workers.

The state goes to the new program in a sealed memfd. Before anything is given up, the new program is started once to
say whether it can read that state; if not, the old one goes on.
"""

import asyncio
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from .channel import Channel
from .errors import QuicSteerError
from .group import SteeringGroup
from .member import Member, State, describe_status
from .plain import read_object
from .supervisor import Supervisor

STATE_VARIABLE = "QUICSTEER_UPGRADE_FD"
CHECK_VARIABLE = "QUICSTEER_UPGRADE_CHECK"
CHECK_TIMEOUT = 30.0
"""Seconds that the new program has to say whether it can read the state."""

BLOCKED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGWINCH)
"""Signals that wait from one program to the next, which unblocks them when it has its handlers."""

_STATE_VERSION = 1
_STATE_SIZE_MAX = 16 * 1024 * 1024


class SavedState:
    """The state of the supervisor that this process was before."""

    def __init__(self, state: dict[str, Any]) -> None:
        self._state = state

    def group(self) -> SteeringGroup:
        """Return the group on the descriptors that came along."""
        return SteeringGroup.adopt(self._state["group"])

    def restore(self, supervisor: Supervisor) -> None:
        """Give the supervisor its workers back."""
        saved = self._state["supervisor"]
        supervisor.adopt([_load_member(member) for member in saved["members"]], saved)


async def replace_process(supervisor: Supervisor, descriptors: Iterable[int] = ()) -> None:
    """Execute the program of this process anew; returns only by an exception, when the new one is not fit.

    ``descriptors`` stay open besides.

    Raises:
        QuicSteerError: workers start or end just now, or the new program cannot take over; nothing has changed.
        OSError: no descriptor or memory left.
    """
    with _Memory(supervisor) as memory:
        await _ask_new_program(memory.descriptor)
    with _Memory(supervisor) as memory:  # things may have changed meanwhile
        _execute([*memory.needed, *descriptors, memory.descriptor], memory.descriptor)


class _Memory:
    """A sealed memfd with the state of a supervisor, and the descriptors that the state ``needed``."""

    def __init__(self, supervisor: Supervisor) -> None:
        if supervisor.busy:
            raise QuicSteerError(supervisor.busy)
        members = supervisor.members
        if any(member.state in (State.STARTING, State.READY) for member in members):
            raise QuicSteerError("workers are starting")
        group, self.needed = supervisor.group.dump()
        for member in members:
            self.needed += [member.pidfd, member.channel.socket.fileno()]
        state = {
            "version": _STATE_VERSION,
            "group": group,
            "supervisor": {**supervisor.dump(), "members": [_dump_member(member) for member in members]},
        }
        self.descriptor = os.memfd_create("quicsteer-upgrade", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(self.descriptor, json.dumps(state).encode())
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)

    def __enter__(self) -> "_Memory":
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self.descriptor)


def is_check() -> bool:
    """Whether this process was only started to say if it can read the state of a running supervisor."""
    return CHECK_VARIABLE in os.environ


def check_state() -> int:
    """Return the exit status for that question."""
    try:
        _read_state(os.environ[STATE_VARIABLE])
    except QuicSteerError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def take_over() -> SavedState | None:
    """Return the state of the supervisor that this process was before, or ``None`` after a fresh start."""
    number = os.environ.pop(STATE_VARIABLE, None)
    if number is None:
        return None
    state = _read_state(number)
    os.close(int(number))
    return SavedState(state)


def _command_line() -> list[str]:
    """Return how this process was started: by the interpreter, with its options."""
    return [sys.executable, *sys.orig_argv[1:]]


async def _ask_new_program(memory: int) -> None:
    """Start the new program to say if it can read the state; the workers are looked after meanwhile."""
    environment = {**os.environ, STATE_VARIABLE: str(memory), CHECK_VARIABLE: "1"}
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(  # noqa: S603  # our own command line
                _command_line(), env=environment, pass_fds=[memory], stdout=output, stderr=output
            )
        except OSError as error:
            raise QuicSteerError(f"the new program does not start: {error}") from error
        try:
            await _await_exit(process.pid, CHECK_TIMEOUT)
        except TimeoutError as error:
            raise QuicSteerError(f"the new program says nothing for {CHECK_TIMEOUT:g} s") from error
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            output.seek(0)
            lines = output.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), describe_status(process.returncode))
            raise QuicSteerError(f"the new program cannot take over: {last}")


async def _await_exit(pid: int, timeout: float) -> None:
    loop = asyncio.get_running_loop()
    exited = asyncio.Event()
    pidfd = os.pidfd_open(pid)
    loop.add_reader(pidfd, exited.set)
    try:
        async with asyncio.timeout(timeout):
            await exited.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def _execute(descriptors: list[int], memory: int) -> None:
    environment = {**os.environ, STATE_VARIABLE: str(memory)}
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    try:
        os.execve(sys.executable, _command_line(), environment)  # noqa: S606
    except OSError as error:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        raise QuicSteerError(f"execve: {error}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _read_state(number: str) -> dict[str, Any]:
    try:
        state = read_object(os.pread(int(number), _STATE_SIZE_MAX, 0))
    except (OSError, ValueError, OverflowError) as error:
        raise QuicSteerError(f"{STATE_VARIABLE} is {number!r}, which is no state of a supervisor: {error}") from error
    version = state.get("version")
    if version != _STATE_VERSION:
        raise QuicSteerError(
            f"the running supervisor's state has version {version}, this program reads {_STATE_VERSION}"
        )
    return state


def _dump_member(member: Member) -> dict[str, Any]:
    return {
        "index": member.index,
        "bank": member.bank,
        "listeners": member.listeners,
        "generation": member.generation,
        "pid": member.pid,
        "pidfd": member.pidfd,
        "channel": member.channel.socket.fileno(),
        "state": str(member.state),
        "age": time.monotonic() - member.started,
        "speaks": member.speaks,
        "leaving": member.leaving,
    }


def _load_member(saved: dict[str, Any]) -> Member:
    loop = asyncio.get_running_loop()
    channel = socket.socket(fileno=saved["channel"])
    for descriptor in (saved["pidfd"], saved["channel"]):
        os.set_inheritable(descriptor, False)
    member = Member(
        saved["index"],
        saved["bank"],
        tuple(saved["listeners"]),
        saved["generation"],
        saved["pid"],
        saved["pidfd"],
        Channel(channel),
        loop.create_future(),
        loop.create_future(),
        loop.create_future(),
        state=State(saved["state"]),
        started=time.monotonic() - saved["age"],
        speaks=saved["speaks"],
        leaving=saved["leaving"],
    )
    member.ready.set_result(None)
    if member.state is State.DRAINING:
        member.stopped.set_result(None)
    return member
