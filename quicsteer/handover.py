"""How a worker's state travels to another program: sockets by the LISTEN_FDS convention, secrets in a sealed memfd."""

import fcntl
import itertools
import json
import os
import pwd
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

from . import _kernel
from .abi import CID_LENGTH_MAX, CID_LENGTH_MIN
from .addresses import format_address
from .channel import Channel
from .cid import GroupKeys, Identity
from .errors import QuicSteerError
from .modes import SteeringMode
from .plain import read_object
from .store import SharedStore

STATE_VARIABLE = "QUICSTEER_FD"
"""Environment variable with the number of the descriptor that holds a worker's state."""

_STATE_VERSION = 1
_STATE_SIZE_MAX = 1024 * 1024
_LISTEN_FIRST = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)
_SIGNAL_MAX = 63  # bits of a set; beyond is one real-time signal more
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


@dataclass(frozen=True)
class WorkerState:
    """All that makes a worker. The ``channel`` leads to its supervisor, if it has one.

    ``descriptors`` are others that a program was started with, for a purpose of its own.
    """

    place: Place
    identity: Identity
    keys: GroupKeys
    listeners: Sockets
    established: Sockets
    store: SharedStore | None = None
    channel: Channel | None = None
    descriptors: tuple[int, ...] = ()

    @property
    def sockets(self) -> Sockets:
        """Each socket once, established ones first."""
        return tuple(dict.fromkeys((*self.established, *self.listeners)))

    def duplicate(self) -> "WorkerState":
        """Return the same state on duplicates of the sockets.

        Raises:
            QuicSteerError: the sockets are closed in this process.
        """
        copies: dict[Socket, Socket] = {}
        try:
            for sock in self.sockets:
                if sock.fileno() < 0:
                    raise QuicSteerError(
                        f"worker {self.place.index}: the group is closed in this process; "
                        "a forked child serves one worker"
                    )
                copies[sock] = sock.dup()
            store = self.store.duplicate() if self.store else None
        except BaseException:
            for copy in copies.values():
                copy.close()
            raise
        return replace(
            self,
            listeners=tuple(copies[sock] for sock in self.listeners),
            established=tuple(copies[sock] for sock in self.established),
            store=store,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Sockets can only be pickled while multiprocessing starts a process: a state never lies in a file.
        channel = self.channel.socket if self.channel else None
        arguments = (astuple(self.place), tuple(self.identity), self.keys.steering)
        return _rebuild, (*arguments, self.listeners, self.established, self.store, channel)


def _rebuild(
    place: tuple[int, int, SteeringMode],
    identity: tuple[int, int, int, int],
    key: bytes,
    *shared: Any,
) -> WorkerState:
    listeners, established, store, channel = shared
    for sock in (*listeners, *established):
        sock.setblocking(False)
    return WorkerState(
        Place(*place),
        Identity(*identity),
        GroupKeys.from_key(key),
        listeners,
        established,
        store,
        Channel(channel) if channel else None,
    )


def start_program(
    state: WorkerState,
    arguments: Sequence[str | os.PathLike[str]],
    env: Mapping[str, str] | None,
    user: str | int | None,
    group: int | None,
    *,
    descriptors: Sequence[int] = (),
    ignored_signals: Sequence[int] = (),
) -> int:
    """Start a program that takes a worker over with ``take_over()``; return its pid.

    Raises:
        KernelError: a call failed in the child or here; nothing is left behind.
        ValueError: no such user, or an empty command.
    """
    if not arguments:
        raise ValueError("arguments is empty: name the program to start")
    for number in ignored_signals:
        if not 1 <= number <= _SIGNAL_MAX:
            raise ValueError(f"ignored_signals has {number}: a signal is 1 to {_SIGNAL_MAX}")
    command = [os.fsencode(argument) for argument in arguments]
    program = shutil.which(os.fsdecode(command[0]), path=(env or os.environ).get("PATH", os.defpath))
    uid, gid = _user_ids(user, group)
    sockets = state.sockets
    passed = [*(sock.fileno() for sock in sockets), *descriptors]
    if state.store:
        passed.append(state.store.descriptor)
    if state.channel:
        passed.append(state.channel.socket.fileno())
    memory = os.memfd_create("quicsteer", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(memory, _dump(state, sockets, len(descriptors)))
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _all_seals())
        names = ":".join("established" if sock in state.established else "listener" for sock in sockets)
        environment = {
            **(os.environ if env is None else env),
            "LISTEN_PID": "",
            "LISTEN_FDS": str(len(sockets)),
            "LISTEN_FDNAMES": names,
            STATE_VARIABLE: str(_LISTEN_FIRST + len(passed)),
        }
        return _kernel.spawn(
            os.fsencode(program) if program else command[0],
            command,
            [os.fsencode(name) + b"=" + os.fsencode(value) for name, value in environment.items()],
            (*passed, memory),
            uid,
            gid,
            tuple(ignored_signals),
        )
    finally:
        os.close(memory)


def take_over() -> WorkerState | None:
    """Return the state that ``start_program()`` passed to this process, or ``None`` when there is none.

    The sockets get close-on-exec, and the environment variables go, so that no child takes them for its own.

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
    number = variables[STATE_VARIABLE]
    state = _read_state(number)
    try:
        return _adopt(state, variables["LISTEN_FDS"], int(number))
    except (LookupError, TypeError, ValueError, OverflowError, StopIteration, OSError) as error:
        # Nothing of the state is told: the key is in it.
        raise QuicSteerError(f"the state in descriptor {number} is damaged ({type(error).__name__})") from None


def _adopt(state: dict[str, Any], socket_count: str, last: int) -> WorkerState:
    """Make a worker's state of what was passed: descriptors from 3 up to the one before ``last``."""
    sockets = _adopt_sockets(socket_count, state["addresses"])
    index, bank, mode = state["place"]
    further = iter(range(_LISTEN_FIRST + len(sockets), last))
    descriptors = tuple(itertools.islice(further, state["descriptors"]))
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return WorkerState(
        Place(_count(index), _count(bank), SteeringMode(mode)),
        _read_identity(state["identity"]),
        GroupKeys.from_key(bytes.fromhex(state["key"])),
        tuple(sockets[i] for i in state["listeners"]),
        tuple(sockets[i] for i in state["established"]),
        _adopt_store(next(further)) if state["store"] else None,
        _adopt_channel(next(further)) if state["channel"] else None,
        descriptors,
    )


def _read_identity(values: list[int]) -> Identity:
    identity = Identity(*map(_count, values))
    if identity.slot >= identity.slots or not CID_LENGTH_MIN <= identity.length <= CID_LENGTH_MAX:
        raise ValueError("there is no such slot or length")
    return identity


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise ValueError("it is no count")
    return value


def _dump(state: WorkerState, sockets: Sockets, descriptors: int) -> bytes:
    return json.dumps(
        {
            "version": _STATE_VERSION,
            "place": astuple(state.place),
            "identity": state.identity,
            "key": state.keys.steering.hex(),
            "listeners": [sockets.index(sock) for sock in state.listeners],
            "established": [sockets.index(sock) for sock in state.established],
            "addresses": [format_address(sock.getsockname()) for sock in sockets],
            "descriptors": descriptors,
            "store": state.store is not None,
            "channel": state.channel is not None,
        }
    ).encode()


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
    except (OSError, ValueError, OverflowError) as error:
        raise QuicSteerError(f"{STATE_VARIABLE} is {number!r}, which is no descriptor of a worker: {error}") from error
    if seals != _all_seals():
        raise QuicSteerError(f"{STATE_VARIABLE} is {number!r}: that memory is not sealed")
    try:
        state = read_object(data)
    except ValueError as error:
        raise QuicSteerError(f"the state in descriptor {number} cannot be read: {error}") from None
    version = state.get("version")
    if version != _STATE_VERSION:
        raise QuicSteerError(
            f"the state in descriptor {number} has version {version}, this quicsteer reads {_STATE_VERSION}: "
            "run the same release on both sides"
        )
    return state


def _adopt_sockets(count: str, addresses: list[str]) -> Sockets:
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
    return tuple(sockets)


def _adopt_store(number: int) -> SharedStore:
    try:
        os.set_inheritable(number, False)
        return SharedStore(number)
    except (OSError, ValueError) as error:
        raise QuicSteerError(f"descriptor {number} is no store of a group: {error}") from error


def _adopt_channel(number: int) -> Channel:
    try:
        sock = socket.socket(fileno=number)
    except OSError as error:
        raise QuicSteerError(f"descriptor {number} is no channel to a supervisor: {error}") from error
    sock.set_inheritable(False)
    return Channel(sock)
