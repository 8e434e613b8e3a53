"""The sockets of one address: how they are born, opened, parked and read.

Order of birth: the first socket claims the address, the others join it, the program learns which is which, and only
then do the filters come off the slots that somebody reads. So no datagram is ever queued where nobody reads.
"""

import contextlib
import errno
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from . import _kernel
from .abi import Outcome
from .addresses import BindAddress, format_address
from .counters import DropCounter, Place, SlotStats, read_socket
from .decision import Rules
from .errors import KernelError
from .modes import SteeringMode
from .options import Options
from .ports import describe_holders
from .steering import Steering, make_steering

_SO_RCVBUFFORCE = 33  # include/uapi/asm-generic/socket.h; needs CAP_NET_ADMIN
_DATAGRAM_MAX = 65535
_UNKNOWN = (None,) * len(Outcome)


class AddressSockets:
    """The sockets of one address in the order of their slots, the sink last, and what steers them."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering
        self.sockets: list[socket.socket] = []
        self.sink: socket.socket | None = None
        self.counters: list[DropCounter] = []
        self.sink_counter = DropCounter()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.sockets[0].getsockname()[:2]
        return host, port

    def descriptors(self) -> list[int]:
        """Return all descriptors that the address needs."""
        sockets = [*self.sockets, *([self.sink] if self.sink else [])]
        return [sock.fileno() for sock in sockets] + self.steering.descriptors

    def dump(self) -> dict[str, Any]:
        """Return what ``adopt()`` needs in another program that keeps the descriptors."""
        return {
            "sockets": [sock.fileno() for sock in self.sockets],
            "sink": self.sink.fileno() if self.sink else None,
            "steering": self.steering.descriptors,
            "counters": [vars(counter) for counter in self.counters],
            "sink_counter": vars(self.sink_counter),
        }

    @classmethod
    def adopt(cls, mode: SteeringMode, rules: Rules, saved: dict[str, Any]) -> "AddressSockets":
        """Go on with sockets and programs that this process has kept over an execve."""
        part = cls(make_steering(mode, rules, saved["steering"]))
        part.sockets = [_adopt_socket(number) for number in saved["sockets"]]
        part.sink = None if saved["sink"] is None else _adopt_socket(saved["sink"])
        part.counters = [DropCounter(**counter) for counter in saved["counters"]]
        part.sink_counter = DropCounter(**saved["sink_counter"])
        return part

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        if self.sink:
            self.sink.close()
        self.steering.close()


def _adopt_socket(number: int) -> socket.socket:
    sock = socket.socket(fileno=number)
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


@contextlib.contextmanager
def closing_on_error(parts: list[AddressSockets]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for part in parts:
            part.close()
        raise


def open_all(addresses: list[BindAddress], options: Options, mode: SteeringMode) -> list[AddressSockets]:
    parts: list[AddressSockets] = []
    with closing_on_error(parts):
        for address in addresses:
            part = AddressSockets(make_steering(mode, options.rules()))
            parts.append(part)
            _open_address(part, address, options)
    return parts


def _open_address(part: AddressSockets, address: BindAddress, options: Options) -> None:
    """Open the sockets of an address in the order of their slots; every one swallows datagrams until it is opened."""
    steering = part.steering
    count = options.layout.slots if steering.mode.steers else options.layout.workers
    sockaddr = address.sockaddr
    for slot in range(count + steering.has_sink):
        is_sink = slot == count
        sock = _make_socket(address, options, buffers=not is_sink)
        if is_sink:
            part.sink = sock
        else:
            part.sockets.append(sock)
            part.counters.append(DropCounter())
        if slot == 0:
            _bind(steering.bind_first, sock, sockaddr)
            sockaddr = sock.getsockname()
        else:
            _bind(steering.bind_next, sock, sockaddr)
    steering.fill([*part.sockets, *([part.sink] if part.sink else [])])


def _make_socket(address: BindAddress, options: Options, *, buffers: bool) -> socket.socket:
    try:
        sock = socket.socket(address.family, socket.SOCK_DGRAM, socket.IPPROTO_UDP)
    except OSError as error:
        raise KernelError(error.errno or 0, f"socket({address})") from error
    try:
        sock.setblocking(False)
        if address.v6only is not None:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.v6only)
        if options.receive_buffer and buffers:
            _set_receive_buffer(sock, options.receive_buffer)
        for level, name, value in options.socket_options:
            try:
                sock.setsockopt(level, name, value)
            except OSError as error:
                raise KernelError(error.errno or 0, f"setsockopt({level}, {name}, {value!r})") from error
        if sys.platform == "linux":
            _kernel.close_filter(sock.fileno())
    except BaseException:
        sock.close()
        raise
    return sock


def _set_receive_buffer(sock: socket.socket, size: int) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def _bind(bind: Callable[[socket.socket, Any], None], sock: socket.socket, sockaddr: Any) -> None:
    try:
        bind(sock, sockaddr)
    except KernelError:
        raise
    except OSError as error:
        detail = ""
        if error.errno == errno.EADDRINUSE:
            holder = describe_holders(sockaddr[1])
            detail = f"held by {holder}" if holder else "its holder cannot be seen from here"
        raise KernelError(error.errno or 0, f"bind({format_address(sockaddr)})", detail) from error


def open_slot(sock: socket.socket, counter: DropCounter) -> None:
    """Let datagrams in. What is queued from before the slot was parked goes first; an open slot keeps its queue."""
    if not counter.parked:
        return
    if sys.platform == "linux":
        counter.swallowed += _drain(sock)
        _update(sock, counter)
        _kernel.open_filter(sock.fileno())
    counter.parked = False


def park_slot(sock: socket.socket, counter: DropCounter) -> None:
    if counter.parked:
        return
    _update(sock, counter)
    _kernel.close_filter(sock.fileno())
    counter.parked = True
    counter.swallowed += _drain(sock)


def _update(sock: socket.socket, counter: DropCounter) -> None:
    with contextlib.suppress(OSError):  # before Linux 4.12
        counter.update(_kernel.read_meminfo(sock.fileno())[2])


def _drain(sock: socket.socket) -> int:
    """Empty the queue of a socket that takes no new datagrams; return how many there were."""
    count = 0
    while True:
        try:
            sock.recv(_DATAGRAM_MAX)
            count += 1
        except BlockingIOError:
            return count
        except OSError:
            continue  # a pending ICMP error, which recv reports once


def queued_bytes(sock: socket.socket) -> int:
    """Return the bytes that queued datagrams take; 0 where the kernel does not tell."""
    try:
        return _kernel.read_meminfo(sock.fileno())[0]
    except OSError:  # before Linux 4.12
        return 0


def read_slots(part: AddressSockets, places: Sequence[Place]) -> list[SlotStats]:
    """Read the sockets of an address and bring their drop counters up to date."""
    address, read_counters = part.address, part.steering.read_counters
    slots = []
    for slot, (sock, counter, place) in enumerate(zip(part.sockets, part.counters, places, strict=True)):
        parked, dropped, swallowed, queued, buffer = read_socket(sock.fileno(), counter)
        outcomes = read_counters(slot) or _UNKNOWN
        slots.append(SlotStats(slot, address, *place, parked, dropped, swallowed, queued, buffer, *outcomes))
    return slots


def read_sinks(parts: list[AddressSockets]) -> int | None:
    total = 0
    for part in parts:
        if part.sink is None:
            return None
        _update(part.sink, part.sink_counter)
        total += part.sink_counter.swallowed
    return total


def read_sink_outcomes(parts: list[AddressSockets]) -> dict[Outcome, int | None]:
    """Add up what the programs sent to the sinks, by outcome."""
    rows = [part.steering.read_counters(len(part.sockets)) for part in parts]
    if None in rows:
        return dict.fromkeys(Outcome)
    return {outcome: sum(row[outcome] for row in rows if row) for outcome in Outcome}
