"""From figures to advice: one sentence for each thing that an operator should know and can change. No I/O.

The figures may be those since a group opened or those between two moments: then the advice is about that span.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .addresses import format_address
from .counters import Figures, HostStats, SlotStats
from .modes import SteeringMode
from .quicstats import QuicStats, total
from .sockdiag import SocketStats

DATAGRAM_BYTES = 2304
"""Bytes of a receive buffer that a full QUIC datagram takes (1,200 to 1,472 bytes, measured on Linux 6.18)."""

BUFFER_MAX = 64 << 20
"""Bytes of receive buffer above which a larger one is no remedy any more."""

FULL = 0.8
"""Share of a receive buffer from which on a queue counts as nearly full, and of UDP memory as nearly used up."""

BUSY = 3.0
"""So many times what the others get on average makes a worker much busier than they are."""

ENOUGH = 1000
"""Datagrams from which on shares say something."""

UNROUTABLE_SHARE = 0.05


def for_group(
    figures: Figures, quic: Mapping[int, QuicStats] | None = None, strangers: Sequence[str] = ()
) -> list[str]:
    """Return advice for a group. ``strangers`` are sockets of others on its port, as text."""
    sentences = [
        receive_buffer(figures.slots),
        full_queue(figures.slots),
        busy_worker(figures.slots, figures.mode),
        unroutable(figures),
        parked(figures.parked),
        other_sockets(strangers),
        memory_errors(figures.host),
        unsent(quic or {}),
    ]
    return [sentence for sentence in sentences if sentence]


def for_sockets(sockets: Sequence[SocketStats]) -> list[str]:
    """Return advice for sockets of any process."""
    sentences = [lossy_socket(sockets), full_socket(sockets), connected_member(sockets)]
    return [sentence for sentence in sentences if sentence]


def receive_buffer(slots: Iterable[SlotStats]) -> str | None:
    """Say how large a receive buffer would have held the burst that did not fit."""
    lossy = [slot for slot in slots if slot.dropped]
    if not lossy:
        return None
    dropped = sum(slot.dropped or 0 for slot in lossy)
    worst = max(lossy, key=lambda slot: slot.dropped or 0)
    where = name_slot(worst) if len(lossy) == 1 else f"{len(lossy)} slots, most of all {name_slot(worst)},"
    lost = f"{where[0].upper()}{where[1:]} lost {count(dropped, 'datagram')} for want of receive buffer"
    wanted = buffer_for(worst.buffer_bytes or 0, worst.dropped or 0)
    if wanted > BUFFER_MAX:
        return f"{lost}: no buffer holds so many, more workers or faster ones are needed (--workers)."
    return (
        f"{lost}: --receive-buffer {wanted} (receive_buffer={wanted}) holds such a burst, and sysctl -w "
        f"net.core.rmem_max={wanted} allows it without CAP_NET_ADMIN."
    )


def buffer_for(buffer_bytes: int, dropped: int) -> int:
    """Return the ``receive_buffer`` to ask for, a power of two, so that a lost burst fits; the kernel gives double."""
    return 1 << ((buffer_bytes + dropped * DATAGRAM_BYTES + 1) // 2 - 1).bit_length()


def full_queue(slots: Iterable[SlotStats]) -> str | None:
    """Name the worker whose queue is nearly full now."""
    fullest = max(slots, key=lambda slot: slot.fill or 0, default=None)
    if fullest is None or (fullest.fill or 0) < FULL or fullest.parked:
        return None
    return (
        f"The receive buffer of {name_slot(fullest)} is {fullest.fill:.0%} full: the worker does not read as fast as "
        "datagrams come, or it hangs."
    )


def busy_worker(slots: Iterable[SlotStats], mode: SteeringMode) -> str | None:
    """Name the worker that gets far more datagrams than the others."""
    shares: Counter[int] = Counter()
    for slot in slots:
        if slot.steered is None:
            return None
        shares[slot.worker] += slot.steered
    datagrams = shares.total()
    if len(shares) < 2 or datagrams < ENOUGH:
        return None
    [(busiest, most)] = shares.most_common(1)
    if most <= BUSY * (datagrams - most) / (len(shares) - 1):
        return None
    remedy = f"; quicsteer dispatch {busiest}=0 keeps new connections away" if mode is SteeringMode.EBPF else ""
    return (
        f"Worker {busiest} gets {most / datagrams:.0%} of the datagrams, an even share is {1 / len(shares):.0%}: few "
        f"connections carry most of the traffic{remedy}."
    )


def unroutable(figures: Figures) -> str | None:
    """Say that many datagrams carry connection IDs that the group did not issue."""
    counts = {outcome.name: number for outcome, number in figures.outcomes.items()}
    numbers = [number for number in counts.values() if number is not None]
    lost = counts["UNROUTABLE"]
    if lost is None or sum(numbers) < ENOUGH or lost < UNROUTABLE_SHARE * sum(numbers):
        return None
    return (
        f"{lost / sum(numbers):.0%} of the datagrams carry no connection ID of this group: clients of an earlier "
        "process (they come back by themselves), or a server that issues other connection IDs than "
        "worker.connection_ids."
    )


def parked(swallowed: int | None) -> str | None:
    """Say that datagrams came for slots that nobody reads."""
    if not swallowed:
        return None
    return (
        f"{count(swallowed, 'datagram')} came for slots that nobody reads: clients of replaced workers that had not "
        "ended when the workers did (a longer --drain-timeout lets them)."
    )


def other_sockets(strangers: Sequence[str]) -> str | None:
    """Say that others have sockets on the port, which get datagrams of their own."""
    if not strangers:
        return None
    return f"On the same port, with traffic of their own: {', '.join(strangers)}."


def memory_errors(host: HostStats | None) -> str | None:
    """Say that the kernel had no memory left for UDP."""
    if host is None or not host.mem_errors:
        return None
    return (
        f"This host dropped {count(host.mem_errors, 'datagram')} because the memory for UDP was used up: raise "
        "net.ipv4.udp_mem, or use smaller receive buffers."
    )


def udp_memory(pages: int, pressure: int, most: int) -> str | None:
    """Say that the memory for UDP is nearly used up; all in pages, as /proc/net/sockstat and net.ipv4.udp_mem count."""
    if pages < FULL * pressure:
        return None
    return (
        f"UDP uses {pages} of {most} pages of memory, pressure begins at {pressure}: raise net.ipv4.udp_mem, or use "
        "smaller receive buffers."
    )


def unsent(quic: Mapping[int, QuicStats]) -> str | None:
    """Say that answers could not be sent."""
    lost = total(quic.values()).unsent
    if not lost:
        return None
    return (
        f"The kernel did not take {count(lost, 'datagram')} that workers sent: a larger SO_SNDBUF helps "
        "(socket_options)."
    )


def lossy_socket(sockets: Sequence[SocketStats]) -> str | None:
    """Name the socket that lost most."""
    worst = max(sockets, key=lambda sock: sock.dropped, default=None)
    if worst is None or not worst.dropped:
        return None
    return (
        f"A socket of {name_socket(worst)} dropped {count(worst.dropped, 'datagram')}: its buffer of "
        f"{worst.buffer_bytes:,} bytes holds some {worst.buffer_bytes // DATAGRAM_BYTES} full ones, or a filter drops "
        "them on purpose, as in the sink and the parked slots of quicsteer."
    )


def full_socket(sockets: Sequence[SocketStats]) -> str | None:
    """Name the socket whose queue is nearly full now."""
    fullest = max(sockets, key=lambda sock: sock.fill, default=None)
    if fullest is None or fullest.fill < FULL:
        return None
    return f"A receive buffer of {name_socket(fullest)} is {fullest.fill:.0%} full: nobody reads it fast enough."


def connected_member(sockets: Sequence[SocketStats]) -> str | None:
    """Warn of a connected socket on the address of a group."""
    shared = {sock.address for sock in sockets if sock.grouped}
    connected = [sock for sock in sockets if sock.peer and sock.address in shared]
    if not connected:
        return None
    return (
        f"A socket of {name_socket(connected[0])} is connected to {format_address(connected[0].peer)} on the address "
        "of a group: a member that calls connect() slows or splits the whole group."
    )


def name_slot(slot: SlotStats) -> str:
    """Return what a slot is to an operator."""
    bank = f" of bank {slot.bank}" if slot.bank is not None else ""
    role = "" if slot.role == "both" else f" ({slot.role}{bank})"
    return f"worker {slot.worker}{role} on {format_address(slot.address)}"


def name_socket(sock: SocketStats) -> str:
    """Return what a socket is to an operator."""
    if sock.processes:
        return f"{sock.processes[0].name} (pid {sock.processes[0].pid})"
    return f"a process of uid {sock.uid}"


def count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
