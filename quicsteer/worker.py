"""What a worker is given: its sockets, its connection IDs, its secrets."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from .channel import Channel
from .cid import ConnectionIds, Identity
from .errors import QuicSteerError
from .handover import Socket, Sockets, WorkerState, start_program, take_over
from .locks import ForkLock
from .modes import SteeringMode
from .store import SharedStore


class Owner(Protocol):
    """What a worker needs of the group that it came from."""

    pid: int

    def leave_child(self, worker: "Worker") -> None:
        """Close this process's copies of all but one worker: it is a forked child and has what it needs."""

    def next_identity(self, slot: int) -> Identity:
        """Return the identity for one more process that takes over a slot."""


class Worker:
    """The slots of one worker.

    Its sockets are duplicates of the group's, non-blocking, and belong to whoever reads them; closing them closes
    nothing else. Hand a worker over by fork, by ``multiprocessing`` (it can be pickled while a process is spawned),
    to a thread, or with ``spawn()``; in each process take ``sockets`` once. A forked child that takes them closes its
    copies of all other slots.
    """

    def __init__(self, state: WorkerState, owner: Owner | None = None) -> None:
        self._state = state
        self._owner = owner
        self._taken = owner is None
        self._closed = False
        self._greeted = False
        self._lock = ForkLock()
        self._connection_ids = ConnectionIds(state.keys, state.identity)

    def __repr__(self) -> str:
        return f"<Worker index={self.index} bank={self.bank} slot={self.slot} mode={self.mode}>"

    @property
    def index(self) -> int:
        """Number of the worker in its group, from 0."""
        return self._state.place.index

    @property
    def bank(self) -> int:
        """The bank of its established slot; 0 in the plain form."""
        return self._state.place.bank

    @property
    def mode(self) -> SteeringMode:
        """How datagrams reach the worker."""
        return self._state.place.mode

    @property
    def slot(self) -> int:
        """The slot that its connection IDs name."""
        return self._state.identity.slot

    @property
    def connection_ids(self) -> ConnectionIds:
        """Issues and reads connection IDs."""
        return self._connection_ids

    @property
    def token_secret(self) -> bytes:
        """32 secret bytes, the same in all workers of the group, to key address validation tokens with."""
        return self._state.keys.token_secret

    @property
    def store(self) -> SharedStore:
        """A small table that all workers of the group share, where what is taken is gone: for session tickets.

        Raises:
            QuicSteerError: the group has none, where memory cannot be shared (memfd_create(2)).
        """
        store = self._take().store
        if store is None:
            raise QuicSteerError(f"{self!r} has no store")
        return store

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What ``spawn()`` was told to pass to this process besides; they belong to whoever uses them."""
        return self._state.descriptors

    @property
    def established(self) -> Sockets:
        """One socket per address for datagrams that carry our connection IDs. Answers leave through it."""
        return self._take().established

    @property
    def listeners(self) -> Sockets:
        """The sockets for datagrams of new connections, one per address unless the worker stands in for others.

        In the plain form they are the same as ``established``.
        """
        return self._take().listeners

    @property
    def sockets(self) -> Sockets:
        """All sockets to read, established ones first."""
        return self._take().sockets

    @property
    def socket(self) -> Socket:
        """The socket to read, where there is one: the plain form on one address.

        Raises:
            QuicSteerError: there are several.
        """
        sockets = self.sockets
        if len(sockets) != 1:
            raise QuicSteerError(f"{self!r} has {len(sockets)} sockets: use .sockets, .established and .listeners")
        return sockets[0]

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """The bound addresses, in the order of ``established``."""
        return tuple(sock.getsockname()[:2] for sock in self._state.established)

    @property
    def channel(self) -> Channel | None:
        """The channel to the supervisor that started this worker, or ``None``."""
        return self._state.channel

    def ready(self) -> None:
        """Tell the supervisor that this worker reads its established sockets; without a supervisor, do nothing.

        Read the listeners only when the supervisor says ``listen`` (``quicsteer.channel``): until then the worker
        before this one may read them.
        """
        if self._state.channel:
            self._state.channel.send("ready")

    def attach(self, channel: Channel) -> None:
        """Give the worker a channel to its supervisor, before it is handed over."""
        self._state = replace(self._state, channel=channel)

    def close(self) -> None:
        """Close this process's sockets of the worker, if it took them. Closing twice does nothing."""
        with self._lock:
            self._closed = True
            if self._taken:
                for sock in self._state.sockets:
                    sock.close()
                if self._state.store:
                    self._state.store.close()
            if self._state.channel:
                self._state.channel.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take(self) -> WorkerState:
        """Get sockets of our own: duplicates, so that closing them leaves the group whole."""
        with self._lock:
            self._check_open()
            if not self._taken and self._owner is not None:
                self._state = self._state.duplicate()
                self._taken = True
                if os.getpid() != self._owner.pid:
                    self._owner.leave_child(self)
            self._greet()
            return self._state

    def _greet(self) -> None:
        """Tell the supervisor that somebody took the worker over."""
        if self._state.channel and not self._greeted:
            self._greeted = self._state.channel.send("hello")

    def _check_open(self) -> None:
        if self._closed:
            in_child = self._owner is not None and os.getpid() != self._owner.pid
            why = "; a forked child serves one worker" if in_child else ""
            raise QuicSteerError(f"{self!r} is closed in this process{why}")

    def _state_to_hand_over(self) -> WorkerState:
        """Return the state for one more process, with a range of connection IDs of its own."""
        self._check_open()
        identity = self._owner.next_identity(self.slot) if self._owner else self._state.identity
        return replace(self._state, identity=identity)

    def __reduce__(self) -> tuple[Any, ...]:
        return Worker, (self._state_to_hand_over(),)

    def spawn(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
        group: int | None = None,
        descriptors: Sequence[int] = (),
        ignored_signals: Sequence[int] = (),
    ) -> int:
        """Start a program that takes this worker over with ``Worker.inherited()``; return its pid.

        The sockets are passed as 3, 4, ... by the LISTEN_FDS convention (sd_listen_fds(3)), the secrets in a sealed
        memfd. ``env`` is the environment (this process's by default). With ``user`` the program runs as that user and
        with no capability; ``group`` is a gid, the user's own by default. ``descriptors`` of this process are passed
        besides, and found there in ``worker.descriptors``. ``ignored_signals`` (1 to 63) are ignored in the program
        until it says otherwise: SIGINT, for one, which a terminal sends to all processes. The caller waits for the
        process.

        Raises:
            KernelError: a call failed in the child or here; nothing is left behind.
            ValueError: no such user or signal, or an empty command.
            QuicSteerError: the worker is closed.
        """
        with self._lock:
            return start_program(
                self._state_to_hand_over(),
                arguments,
                env,
                user,
                group,
                descriptors=descriptors,
                ignored_signals=ignored_signals,
            )

    @classmethod
    def inherited(cls) -> "Worker | None":
        """Take over what ``spawn()`` passed to this process, or return ``None`` when there is nothing.

        The sockets get close-on-exec, and the environment variables go, so that no child takes them for its own. A
        second call returns ``None``.

        Raises:
            QuicSteerError: what was passed is not for this process, or not what it should be.
        """
        state = take_over()
        if state is None:
            return None
        worker = cls(state)
        worker._greet()
        return worker
