"""``SteeringGroup``: the fixed array of sockets that workers share; the only place that falls back and warns."""

import logging
import os
import secrets
import socket
import sys
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any

from . import capability
from .abi import CID_LENGTH_DEFAULT, TABLE_SIZE
from .addresses import Address, BindAddress, format_address, resolve
from .cid import Identity, generation_start
from .counters import GroupStats, HostStats, read_host
from .errors import (
    ForeignConnectionIdWarning,
    KernelError,
    QuicSteerError,
    ReceiveBufferWarning,
    SteeringFallbackWarning,
    SteeringUnavailable,
)
from .foreign import ForeignIds
from .handover import Place, WorkerState
from .locks import ForkLock
from .modes import SteeringMode
from .options import AUTO, Layout, Options, SocketOption, check_options, check_range, spread
from .sockets import (
    AddressSockets,
    closing_on_error,
    open_all,
    open_slot,
    park_slot,
    queued_bytes,
    read_sink_outcomes,
    read_sinks,
    read_slots,
)
from .steering import is_refusal
from .store import adopt_store, create_store
from .worker import Worker

_logger = logging.getLogger("quicsteer")


class SteeringGroup:
    """UDP sockets on one or more addresses, one per slot and address, and the program that steers between them.

    Open it with ``SteeringGroup.open()``, hand ``workers`` out, and keep the group open while they run: it holds
    every socket, so a worker that dies takes no queued datagram with it. Methods may be called from any thread.
    """

    def __init__(
        self, options: Options, parts: list[AddressSockets], fallback: str | None, past: dict[str, Any] | None = None
    ) -> None:
        slots = range(options.layout.slots)
        self.pid = os.getpid()
        self._options = options
        self._parts = parts
        self._fallback = fallback
        self._mode = parts[0].steering.mode
        self._places = options.layout.places(self._mode.steers)
        self._lock = ForkLock()
        self._foreign = ForeignIds()
        self._closed = False
        self._handed_out: weakref.WeakSet[Worker] = weakref.WeakSet()
        self._store = create_store() if past is None else adopt_store(past["store"])
        if past is None:
            self._host = read_host()
            self._first_counts = [int.from_bytes(secrets.token_bytes(4), "big") for _ in slots]
            self._generations = [0 for _ in slots]
            for slot in {*range(self._layout.workers), *self._layout.bank(0)}:
                self._open_slot(slot)
        else:
            self._host = HostStats(**past["host"]) if past["host"] else None
            self._first_counts, self._generations = past["first_counts"], past["generations"]
        self._workers = tuple(self._make_worker(index, 0, [index]) for index in range(self._layout.workers))

    @classmethod
    def open(
        cls,
        addresses: Address | Iterable[Address],
        workers: int,
        *,
        split: bool = False,
        banks: int = 1,
        mode: str = AUTO,
        cid_length: int = CID_LENGTH_DEFAULT,
        key: bytes | None = None,
        drop_invalid: bool = False,
        receive_buffer: int | None = None,
        socket_options: Iterable[SocketOption] = (),
    ) -> "SteeringGroup":
        """Open a group.

        ``addresses`` is ``"host:port"``, ``(host, port)`` or several of them; port 0 takes a free port. Each address
        is claimed: if any socket on the host has it, opening fails.

        ``workers`` is 1 to 1024. ``split`` gives each worker a listener socket for new connections and an established
        socket for datagrams that carry our connection IDs; ``banks`` is the number of established sockets per worker,
        for the generations of workers that live at once during a reload. ``mode`` is ``"auto"`` or one of
        ``SteeringMode``. ``cid_length`` is 8 to 20 bytes. ``key`` is 16 secret bytes, random by default. With
        ``drop_invalid`` datagrams that no worker could serve are dropped in the kernel, silently.
        ``receive_buffer`` is in bytes per socket; ``socket_options`` are ``(level, option, value)`` as for
        ``setsockopt``. Both are set before bind.

        Warns:
            SteeringFallbackWarning: ``"auto"`` did not get the best mode.
            ReceiveBufferWarning: the kernel gave less receive buffer than asked for.

        Raises:
            ValueError, TypeError: an argument is wrong.
            SteeringUnavailable: the named mode does not work here.
            KernelError: a call failed; with EADDRINUSE it names who has the address. Nothing stays open.
        """
        options = check_options(
            workers=workers,
            split=split,
            banks=banks,
            mode=mode,
            cid_length=cid_length,
            key=key,
            drop_invalid=drop_invalid,
            receive_buffer=receive_buffer,
            socket_options=socket_options,
        )
        bind_addresses = resolve(addresses)
        parts, options, refusals = _open_best(bind_addresses, options)
        with closing_on_error(parts):
            fallback = _report_fallback(parts[0].steering.mode, refusals, options) if refusals else None
            _report_buffer(parts, options.receive_buffer)
            return cls(options, parts, fallback)

    @property
    def mode(self) -> SteeringMode:
        """How datagrams reach their worker."""
        return self._mode

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """The bound addresses as (host, port)."""
        self._check_open()
        return tuple(part.address for part in self._parts)

    @property
    def workers(self) -> tuple[Worker, ...]:
        """The workers of bank 0, whose slots are open from the start."""
        return self._workers

    @property
    def banks(self) -> int:
        """Generations of workers that can live at once: 1 in the plain form."""
        return self._layout.banks

    def __repr__(self) -> str:
        where = "closed" if self._closed else ", ".join(format_address(address) for address in self.addresses)
        return f"<SteeringGroup {where} mode={self._mode} workers={self._layout.workers}>"

    def worker(self, index: int, bank: int = 0, *, listeners: Iterable[int] | None = None) -> Worker:
        """Return a worker for a slot, and open its established slot if it is parked.

        ``listeners`` are the listener slots that it reads: its own by default, those of workers that are not there
        besides. Ask for one more worker whenever a new process takes a slot over.

        Raises:
            ValueError: no such worker or bank.
            QuicSteerError: the group is closed.
        """
        check_range("index", index, 0, self._layout.workers - 1)
        check_range("bank", bank, 0, self._layout.banks - 1)
        listens_on = [index] if listeners is None else list(listeners)
        for listener in listens_on:
            check_range("listener", listener, 0, self._layout.workers - 1)
        with self._lock:
            self._check_open()
            self._open_slot(self._layout.established(index, bank))
            return self._make_worker(index, bank, listens_on)

    def park(self, bank: int) -> None:
        """Close the established slots of a bank to datagrams and empty them. A parked bank is silent.

        Raises:
            ValueError: no such bank, or the group has the plain form.
            QuicSteerError: the group is closed.
        """
        if not self._layout.split:
            raise ValueError("a group in plain form has no bank to park: open it with split=True")
        check_range("bank", bank, 0, self._layout.banks - 1)
        with self._lock:
            self._check_open()
            if not self._mode.steers:
                return
            for slot in self._layout.bank(bank):
                for part in self._parts:
                    park_slot(part.sockets[slot], part.counters[slot])

    def dispatch(self, weights: Mapping[int, float]) -> None:
        """Share new connections out by weight; workers that are not named have weight 1, and 0 drains a worker.

        Connections that exist stay where they are.

        Raises:
            ValueError: no such worker, a negative weight, or nothing but zeros.
            SteeringUnavailable: only the mode ``ebpf`` has a dispatch table that can change.
        """
        shares = [1.0] * self._layout.workers
        for index, weight in weights.items():
            check_range("index", index, 0, self._layout.workers - 1)
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
                raise ValueError(f"weight of worker {index} is {weight!r}, it must be a number of at least 0")
            shares[index] = weight
        if not any(shares):
            raise ValueError("all weights are 0: somebody must take new connections")
        if self._mode is not SteeringMode.EBPF:
            raise SteeringUnavailable(
                SteeringMode.EBPF, f"the group is in mode {self._mode!s}, which has a fixed dispatch table"
            )
        with self._lock:
            self._check_open()
            for index, slot in enumerate(spread(shares, TABLE_SIZE)):
                for part in self._parts:
                    part.steering.set_listener(index, slot)

    def stats(self) -> GroupStats:
        """Return what the kernel did with the group's datagrams so far.

        Warns:
            ForeignConnectionIdWarning: once, when a server seems to issue other connection IDs than the group's. Read
                the figures every few seconds to hear of it; ``quicsteer run`` does.

        Raises:
            QuicSteerError: the group is closed.
        """
        stats = self._read_stats()
        text = self._foreign.look(stats)
        if text:
            _logger.warning("%r: %s", self, text)
            _warn(text, ForeignConnectionIdWarning)
        return stats

    def _read_stats(self) -> GroupStats:
        with self._lock:
            self._check_open()
            slots = [stats for part in self._parts for stats in read_slots(part, self._places)]
            host = read_host()
            return GroupStats(
                mode=self._mode,
                time=time.monotonic(),
                slots=tuple(slots),
                sink=read_sinks(self._parts),
                host=host - self._host if host and self._host else None,
                fallback=self._fallback,
                sink_outcomes=read_sink_outcomes(self._parts),
            )

    def queued(self, index: int, bank: int, listeners: Iterable[int]) -> int:
        """Return the bytes that wait in the sockets of a worker, in the kernel's accounting."""
        with self._lock:
            self._check_open()
            numbers = {*listeners, self._socket_of(self._layout.established(index, bank))}
            return sum(queued_bytes(part.sockets[number]) for part in self._parts for number in numbers)

    def close(self) -> None:
        """Close every socket and the program, and what workers took in this process. Closing twice does nothing.

        Workers in other processes keep their sockets, and the kernel the program, until the last of them ends.
        """
        if os.getpid() == self.pid:
            self._close_workers()
        self._close_own()

    def leave_child(self, worker: Worker) -> None:
        """Close this process's copies of the group's sockets and program, and of all workers but one."""
        self._close_workers(besides=worker)
        self._close_own()

    def _close_workers(self, besides: Worker | None = None) -> None:
        with self._lock:
            workers = list(self._handed_out)
        for worker in workers:
            if worker is not besides:
                worker.close()

    def _close_own(self) -> None:
        with self._lock:
            self._closed = True
            for part in self._parts:
                part.close()
            if self._store:
                self._store.close()

    def next_identity(self, slot: int) -> Identity:
        """Return the identity for one more process that takes over a slot."""
        with self._lock:
            generation = self._generations[slot]
            self._generations[slot] += 1
        start = generation_start(self._first_counts[slot], generation)
        return Identity(slot, self._layout.slots, self._options.cid_length, start)

    def __enter__(self) -> "SteeringGroup":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _make_worker(self, index: int, bank: int, listeners: list[int]) -> Worker:
        slot = self._layout.established(index, bank)
        state = WorkerState(
            Place(index, bank, self._mode),
            self.next_identity(slot),
            self._options.keys,
            listeners=tuple(part.sockets[listener] for part in self._parts for listener in listeners),
            established=tuple(part.sockets[self._socket_of(slot)] for part in self._parts),
            store=self._store,
        )
        worker = Worker(state, owner=self)
        self._handed_out.add(worker)
        return worker

    def dump(self) -> tuple[dict[str, Any], list[int]]:
        """Return what ``adopt()`` needs to go on with this group in another program, and the descriptors to keep.

        It holds the group's key.
        """
        with self._lock:
            self._check_open()
            state = {
                "options": self._options.dump(),
                "mode": str(self._mode),
                "fallback": self._fallback,
                "parts": [part.dump() for part in self._parts],
                "past": {
                    "host": asdict(self._host) if self._host else None,
                    "first_counts": self._first_counts,
                    "generations": self._generations,
                    "store": self._store.descriptor if self._store else None,
                },
            }
            descriptors = [descriptor for part in self._parts for descriptor in part.descriptors()]
            return state, [*descriptors, self._store.descriptor] if self._store else descriptors

    @classmethod
    def adopt(cls, state: dict[str, Any]) -> "SteeringGroup":
        """Go on with a group whose descriptors this process has kept over an execve, as ``dump()`` described it."""
        options = Options.load(state["options"])
        mode = SteeringMode(state["mode"])
        parts = [AddressSockets.adopt(mode, options.rules(), part) for part in state["parts"]]
        return cls(options, parts, state["fallback"], state["past"])

    @property
    def _layout(self) -> Layout:
        return self._options.layout

    def _socket_of(self, slot: int) -> int:
        """Return which socket serves an established slot: without a program there are only the listeners."""
        return slot if self._mode.steers else slot % self._layout.workers

    def _open_slot(self, slot: int) -> None:
        for part in self._parts:
            number = self._socket_of(slot)
            open_slot(part.sockets[number], part.counters[number])

    def _check_open(self) -> None:
        if self._closed:
            raise QuicSteerError("the group is closed in this process")


