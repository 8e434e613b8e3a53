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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .channel import Channel, channel_pair
from .errors import QuicSteerError
from .group import SteeringGroup
from .member import Member, Post, State, describe_status, reap
from .reports import Reports
from .worker import Worker

PING_INTERVAL = 1.0
"""Seconds between two questions whether a worker is alive."""

STOP_TIMEOUT = 10.0
"""Seconds that a worker has to stop reading its listeners, once it is told to, before it is killed."""

LEAVE_TIMEOUT = 5.0
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
    """There is no new generation; the old one goes on."""


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds.

    ``ready``: from the start of a worker until it is ready. ``mute``: after that time a program that did not take its
    worker over counts as one that knows nothing of quicsteer, and as ready. ``drain``: how long connections of an old
    generation may go on, ``None`` for as long as they like. ``hung``: a worker that does not answer for so long, while
    datagrams wait, counts as hung; it is killed if ``kill_hung``.
    """

    ready: float = 60.0
    mute: float = 20.0
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
        self.reports = Reports()
        """What the workers report about their QUIC connections."""
        self._start_process = start
        self._count = _check_count(capacity if workers is None else workers, capacity)
        self._on_change = on_change
        self._members: set[Member] = set()
        self._adopted = False
        self._current = 0
        self._generation = 0
        self._weights: dict[int, float] = {}
        self._failures: dict[int, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._reload_lock = asyncio.Lock()

    @property
    def members(self) -> list[Member]:
        """The processes that run, in order of bank and index."""
        return sorted(self._members, key=lambda member: (member.bank, member.index))

    @property
    def bank(self) -> int:
        """The bank of the current generation."""
        return self._current

    @property
    def busy(self) -> str:
        """Why a reload cannot start now; empty when it can."""
        if self._stop.is_set():
            return "the service is ending"
        return "workers are starting, or a reload is running already" if self._reload_lock.locked() else ""

    async def run(self) -> None:
        """Start the workers and keep them running until ``stop()``; then let them end.

        Raises:
            StartFailed: the first generation did not get ready; nothing runs any more.
        """
        try:
            if self._adopted:
                self._resume()
            else:
                await self._start_first()
            self._in_background(self._ping_all())
            self._on_change()
            await self._stop.wait()
            await self._stop_readers(self.members, range(len(self.group.workers)))
            await self._await_exits(self.members, None)
        finally:
            await self._kill_all()
            async with self._reload_lock:
                pass  # a reload that was running has nothing to wait for any more

    def stop(self) -> None:
        """Let all workers end; called once more, kill them. Call it in the event loop of ``run()``."""
        if self._stop.is_set():
            for member in self._members:
                member.kill(signal.SIGKILL)
            return
        self._stop.set()
        for member in self.members:
            self._ask_to_end(member, self.limits.drain)
        self._note_change()

    def dispatch(self, weights: Mapping[int, float]) -> None:
        """Share new connections out by weight: as ``SteeringGroup.dispatch``, among the workers that run.

        It holds for workers that take their places later, too.

        Raises:
            ValueError: no such worker, a negative weight, or nothing but zeros.
            SteeringUnavailable: only the mode ``ebpf`` has a dispatch table that can change.
        """
        for index in weights:
            if not 0 <= index < self._count:
                raise ValueError(f"index is {index}, it must be 0 to {self._count - 1}")
        shares: dict[int, float] = {}
        for post in self._posts(self._current, self._count, self._generation):
            for listener in post.listeners:
                weight = weights.get(post.index, 1.0)
                shares[listener] = weight / len(post.listeners) if len(post.listeners) > 1 else weight
        self.group.dispatch(shares)
        self._weights = dict(weights)

    def _keep_weights(self) -> None:
        """After a reload with another number of workers: weights are by worker, the kernel's table is by listener."""
        weights = {index: weight for index, weight in self._weights.items() if index < self._count}
        if all(weights.get(index) == 0 for index in range(self._count)):
            weights = {}  # somebody must take new connections
        self.dispatch(weights)

    def dump(self) -> dict[str, Any]:
        """Return what a successor in this process needs to know, without the workers."""
        return {
            "bank": self._current,
            "generation": self._generation,
            "count": self._count,
            "weights": list(self._weights.items()),
            "failures": list(self._failures.items()),
            "reloads": self.reloads,
            "restarts": self.restarts,
            "reports": self.reports.dump(),
        }

    def adopt(self, members: list[Member], saved: dict[str, Any]) -> None:
        """Go on with the workers of the supervisor that this process was before; call it before ``run()``."""
        self._adopted = True
        self._members = set(members)
        self._current, self._generation = saved["bank"], saved["generation"]
        self._count, self._weights = saved["count"], dict(saved["weights"])
        self._failures = dict(saved["failures"])
        self.reloads, self.restarts = saved["reloads"], saved["restarts"]
        if "reports" in saved:
            self.reports.adopt(saved["reports"])

    async def reload(self, workers: int | None = None) -> None:
        """Hand over to a new generation of workers, of another number if ``workers`` says so.

        It waits for a free bank: until the connections of an earlier generation have ended, at most the drain limit.
        Without steering a worker's connections end with it.

        Raises:
            ReloadFailed: the new generation did not get ready, or ``busy`` says why none can start; nothing has
                changed.
            ValueError: more workers than the group has room for.
        """
        count = _check_count(self._count if workers is None else workers, len(self.group.workers))
        if self.busy:
            raise ReloadFailed(self.busy)
        async with self._reload_lock:
            try:
                await self._hand_over(count)
            except StartFailed as error:
                raise ReloadFailed(f"the new workers did not get ready, the old ones go on: {error}") from error
            finally:
                self._say("")
            self.reloads += 1

    async def _start_first(self) -> None:
        async with self._reload_lock:
            try:
                first = await self._start_generation(self._current, self._count, self._generation)
            except StartFailed:
                if not self._stop.is_set():
                    raise
                return
            for member in first:
                self._listen(member)

    def _resume(self) -> None:
        """Go on with the workers of the supervisor that this process was before, and start those that had died."""
        for member in self.members:
            self._watch(member)
            if member.leaving and self.limits.drain is not None:
                self._in_background(self._end_at_last(member, self.limits.drain))
        alive = {member.index for member in self._members if member.generation == self._generation}
        for post in self._posts(self._current, self._count, self._generation):
            if post.index not in alive:
                self._in_background(self._restart(post))

    def _posts(self, bank: int, count: int, generation: int) -> list[Post]:
        """Share the listeners out among ``count`` workers."""
        capacity = len(self.group.workers)
        return [Post(index, bank, tuple(range(index, capacity, count)), generation) for index in range(count)]

    async def _hand_over(self, count: int) -> None:
        bank = await self._free_bank()
        self._say("waiting for the new workers to get ready")
        fresh = await self._start_generation(bank, count, self._generation + 1)
        old = [member for member in self._members if member.generation == self._generation]
        keeps_count = count == self._count
        self._current, self._count = bank, count
        self._generation += 1
        self._failures.clear()
        self._say("handing over the listeners")
        if not self.group.mode.steers:
            await self._end_all(old)
        for member in fresh:
            await self._stop_readers(old, member.listeners)
            if member.exited.done():
                self._in_background(self._restart(member.post))
            else:
                self._listen(member)
        if self._weights and not keeps_count:
            self._keep_weights()

    async def _end_all(self, old: list[Member]) -> None:
        """Without steering a worker's connections arrive where its listeners are read: they end when others do that."""
        for member in old:
            self._ask_to_end(member, 0.0)
        await self._await_exits(old, None)

    async def _free_bank(self) -> int:
        """Wait for a bank that no process uses."""
        banks = self.group.banks
        if not self.group.mode.steers:
            return (self._current + 1) % banks  # a number only: the sockets are the same
        if banks < 2:
            raise ReloadFailed("the group has one bank of slots: a reload needs split=True and banks=2")
        while not self._stop.is_set():
            used = {member.bank for member in self._members}
            for step in range(1, banks):
                bank = (self._current + step) % banks
                if bank not in used:
                    return bank
            left = sum(member.bank != self._current for member in self._members)
            self._say(f"waiting for a free bank: {left} workers of earlier generations still have connections")
            await self._changed.wait()
        raise ReloadFailed(self.busy)

    async def _start_generation(self, bank: int, count: int, generation: int) -> list[Member]:
        """Start workers and wait until all are ready; if one is not, none stays."""
        fresh: list[Member] = []
        try:
            for post in self._posts(bank, count, generation):
                fresh.append(self._start(post))
            await asyncio.gather(*(self._await_ready(member) for member in fresh))
            for member in fresh:  # one may have died while others were not ready yet
                _check_alive(member)
        except BaseException:
            for member in fresh:
                member.leaving = True
                member.kill(signal.SIGKILL)
            await self._await_exits(fresh, EXIT_TIMEOUT)
            self._park_if_empty(bank)
            raise
        return fresh

    def _start(self, post: Post) -> Member:
        loop = asyncio.get_running_loop()
        if self._stop.is_set():
            raise StartFailed(self.busy)
        try:
            pid, pidfd, ours = self._start_with_channel(post)
        except OSError as error:
            raise StartFailed(f"worker {post.index} could not be started: {error}") from error
        futures = (loop.create_future(), loop.create_future(), loop.create_future())
        member = Member(post.index, post.bank, post.listeners, post.generation, pid, pidfd, ours, *futures)
        self._members.add(member)
        self._watch(member)
        loop.call_later(self.limits.mute, self._take_for_mute, member)
        _logger.info("%s started", member)
        return member

    def _start_with_channel(self, post: Post) -> tuple[int, int, Channel]:
        ours, theirs = channel_pair()
        try:
            with self.group.worker(post.index, post.bank, listeners=post.listeners) as worker:
                worker.attach(theirs)
                pid = self._start_process(worker)
            try:
                return pid, os.pidfd_open(pid), ours
            except OSError:
                os.kill(pid, signal.SIGKILL)  # nobody would see it end
                raise
        except BaseException:
            ours.close()
            raise

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
            if member.hung:
                member.hung = False
                _logger.info("%s answers again", member)
                self._note_change()
            if message["say"] == "ready":
                _resolve(member.ready)
            elif message["say"] == "stopped":
                _resolve(member.stopped)
            elif message["say"] == "drained":
                self._in_background(self._end(member))
            elif message["say"] == "report":
                self.reports.take(member, message.get("figures"))

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
        for message in member.channel.receive() or []:
            if message["say"] == "report":
                self.reports.take(member, message.get("figures"))
        self.reports.end(member)
        os.close(member.pidfd)
        member.channel.close()
        self._members.discard(member)
        member.exited.set_result(status)
        _logger.log(logging.INFO if member.leaving else logging.ERROR, "%s %s", member, describe_status(status))
        if member.state is State.SERVING and not member.leaving and self._is_wanted(member.post):
            if time.monotonic() - member.started > STEADY_AFTER:
                self._failures.pop(member.index, None)
            self._in_background(self._restart(member.post))
        self._park_if_empty(member.bank)
        self._note_change()

    def _park_if_empty(self, bank: int) -> None:
        """Close the slots of a bank to datagrams when nobody is left there."""
        if bank != self._current and all(member.bank != bank for member in self._members):
            self.group.park(bank)

    def _is_wanted(self, post: Post) -> bool:
        """Whether somebody shall work there: not any more after a reload."""
        return post.generation == self._generation and not self._stop.is_set()

    async def _restart(self, post: Post) -> None:
        """Start workers in the place of one that died, until one is ready. Its datagrams have waited in the kernel."""
        while self._is_wanted(post):
            failures = self._failures.get(post.index, 0)
            self._failures[post.index] = failures + 1
            if failures:
                delay = min(BACKOFF_FIRST * 2 ** min(failures - 1, 16), BACKOFF_MAX)
                _logger.warning(
                    "worker %d died %d times in a row: next start in %.1f s", post.index, failures + 1, delay
                )
                await asyncio.sleep(delay)
            if self._is_wanted(post) and await self._start_anew(post):
                return

    async def _start_anew(self, post: Post) -> bool:
        """Start a worker in the place of one that died; returns ``False`` when there must be another attempt."""
        self.restarts += 1
        try:
            member = self._start(post)
            await self._await_ready(member)
        except (StartFailed, ValueError) as error:
            _logger.error("%s", error)
            return False
        if self._is_wanted(post):
            # In the middle of a reload a worker of the generation before may still read them.
            before = [other for other in self._members if other.generation < post.generation]
            await self._stop_readers(before, post.listeners)
        if member.exited.done():
            return False
        self._listen(member)
        self._on_change()
        return True

    async def _await_ready(self, member: Member) -> None:
        await _first_of(self.limits.ready, member.ready, member.exited)
        _check_alive(member)
        if not member.ready.done():
            member.kill(signal.SIGKILL)
            raise StartFailed(f"{member} was not ready after {self.limits.ready:g} s and was killed")
        if member.state is State.STARTING:
            member.state = State.READY

    def _listen(self, member: Member) -> None:
        if not member.leaving:
            member.state = State.SERVING
            member.channel.send("listen")

    async def _stop_readers(self, members: Iterable[Member], listeners: Iterable[int]) -> None:
        """See to it that none of these workers reads these listeners any more."""
        wanted = set(listeners)
        readers = [member for member in members if wanted & set(member.listeners)]
        for member in readers:
            self._ask_to_end(member, self.limits.drain)
        await asyncio.gather(*(self._await_stop(member) for member in readers))

    async def _await_stop(self, member: Member) -> None:
        """Wait until a worker reads its listeners no more; what knows nothing of quicsteer does not say so."""
        if not member.speaks:
            return
        await _first_of(STOP_TIMEOUT, member.stopped, member.exited)
        if not member.stopped.done() and not member.exited.done():
            _logger.error("%s did not stop listening: killed, so that its listeners have one reader", member)
            member.kill(signal.SIGKILL)
            await asyncio.wait({member.exited})

    def _ask_to_end(self, member: Member, drain: float | None) -> None:
        """Let a worker take no new connection, and end when it has none left or the time is over."""
        if member.leaving:
            return
        starting = member.state is State.STARTING
        member.leaving = True
        member.state = State.DRAINING
        if starting or not member.speaks or not member.channel.send("stop", seconds=drain):
            member.kill(signal.SIGTERM)
        if starting:
            _resolve(member.stopped)  # nobody will tell it to listen
            self._in_background(self._end(member))
        elif drain is not None:
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
                at_work = member.speaks and member.state is not State.STARTING
                if at_work and not member.hung and now - member.last_alive > self.limits.hung:
                    self._check_hung(member, now)
            self.reports.ask(self.members)
            self.group.stats()  # which warns of foreign connection IDs
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

    def _note_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._on_change()

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


def _check_alive(member: Member) -> None:
    if member.exited.done():
        raise StartFailed(f"{member} {describe_status(member.exited.result())} before it was ready")


async def _first_of(timeout: float, *futures: "asyncio.Future[Any]") -> None:
    """Wait until one of several things has happened, or the time is over."""
    await asyncio.wait(futures, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
