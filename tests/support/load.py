"""A steady load of QUIC clients: they connect, echo, change ports, leave, and come again."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from quic import Address, Client


@dataclass
class Load:
    """What the clients did so far."""

    handshakes: int = 0
    echoes: int = 0
    port_changes: int = 0
    open: int = 0
    """Connections that are open now."""
    failed_handshakes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Connections that broke, or did not echo what was sent."""
    slowest_handshake: float = 0.0
    slowest_echo: float = 0.0
    echo_times: list[float] = field(default_factory=list)
    victims: int = 0
    """Connections and handshakes whose worker was killed; these are not counted as lost or failed."""

    def __str__(self) -> str:
        return (
            f"{self.handshakes} handshakes, the slowest took {self.slowest_handshake:.2f} s, "
            f"{len(self.failed_handshakes)} failed; {self.echoes} echoes, the slowest took {self.slowest_echo:.2f} s, "
            f"{self.port_changes} port changes; "
            f"{len(self.lost)} connections lost, {self.victims} with their worker"
        )


@dataclass(frozen=True)
class Habit:
    """How a client behaves, in seconds: each time a random one of two."""

    life: tuple[float, float]
    pause: tuple[float, float]
    port_changes: float = 0.3
    """How likely the port changes before an echo."""


SHORT = Habit(life=(1.0, 1.5), pause=(0.2, 0.5))
STATIONARY = Habit(life=(0.2, 0.5), pause=(0.1, 0.2), port_changes=0)
LONG = Habit(life=(3.0, 4.0), pause=(0.3, 0.9))


@dataclass(eq=False)
class Visit:
    """One connection of a client, from its first datagram to its end."""

    client: Client
    started: float = field(default_factory=time.monotonic)
    connected: bool = False


class Clients:
    """Keeps so many connections open until it is stopped.

    ``slot_of`` tells the slot of a server's connection ID; who uses ``kill_slot`` needs it.
    """

    def __init__(
        self,
        address: Address,
        *habits: tuple[int, Habit],
        slot_of: Callable[[bytes], int | None] = lambda cid: None,
        seed: int = 1,
    ) -> None:
        self.load = Load()
        self._address = address
        self._habits = [habit for count, habit in habits for _ in range(count)]
        self._slot_of = slot_of
        self._random = random.Random(seed)
        self._stopped = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._visits: dict[asyncio.Task[None], Visit] = {}
        self._killed: dict[int, float] = {}

    async def start(self) -> None:
        """Start the clients, and wait until each has had a connection."""
        firsts = [asyncio.Event() for _ in self._habits]
        for habit, first in zip(self._habits, firsts, strict=True):
            self._tasks.append(asyncio.create_task(self._come_again(habit, first)))
        await asyncio.gather(*(first.wait() for first in firsts))

    async def stop(self) -> None:
        """Let each client finish its connection in order."""
        self._stopped.set()
        pending = set(self._tasks)
        while pending:
            self.release_victims()
            _, pending = await asyncio.wait(pending, timeout=0.1)
        await asyncio.gather(*self._tasks)

    def kill_slot(self, slot: int, when: float) -> None:
        """Take note that the worker of a slot was killed: its clients come again at once, and are victims."""
        self._killed[slot] = when
        self.release_victims()

    def release_victims(self) -> None:
        """Look for clients whose worker was killed; some learn only from its last datagrams that it was theirs."""
        for task, visit in self._visits.items():
            if self._is_victim(visit):
                task.cancel()

    def _is_victim(self, visit: Visit) -> bool:
        slot = self._slot_of(visit.client.server_cid)
        return slot is not None and visit.started < self._killed.get(slot, 0.0)

    async def _come_again(self, habit: Habit, first: asyncio.Event) -> None:
        while not self._stopped.is_set():
            visit = Visit(Client())
            task = asyncio.create_task(self._run(visit, habit, first))
            self._visits[task] = visit
            try:
                await asyncio.wait({task})
                self._judge(visit, task)
            finally:
                first.set()
                del self._visits[task]
                _leave(visit.client)

    def _judge(self, visit: Visit, task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            return
        if self._is_victim(visit):
            self.load.victims += 1
        elif not isinstance(error, (OSError, TimeoutError, AssertionError, ValueError, asyncio.CancelledError)):
            raise error
        elif visit.connected:
            self.load.lost.append(f"slot {self._slot_of(visit.client.server_cid)}: {error!r}")
        else:
            self.load.failed_handshakes.append(repr(error))

    async def _run(self, visit: Visit, habit: Habit, first: asyncio.Event) -> None:
        load, client = self.load, visit.client
        await client.connect(self._address)
        load.handshakes += 1
        load.slowest_handshake = max(load.slowest_handshake, time.monotonic() - visit.started)
        first.set()
        visit.connected = True
        load.open += 1
        end = time.monotonic() + self._random.uniform(*habit.life)
        try:
            while time.monotonic() < end and not self._stopped.is_set():
                await self._echo(client)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), self._random.uniform(*habit.pause))
                if self._random.random() < habit.port_changes:
                    await client.change_port()
                    load.port_changes += 1
            await self._echo(client)
        finally:
            load.open -= 1

    async def _echo(self, client: Client) -> None:
        start = time.monotonic()
        await client.exchange()
        self.load.echoes += 1
        self.load.echo_times.append(time.monotonic() - start)
        self.load.slowest_echo = max(self.load.slowest_echo, time.monotonic() - start)


def _leave(client: Client) -> None:
    """Close the connection, unless the client was interrupted between two sockets."""
    transport = client.protocol._transport
    if transport is not None and not transport.is_closing():
        client.protocol.close()
    client.drop()


@contextlib.asynccontextmanager
async def clients(address: Address, *habits: tuple[int, Habit]) -> AsyncIterator[Load]:
    """Clients that are there for the length of a block; afterwards all have finished."""
    group = Clients(address, *habits)
    await group.start()
    try:
        yield group.load
    finally:
        await group.stop()
