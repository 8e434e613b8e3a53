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
import time
from typing import Any

from .channel import Channel
from .errors import QuicSteerError
from .group import SteeringGroup
from .member import Member, State
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


def replace_process(supervisor: Supervisor) -> None:
    """Execute the program of this process anew; returns only by an exception, when the new one is not fit.

    Raises:
        QuicSteerError: a reload is running, or the new program cannot take over; nothing has changed.
    """
    if supervisor.reloading:
        raise QuicSteerError("a reload is running: wait for its end")
    members = supervisor.members
    if any(member.state is State.STARTING for member in members):
        raise QuicSteerError("workers are starting: wait until they are ready")
    group, descriptors = supervisor.group.dump()
    for member in members:
        descriptors += [member.pidfd, member.channel.socket.fileno()]
    state = {
        "version": _STATE_VERSION,
        "group": group,
        "supervisor": {**supervisor.dump(), "members": [_dump_member(member) for member in members]},
    }
    memory = os.memfd_create("quicsteer-upgrade", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(memory, json.dumps(state).encode())
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        _ask_new_program(memory)
        _execute([*descriptors, memory], memory)
    finally:
        os.close(memory)


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


def _ask_new_program(memory: int) -> None:
    environment = {**os.environ, STATE_VARIABLE: str(memory), CHECK_VARIABLE: "1"}
    try:
        done = subprocess.run(  # noqa: S603  # our own command line
            _command_line(),
            env=environment,
            pass_fds=[memory],
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QuicSteerError(f"the new program does not start: {error}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"it ended with {done.returncode}"]
        raise QuicSteerError(f"the new program cannot take over: {lines[-1]}")


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
        state = json.loads(os.pread(int(number), _STATE_SIZE_MAX, 0))
        version = state["version"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise QuicSteerError(f"{STATE_VARIABLE} is {number!r}, which is no state of a supervisor: {error}") from error
    if version != _STATE_VERSION:
        raise QuicSteerError(
            f"the running supervisor's state has version {version}, this program reads {_STATE_VERSION}"
        )
    return dict(state)


def _dump_member(member: Member) -> dict[str, Any]:
    return {
        "index": member.index,
        "bank": member.bank,
        "listeners": member.listeners,
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
    return member
