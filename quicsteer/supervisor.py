"""Keeps workers running: starts them, replaces those that die, and hands over to new ones without losing a connection.

The sockets and the program never change; what changes is who reads a socket, and no socket ever has two readers. A
*generation* is one set of workers on one bank of established slots. A reload starts a new generation on a free bank;
when it is ready, each old worker stops reading its listeners and says so, the new one starts; the old one serves its
established connections until none is left.
"""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .channel import channel_pair
from .errors import QuicSteerError
from .group import SteeringGroup
from .member import Member, State, describe_status, reap
from .worker import Worker

PING_INTERVAL = 1.0
"""Seconds between two questions whether a worker is alive."""

STOP_TIMEOUT = 10.0
"""Seconds that a worker has to stop reading its listeners before it is killed."""

LEAVE_TIMEOUT = 1.0
"""Seconds that a worker has to end by itself after its last connection, before it gets SIGTERM."""

EXIT_TIMEOUT = 5.0
"""Seconds that a worker has to end after SIGTERM, before it is killed."""

STEADY_AFTER = 10.0
"""Seconds after which a worker counts as having started well: the next crash is not a crash loop."""

BACKOFF_FIRST, BACKOFF_MAX = 0.1, 30.0
"""Seconds of delay before the second restart of a worker that keeps dying, and at most; the first is at once."""

_logger = logging.getLogger("quicsteer")


class StartFailed(QuicSteerError):
    """A worker ended, or was not ready in time, before it could serve."""


