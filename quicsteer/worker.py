"""What a worker is given: its sockets, its connection IDs, its secrets; and how that travels to another process."""

import fcntl
import json
import os
import pwd
import shutil
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Protocol

from . import _kernel
from .addresses import format_address
from .cid import ConnectionIds, GroupKeys, Identity
from .errors import QuicSteerError
from .modes import SteeringMode

STATE_VARIABLE = "QUICSTEER_FD"
"""Environment variable with the number of the descriptor that holds a worker's state."""

_STATE_VERSION = 1
_STATE_SIZE_MAX = 64 * 1024
_LISTEN_FIRST = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
_LISTEN_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_SEALS = ("F_SEAL_SEAL", "F_SEAL_SHRINK", "F_SEAL_GROW", "F_SEAL_WRITE")

Socket = socket.socket
Sockets = tuple[Socket, ...]


@dataclass(frozen=True)
class Place:
    """Where a worker stands in its group."""

    index: int
    bank: int
    mode: SteeringMode


class Owner(Protocol):
    """What a worker needs of the group that it came from."""

    pid: int

    def leave_child(self) -> None:
        """Close this process's copies of the group: it is a forked child and has what it needs."""

    def next_identity(self, slot: int) -> Identity:
        """Return the identity for one more process that takes over a slot."""


