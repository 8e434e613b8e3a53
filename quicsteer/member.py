"""A worker process as its supervisor sees it."""

import asyncio
import contextlib
import enum
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

from .channel import Channel


class State(enum.StrEnum):
    """What a worker process is doing."""

    STARTING = "starting"
    """It runs, and has not said that it is ready."""

    READY = "ready"
    """It reads its established sockets; somebody else may read its listeners."""

    SERVING = "serving"
    """It reads its listeners too."""

    DRAINING = "draining"
    """It takes no new connection and ends when none is left."""


@dataclass(frozen=True)
class Post:
    """What a worker is there for: its slots, and the generation that it belongs to."""

    index: int
    bank: int
    listeners: tuple[int, ...]
    generation: int


@dataclass(eq=False)
class Member:
    """One worker process."""

    index: int
    bank: int
    listeners: tuple[int, ...]
    generation: int
    pid: int
    pidfd: int
    channel: Channel
    ready: "asyncio.Future[None]"
    stopped: "asyncio.Future[None]"
    exited: "asyncio.Future[int]"
    state: State = State.STARTING
    started: float = field(default_factory=time.monotonic)
    last_alive: float = field(default_factory=time.monotonic)
    speaks: bool = False
    """Whether it took its worker over, and so knows of a supervisor."""
    hung: bool = False
    leaving: bool = False
    """Whether it was told to end, so that nobody is started in its place."""

    @property
    def post(self) -> Post:
        return Post(self.index, self.bank, self.listeners, self.generation)

    def __str__(self) -> str:
        return f"worker {self.index} (pid {self.pid}, bank {self.bank})"

    def kill(self, number: signal.Signals) -> None:
        """Send a signal to this very process, never to another that got its pid, or the number of its pidfd."""
        if self.exited.done():
            return
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def describe(self) -> dict[str, Any]:
        """Return what operators see of it."""
        return {
            "index": self.index,
            "bank": self.bank,
            "pid": self.pid,
            "state": str(self.state),
            "hung": self.hung,
            "seconds": round(time.monotonic() - self.started, 1),
        }


def reap(member: Member) -> int:
    """Return how a process ended, as ``os.waitstatus_to_exitcode`` says it; 0 when somebody else reaped it."""
    try:
        result = os.waitid(os.P_PIDFD, member.pidfd, os.WEXITED)
    except ChildProcessError:
        return 0
    if result is None:
        return 0
    return result.si_status if result.si_code == os.CLD_EXITED else -result.si_status


def describe_status(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by {signal.Signals(-status).name}"