class ReloadFailed(QuicSteerError):
    """The new generation did not get ready; the old one goes on."""


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds.

    ``ready``: from the start of a worker until it is ready. ``mute``: after that time a program that did not take its
    worker over counts as one that knows nothing of quicsteer, and as ready. ``drain``: how long connections of an old
    generation may go on, ``None`` for as long as they like. ``hung``: a worker that does not answer for so long, while
    datagrams wait, counts as hung; it is killed if ``kill_hung``.
    """

    ready: float = 60.0
    mute: float = 5.0
    drain: float | None = 30.0
    hung: float = 10.0
    kill_hung: bool = False


class Supervisor:
    """Runs the workers of a group in processes that ``start`` makes.

    ``start`` gets a ``Worker``, starts a process that takes it over (by ``Worker.spawn()``, fork, or
    ``multiprocessing``) and returns its pid. The group must have the split form, and two banks for reloads.
    ``workers`` is how many run, at most as many as the group has; those that run read the listeners of the others.
    """

    def __init__(
        self,
        group: SteeringGroup,
        start: Callable[[Worker], int],
        *,
        workers: int | None = None,
        limits: Limits | None = None,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        capacity = len(group.workers)
        self.group = group
        self.limits = limits or Limits()
        self.reloading = ""
        """What a reload is waiting for now; empty when there is none."""
        self.reloads = 0
        self.restarts = 0
        self._start_process = start
        self._count = _check_count(capacity if workers is None else workers, capacity)
        self._on_change = on_change
        self._members: set[Member] = set()
        self._current = 0
        self._failures: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._changed = asyncio.Condition()
        self._reload_lock = asyncio.Lock()

    @property
    def members(self) -> list[Member]:
        """The processes that run, in order of bank and index."""
        return sorted(self._members, key=lambda member: (member.bank, member.index))

    @property
    def bank(self) -> int:
        """The bank of the current generation."""
        return self._current

    async def run(self) -> None:
        """Start the workers and keep them running until ``stop()``; then let them end.

        Raises:
            StartFailed: the first generation did not get ready; nothing runs any more.
        """
        try:
            for member in self.members:  # of the supervisor that this process was before
                self._watch(member)
                if member.leaving and self.limits.drain is not None:
                    self._in_background(self._end_at_last(member, self.limits.drain))
            if not self._members:
                for member in await self._start_generation(self._current, self._count):
                    self._listen(member)
            self._in_background(self._ping_all())
            self._on_change()
            await self._stop.wait()
            await self._stop_all()
        finally:
            await self._kill_all()

    def stop(self) -> None:
        """Let all workers end; called once more, kill them."""
        if self._stop.is_set():
            for member in self._members:
                member.kill(signal.SIGKILL)
        self._stop.set()

    def dump(self) -> dict[str, Any]:
        """Return what a successor in this process needs to know, without the workers."""
        return {
            "bank": self._current,
            "count": self._count,
            "failures": list(self._failures.items()),
            "reloads": self.reloads,
            "restarts": self.restarts,
        }

    def adopt(self, members: list[Member], saved: dict[str, Any]) -> None:
        """Go on with the workers of the supervisor that this process was before; call it before ``run()``."""
        self._members = set(members)
        self._current = saved["bank"]
        self._count = saved["count"]
        self._failures = dict(saved["failures"])
        self.reloads, self.restarts = saved["reloads"], saved["restarts"]

    async def reload(self, workers: int | None = None) -> None:
        """Hand over to a new generation of workers, of another number if ``workers`` says so.

        It waits for a free bank: until the connections of an earlier generation have ended, at most the drain limit.

        Raises:
            ReloadFailed: the new generation did not get ready, or a reload is running; nothing has changed.
            ValueError: more workers than the group has room for.
        """
        count = _check_count(self._count if workers is None else workers, len(self.group.workers))
        if self._reload_lock.locked():
            raise ReloadFailed("a reload is running already")
        async with self._reload_lock:
            try:
                if not self.group.mode.steers:
                    await self._replace(count)
                else:
                    await self._hand_over(count)
            except StartFailed as error:
                raise ReloadFailed(f"the new workers did not get ready, the old ones go on: {error}") from error
            finally:
                self._say("")
            self.reloads += 1

    async def _hand_over(self, count: int) -> None:
        bank = await self._free_bank()
        self._say("waiting for the new workers to get ready")
        fresh = await self._start_generation(bank, count)
        old = [member for member in self._members if member.bank == self._current]
        self._current, self._count = bank, count
        self._say("handing over the listeners")
        for member in fresh:
            await self._stop_readers(old, member.listeners)
            self._listen(member)
        await self._stop_readers(old, range(len(self.group.workers)))

    async def _replace(self, count: int) -> None:
        """Without steering there is one socket per worker, and its connections end with it: the old ones first."""
        self._count = count
        self._say("waiting for the old workers to end")
        old = list(self._members)
        for member in old:
            self._ask_to_end(member, 0.0)
        await self._await_exits(old, EXIT_TIMEOUT)
        for member in await self._start_generation(self._current, count):
            self._listen(member)

    async def _free_bank(self) -> int:
        """Wait for a bank that no process uses."""
        banks = self.group.banks
        if banks < 2:
            raise ReloadFailed("the group has one bank of slots: a reload needs split=True and banks=2")
        while True:
            used = {member.bank for member in self._members}
            for step in range(1, banks):
                bank = (self._current + step) % banks
                if bank not in used:
                    return bank
            left = sum(member.bank != self._current for member in self._members)
            self._say(f"waiting for a free bank: {left} workers of an earlier generation still have connections")
            async with self._changed:
                await self._changed.wait()

    async def _start_generation(self, bank: int, count: int) -> list[Member]:
        """Start workers and wait until all are ready; if one is not, none stays."""
        capacity = len(self.group.workers)
        fresh: list[Member] = []
        try:
            for index in range(count):
                fresh.append(self._start(index, bank, tuple(range(index, capacity, count))))
            await asyncio.gather(*(self._await_ready(member) for member in fresh))
        except BaseException:
            for member in fresh:
                member.leaving = True
                member.kill(signal.SIGKILL)
            await self._await_exits(fresh, EXIT_TIMEOUT)
            raise
        return fresh

    def _start(self, index: int, bank: int, listeners: tuple[int, ...]) -> Member:
        loop = asyncio.get_running_loop()
        ours, theirs = channel_pair()
        worker = self.group.worker(index, bank, listeners=listeners)
        worker.attach(theirs)
        try:
            pid = self._start_process(worker)
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            ours.close()
            raise StartFailed(f"worker {index} could not be started: {error}") from error
        finally:
            worker.close()
        futures = (loop.create_future(), loop.create_future(), loop.create_future())
        member = Member(index, bank, listeners, pid, pidfd, ours, *futures)
        self._members.add(member)
        self._watch(member)
        loop.call_later(self.limits.mute, self._take_for_mute, member)
        _logger.info("%s started", member)
        return member

    def _watch(self, member: Member) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(member.pidfd, self._exited, member)
        loop.add_reader(member.channel.socket, self._receive, member)

    def _receive(self, member: Member) -> None:
        messages = member.channel.receive()
        if messages is None:
            asyncio.get_running_loop().remove_reader(member.channel.socket)
            return
        for message in messages:
            member.speaks = True
            member.last_alive = time.monotonic()
            member.hung = False
            if message["say"] == "ready":
                _resolve(member.ready)
            elif message["say"] == "stopped":
                _resolve(member.stopped)
            elif message["say"] == "drained":
                self._in_background(self._end(member))

    def _take_for_mute(self, member: Member) -> None:
        if not member.speaks and member in self._members:
            _logger.warning("%s did not take its worker over: taken for a program without quicsteer", member)
            _resolve(member.ready)

    def _exited(self, member: Member) -> None:
        """A process ended: start another in its place, or park its bank when nobody is left there."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(member.pidfd)
        loop.remove_reader(member.channel.socket)
        status = reap(member)
        os.close(member.pidfd)
        member.channel.close()
        self._members.discard(member)
        member.exited.set_result(status)
        _logger.log(logging.INFO if member.leaving else logging.ERROR, "%s %s", member, describe_status(status))
        current = member.bank == self._current
        if current and not member.leaving and not self._stop.is_set():
            if member.state is not State.STARTING or member.index in self._failures:
                self._in_background(self._restart(member))
        elif not current and all(other.bank != member.bank for other in self._members):
            self.group.park(member.bank)
        self._in_background(self._announce())
        self._on_change()

    async def _restart(self, dead: Member) -> None:
        """Start a worker on the slots of one that died. Its datagrams have waited in the kernel."""
        steady = time.monotonic() - dead.started > STEADY_AFTER
        failures = self._failures[dead.index] = 0 if steady else self._failures.get(dead.index, -1) + 1
        if failures:
            delay = min(BACKOFF_FIRST * 2 ** (failures - 1), BACKOFF_MAX)
            _logger.warning("worker %d died %d times in a row: next start in %.1f s", dead.index, failures + 1, delay)
            await asyncio.sleep(delay)
        if self._stop.is_set() or dead.bank != self._current:
            return
        self.restarts += 1
        try:
            member = self._start(dead.index, dead.bank, dead.listeners)
            await self._await_ready(member)
        except StartFailed as error:
            _logger.error("%s", error)
            return  # its end starts the next one
        self._listen(member)
        self._on_change()

    async def _await_ready(self, member: Member) -> None:
        await _first_of(self.limits.ready, member.ready, member.exited)
        if member.exited.done():
            raise StartFailed(f"{member} {describe_status(member.exited.result())} before it was ready")
        if not member.ready.done():
            member.kill(signal.SIGKILL)
            raise StartFailed(f"{member} was not ready after {self.limits.ready:g} s and was killed")
        if member.state is State.STARTING:
            member.state = State.READY

    def _listen(self, member: Member) -> None:
        member.state = State.SERVING
        member.channel.send("listen")

    async def _stop_readers(self, old: list[Member], listeners: Iterable[int]) -> None:
        """See to it that none of the old workers reads these listeners any more."""
        wanted = set(listeners)
        stopping = [member for member in old if member.state is not State.DRAINING and wanted & set(member.listeners)]
        for member in stopping:
            self._ask_to_end(member, self.limits.drain)
        speaking = [member for member in stopping if member.speaks]
        for member in speaking:
            await _first_of(STOP_TIMEOUT, member.stopped, member.exited)
            if not member.stopped.done() and not member.exited.done():
                _logger.error("%s did not stop listening: killed, so that its listeners have one reader", member)
                member.kill(signal.SIGKILL)
                await asyncio.wait({member.exited})

    def _ask_to_end(self, member: Member, drain: float | None) -> None:
        """Let a worker take no new connection, and end when it has none left or the time is over."""
        if member.leaving:
            return
        member.leaving = True
        member.state = State.DRAINING
        if not member.speaks or not member.channel.send("stop", seconds=drain):
            member.kill(signal.SIGTERM)
        if drain is not None:
            self._in_background(self._end_at_last(member, drain))

    async def _end_at_last(self, member: Member, drain: float) -> None:
        await asyncio.wait({member.exited}, timeout=drain + EXIT_TIMEOUT)
        await self._end(member)

    async def _end(self, member: Member) -> None:
        """See a process end that has nothing left to do: by itself, or it is made to."""
        member.leaving = True
        await asyncio.wait({member.exited}, timeout=LEAVE_TIMEOUT)
        for number in (signal.SIGTERM, signal.SIGKILL):
            if member.exited.done():
                return
            member.kill(number)
            await asyncio.wait({member.exited}, timeout=EXIT_TIMEOUT)

    async def _stop_all(self) -> None:
        for member in self.members:
            self._ask_to_end(member, self.limits.drain)
        await self._await_exits(self.members, None)

    async def _kill_all(self) -> None:
        for task in self._tasks:
            task.cancel()
        for member in self.members:
            member.leaving = True
            member.kill(signal.SIGKILL)
        await self._await_exits(self.members, EXIT_TIMEOUT)

    async def _await_exits(self, members: list[Member], timeout: float | None) -> None:
        if members:
            await asyncio.wait({member.exited for member in members}, timeout=timeout)

    async def _ping_all(self) -> None:
        """Ask all workers whether they are alive; notice those that leave datagrams waiting and do not answer."""
        while True:
            now = time.monotonic()
            for member in self.members:
                member.channel.send("ping")
                if member.speaks and not member.hung and now - member.last_alive > self.limits.hung:
                    self._check_hung(member, now)
            await asyncio.sleep(PING_INTERVAL)

    def _check_hung(self, member: Member, now: float) -> None:
        waiting = self.group.queued(member.index, member.bank, member.listeners)
        if not waiting:
            return
        member.hung = True
        verdict = "killed" if self.limits.kill_hung else "left alone"
        _logger.error(
            "%s has not answered for %.0f s, %d bytes wait: %s", member, now - member.last_alive, waiting, verdict
        )
        if self.limits.kill_hung:
            member.kill(signal.SIGKILL)
        self._on_change()

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _say(self, text: str) -> None:
        """Note what a reload is doing."""
        if text and text != self.reloading:
            _logger.info("reload: %s", text)
        self.reloading = text
        self._on_change()

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check_count(workers: int, capacity: int) -> int:
    if not isinstance(workers, int) or isinstance(workers, bool):
        raise TypeError(f"workers is {workers!r}, it must be an integer")
    if not 1 <= workers <= capacity:
        raise ValueError(f"workers is {workers}, the group has room for 1 to {capacity}")
    return workers


async def _first_of(timeout: float, *futures: "asyncio.Future[Any]") -> None:
    """Wait until one of several things has happened, or the time is over."""
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