class Worker:
    """The slots of one worker.

    Its sockets are duplicates of the group's, non-blocking, and belong to whoever reads them; closing them closes
    nothing else. Hand a worker over by fork, by ``multiprocessing`` (it can be pickled while a process is spawned),
    to a thread, or with ``spawn()``; in each process take ``sockets`` once. A forked child that takes them closes its
    copies of all other slots.
    """

    def __init__(
        self,
        place: Place,
        identity: Identity,
        keys: GroupKeys,
        *,
        listeners: Sequence[Socket],
        established: Sequence[Socket],
        owner: Owner | None = None,
    ) -> None:
        self._place = place
        self._identity = identity
        self._keys = keys
        self._listeners: Sockets = tuple(listeners)
        self._established: Sockets = tuple(established)
        self._owner = owner
        self._taken = owner is None
        self._closed = False
        self._lock = threading.Lock()
        self._connection_ids = ConnectionIds(keys, identity)

    def __repr__(self) -> str:
        return f"<Worker index={self.index} bank={self.bank} slot={self.slot} mode={self.mode}>"

    @property
    def index(self) -> int:
        """Number of the worker in its group, from 0."""
        return self._place.index

    @property
    def bank(self) -> int:
        """The bank of its established slot; 0 in the plain form."""
        return self._place.bank

    @property
    def mode(self) -> SteeringMode:
        """How datagrams reach the worker."""
        return self._place.mode

    @property
    def slot(self) -> int:
        """The slot that its connection IDs name."""
        return self._identity.slot

    @property
    def connection_ids(self) -> ConnectionIds:
        """Issues and reads connection IDs."""
        return self._connection_ids

    @property
    def token_secret(self) -> bytes:
        """32 secret bytes, the same in all workers of the group, to key address validation tokens with."""
        return self._keys.token_secret

    @property
    def established(self) -> Sockets:
        """One socket per address for datagrams that carry our connection IDs. Answers leave through it."""
        self._take()
        return self._established

    @property
    def listeners(self) -> Sockets:
        """One socket per address for datagrams of new connections; in the plain form the same as ``established``."""
        self._take()
        return self._listeners

    @property
    def sockets(self) -> Sockets:
        """All sockets to read, established ones first."""
        return tuple(dict.fromkeys((*self.established, *self.listeners)))

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
        """The bound addresses, in the order of ``established`` and ``listeners``."""
        return tuple(sock.getsockname()[:2] for sock in self._established)

    def close(self) -> None:
        """Close this process's sockets of the worker, if it took them. Closing twice does nothing."""
        with self._lock:
            self._closed = True
            if self._taken:
                for sock in {*self._listeners, *self._established}:
                    sock.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _take(self) -> None:
        """Get sockets of our own: duplicates, so that closing them leaves the group whole."""
        with self._lock:
            if self._closed:
                raise QuicSteerError(f"{self!r} is closed")
            if self._taken or self._owner is None:
                return
            self._listeners, self._established = self._duplicates()
            self._taken = True
            if os.getpid() != self._owner.pid:
                self._owner.leave_child()

    def _duplicates(self) -> tuple[Sockets, Sockets]:
        """Duplicate each socket once, whether it stands in one list or in both.

        Raises:
            QuicSteerError: the sockets are closed already, so nothing can be taken over.
        """
        copies: dict[Socket, Socket] = {}
        try:
            for sock in {*self._listeners, *self._established}:
                if sock.fileno() < 0:
                    raise QuicSteerError(
                        f"{self!r}: the group is closed in this process; a forked child serves one worker"
                    )
                copies[sock] = sock.dup()
        except BaseException:
            for copy in copies.values():
                copy.close()
            raise
        return tuple(copies[sock] for sock in self._listeners), tuple(copies[sock] for sock in self._established)

    def _identity_to_hand_over(self) -> Identity:
        return self._owner.next_identity(self.slot) if self._owner else self._identity

    def __reduce__(self) -> tuple[Any, ...]:
        # Sockets can only be pickled while multiprocessing starts a process: a worker never lies in a file.
        return (
            _rebuild,
            (
                astuple(self._place),
                tuple(self._identity_to_hand_over()),
                self._keys.steering,
                self._listeners,
                self._established,
            ),
        )

    def spawn(
        self,
        arguments: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        user: str | int | None = None,
        group: int | None = None,
    ) -> int:
        """Start a program that takes this worker over with ``Worker.inherited()``; return its pid.

        The sockets are passed as 3, 4, ... by the LISTEN_FDS convention (sd_listen_fds(3)), the secrets in a sealed
        memfd. ``env`` is the environment (this process's by default). With ``user`` the program runs as that user and
        with no capability; ``group`` is a gid, the user's own by default. The caller waits for the process.

        Raises:
            KernelError: a call failed in the child or here; nothing is left behind.
            ValueError: no such user, or an empty command.
        """
        if not arguments:
            raise ValueError("arguments is empty: name the program to start")
        command = [os.fsencode(argument) for argument in arguments]
        program = shutil.which(os.fsdecode(command[0]), path=(env or os.environ).get("PATH", os.defpath))
        uid, gid = _user_ids(user, group)
        with self._lock:
            if self._closed:
                raise QuicSteerError(f"{self!r} is closed")
            sockets = list(dict.fromkeys((*self._established, *self._listeners)))
            state = os.memfd_create("quicsteer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            try:
                os.write(state, self._dump(sockets))
                fcntl.fcntl(state, fcntl.F_ADD_SEALS, _all_seals())
                names = ":".join("established" if s in self._established else "listener" for s in sockets)
                environment = {
                    **(os.environ if env is None else env),
                    "LISTEN_PID": "",
                    "LISTEN_FDS": str(len(sockets)),
                    "LISTEN_FDNAMES": names,
                    STATE_VARIABLE: str(_LISTEN_FIRST + len(sockets)),
                }
                return _kernel.spawn(
                    os.fsencode(program) if program else command[0],
                    command,
                    [os.fsencode(name) + b"=" + os.fsencode(value) for name, value in environment.items()],
                    (*(sock.fileno() for sock in sockets), state),
                    uid,
                    gid,
                )
            finally:
                os.close(state)

    def _dump(self, sockets: list[Socket]) -> bytes:
        state = {
            "version": _STATE_VERSION,
            "place": astuple(self._place),
            "identity": self._identity_to_hand_over(),
            "key": self._keys.steering.hex(),
            "listeners": [sockets.index(sock) for sock in self._listeners],
            "established": [sockets.index(sock) for sock in self._established],
            "addresses": [format_address(sock.getsockname()) for sock in sockets],
        }
        return json.dumps(state).encode()

    @classmethod
    def inherited(cls) -> "Worker | None":
        """Take over what ``spawn()`` passed to this process, or return ``None`` when there is nothing.

        The sockets get close-on-exec, and the environment variables go, so that no child takes them for its own. A
        second call returns ``None``.

        Raises:
            QuicSteerError: what was passed is not for this process, or not what it should be.
        """
        if STATE_VARIABLE not in os.environ:
            return None
        variables = {name: os.environ.pop(name, "") for name in (STATE_VARIABLE, *_LISTEN_VARIABLES)}
        if variables["LISTEN_PID"] != str(os.getpid()):
            raise QuicSteerError(
                f"LISTEN_PID is {variables['LISTEN_PID']!r}, this process is {os.getpid()}: "
                "start the server itself, not by a wrapper that forks"
            )
        state = _read_state(variables[STATE_VARIABLE])
        sockets = _adopt_sockets(variables["LISTEN_FDS"], state["addresses"])
        index, bank, mode = state["place"]
        return cls(
            Place(index, bank, SteeringMode(mode)),
            Identity(*state["identity"]),
            GroupKeys.from_key(bytes.fromhex(state["key"])),
            listeners=[sockets[i] for i in state["listeners"]],
            established=[sockets[i] for i in state["established"]],
        )


def _rebuild(
    place: tuple[int, int, SteeringMode],
    identity: tuple[int, int, int, int],
    key: bytes,
    listeners: Sockets,
    established: Sockets,
) -> Worker:
    for sock in (*listeners, *established):
        sock.setblocking(False)
    return Worker(
        Place(*place), Identity(*identity), GroupKeys.from_key(key), listeners=listeners, established=established
    )


def _all_seals() -> int:
    return sum(getattr(fcntl, name) for name in _SEALS)


def _user_ids(user: str | int | None, group: int | None) -> tuple[int | None, int | None]:
    if user is None:
        return None, group
    try:
        entry = pwd.getpwnam(user) if isinstance(user, str) else pwd.getpwuid(user)
    except KeyError as error:
        if isinstance(user, int) and group is not None:
            return user, group
        raise ValueError(f"user {user!r} is not known here: name one of the password database") from error
    return entry.pw_uid, entry.pw_gid if group is None else group


def _read_state(number: str) -> dict[str, Any]:
    """Read the sealed state and close it."""
    try:
        fd = int(number)
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        data = os.pread(fd, _STATE_SIZE_MAX, 0)
        os.close(fd)
    except (OSError, ValueError) as error:
        raise QuicSteerError(f"{STATE_VARIABLE} is {number!r}, which is no descriptor of a worker: {error}") from error
    if seals != _all_seals():
        raise QuicSteerError(f"{STATE_VARIABLE} is {number!r}: that memory is not sealed")
    try:
        state = json.loads(data)
        version = state["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise QuicSteerError(f"the state in descriptor {number} cannot be read") from error
    if version != _STATE_VERSION:
        raise QuicSteerError(
            f"the state in descriptor {number} has version {version}, this quicsteer reads {_STATE_VERSION}: "
            "run the same release on both sides"
        )
    return dict(state)


def _adopt_sockets(count: str, addresses: list[str]) -> list[Socket]:
    """Open the inherited descriptors as sockets, and make sure that they are the ones that were meant."""
    if count != str(len(addresses)):
        raise QuicSteerError(f"LISTEN_FDS is {count!r}, the worker has {len(addresses)} sockets")
    sockets = []
    for number, address in enumerate(addresses, _LISTEN_FIRST):
        try:
            sock = socket.socket(fileno=number)
            bound = format_address(sock.getsockname())
        except OSError as error:
            raise QuicSteerError(f"descriptor {number} is no socket: {error}") from error
        if bound != address or sock.type != socket.SOCK_DGRAM:
            raise QuicSteerError(f"descriptor {number} is bound to {bound}, the worker's is {address}")
        sock.set_inheritable(False)
        sock.setblocking(False)
        sockets.append(sock)
    return sockets