def _open_best(
    addresses: list[BindAddress], options: Options
) -> tuple[list[AddressSockets], Options, list[capability.Probe]]:
    """Open the sockets in the named mode, or in the best one that works; say what the better ones lack."""
    refusals: list[capability.Probe] = []
    for mode in [options.mode] if options.mode else list(SteeringMode):
        attempt = options
        if mode is SteeringMode.SINGLE:
            attempt = options._replace(layout=options.layout._replace(workers=1))
        refusal = capability.refusal(mode)
        if refusal is None or refusal.ok is None:  # a probe that could not tell leaves it to trying
            try:
                return open_all(addresses, attempt, mode), attempt, refusals
            except KernelError as error:
                if not is_refusal(error):
                    raise
                refusal = capability.explain_refusal(mode, error)
        if options.mode:
            raise SteeringUnavailable(str(mode), refusal.detail, refusal.remedy)
        refusals.append(refusal)
    raise AssertionError("the last mode is never refused")


def _report_fallback(mode: SteeringMode, refusals: list[capability.Probe], options: Options) -> str:
    reasons = "; ".join(f"{probe.name}: {probe.detail}" for probe in refusals)
    remedies = " | ".join(dict.fromkeys(probe.remedy for probe in refusals if probe.remedy))
    text = f"quicsteer runs in mode '{mode}'. {reasons}."
    if not mode.steers:
        text += " Connections break when a client's address changes."
        if options.drop_invalid:
            text += " drop_invalid has no effect."
    if remedies:
        text += f" To change this: {remedies}"
    _logger.warning("%s", text)
    _warn(text, SteeringFallbackWarning)
    return text


def _report_buffer(parts: list[AddressSockets], asked: int | None) -> None:
    """Warn when the kernel clamped the receive buffer; SO_RCVBUF reads back twice what was set (socket(7))."""
    if asked is None:
        return
    got = min(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for part in parts for sock in part.sockets) // 2
    if got < asked:
        text = (
            f"receive_buffer: asked for {asked} bytes, the kernel gave {got}: "
            f"raise the limit with sysctl -w net.core.rmem_max={asked}"
        )
        _logger.warning("%s", text)
        _warn(text, ReceiveBufferWarning)


def _warn(text: str, category: type[Warning]) -> None:
    """Warn at the line that called this package."""
    depth = 2
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame = frame.f_back
        depth += 1
    warnings.warn(text, category, stacklevel=depth)
