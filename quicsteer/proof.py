"""The proof that a mode steers here: datagrams over loopback, each held against the model of the decision."""

import contextlib
import errno
import os
import secrets
import select
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .abi import CID_LENGTH_DEFAULT, CID_LENGTH_MAX, CID_LENGTH_MIN, KEY_LENGTH, Outcome
from .decision import Decision, Rules, decide
from .errors import KernelError, QuicSteerError, SteeringUnavailable
from .group import SteeringGroup
from .modes import SteeringMode
from .steering import is_refusal
from .triage import Probe

WORKERS = 4
PATIENCE = 1.0
"""Seconds without a datagram after which the missing ones are lost."""

_LISTENERS, _SLOTS = WORKERS, 2 * WORKERS  # of a split group with one bank
_CLIENTS = 8
_PAUSE = 10  # milliseconds
_LARGEST = 65535
_CIDS_PER_WORKER = 5
_LOOPBACKS = {"IPv4": (socket.AF_INET, "127.0.0.1"), "IPv6": (socket.AF_INET6, "::1")}
_NOT_SILENT = "the kernel answered a datagram with an ICMP error"
_NAMES = {SteeringMode.EBPF: "eBPF steers", SteeringMode.CBPF: "classic BPF steers"}


@dataclass
class Tally:
    """What became of the datagrams of one group, or of several; ``faults`` are other broken promises."""

    sent: int = 0
    right: int = 0
    wrong: int = 0
    faults: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.sent - self.right - self.wrong

    def __iadd__(self, other: "Tally") -> "Tally":
        self.sent += other.sent
        self.right += other.right
        self.wrong += other.wrong
        self.faults += other.faults
        return self


def name_proof(mode: SteeringMode) -> str:
    """Return the name of the probe of a mode that steers, whether it was proven or refused before."""
    return _NAMES[mode]


def prove(mode: SteeringMode) -> Probe:
    """Open throw-away groups on the loopback addresses and see where some 200 datagrams for each arrive."""
    families = [family for family in _LOOPBACKS if _has_loopback(family)]
    if not families:
        detail = "cannot be proven: neither 127.0.0.1 nor ::1 can be reached"
        return Probe(_NAMES[mode], None, detail, "shell: ip link set lo up", mode=mode)
    tally = Tally()
    try:
        for family in families:
            for drop_invalid in (False, True):
                tally += try_group(mode, family, drop_invalid)
    except (QuicSteerError, OSError) as error:
        refused = isinstance(error, SteeringUnavailable) or (isinstance(error, KernelError) and is_refusal(error))
        return Probe(_NAMES[mode], False if refused else None, f"the proof failed: {error}", mode=mode)
    return judge(mode, families, tally)


def judge(mode: SteeringMode, families: Sequence[str], tally: Tally) -> Probe:
    """Return what a tally says. Datagrams that only got lost, as in a firewall, prove nothing either way."""
    where = " and ".join(families)
    detail = f"{tally.right} of {tally.sent} datagrams reached the socket their connection ID names, over {where}"
    if tally.wrong or tally.faults:
        wrong = [f"{tally.wrong} reached another"] if tally.wrong else []
        return Probe(_NAMES[mode], False, "; ".join((detail, *wrong, *dict.fromkeys(tally.faults))), mode=mode)
    if tally.lost:
        remedy = "shell: nft list ruleset # does a firewall drop UDP on the loopback interface?"
        return Probe(_NAMES[mode], None, f"{detail}; {tally.lost} were lost", remedy, mode=mode)
    exact = "all counters are" if mode is SteeringMode.EBPF else "the count of dropped invalid ones is"
    return Probe(_NAMES[mode], True, f"{detail}; {exact} exact", mode=mode)


def _has_loopback(family: str) -> bool:
    """Whether a loopback address can be bound and reached: binding succeeds on an interface that is down, too."""
    number, host = _LOOPBACKS[family]
    try:
        with socket.socket(number, socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))
            sock.connect(sock.getsockname())
    except OSError:
        return False
    return True


def try_group(mode: SteeringMode, family: str, drop_invalid: bool) -> Tally:
    """Send datagrams of every kind to a group of one mode and see what becomes of them."""
    key = secrets.token_bytes(KEY_LENGTH)
    rules = Rules(key, CID_LENGTH_DEFAULT, _LISTENERS, _SLOTS, drop_invalid)
    number, host = _LOOPBACKS[family]
    with (
        SteeringGroup.open((host, 0), WORKERS, split=True, mode=mode, key=key, drop_invalid=drop_invalid) as group,
        _open_clients(number, group.addresses[0]) as clients,
    ):
        trial = _Trial(group, rules)
        datagrams = make_datagrams([w.connection_ids.issue() for w in group.workers for _ in range(_CIDS_PER_WORKER)])
        for start in range(0, len(datagrams), _CLIENTS):
            trial.send(clients, datagrams[start : start + _CLIENTS])
            if not trial.collect():
                break
        trial.await_sink()
        trial.check_counts()
        trial.check_silence(clients)
        return trial.tally


@contextlib.contextmanager
def _open_clients(family: int, address: tuple[str, int]) -> Iterator[list[socket.socket]]:
    """Open sockets on ports of their own; connected ones learn of ICMP errors."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket(family, socket.SOCK_DGRAM)) for _ in range(_CLIENTS)]
        for client in clients:
            client.settimeout(PATIENCE)
            client.connect(address)
        yield clients


def make_datagrams(cids: Sequence[bytes]) -> list[bytes]:
    """Return datagrams of every kind for a group that issued ``cids``: 200 for 20 of them.

    Small ones: steering reads the start of a datagram, and receive buffers hold more of them.
    """
    chosen = [os.urandom(CID_LENGTH_MIN + n % (CID_LENGTH_MAX - CID_LENGTH_MIN + 1)) for n in range(60)]
    unknown = [os.urandom(CID_LENGTH_DEFAULT) for _ in range(24)]
    cut = [_short(unknown[0])[:length] for length in range(CID_LENGTH_DEFAULT + 1)]
    cut += [_long(unknown[0])[:-length] for length in range(1, 5)]
    tiny = [_long(os.urandom(length)) + bytes(CID_LENGTH_MAX) for length in (0, 4, 7)]
    serial = [n.to_bytes(4, "big") for n in range(5)]
    ours = [make(cid) + serial[n] for cid in cids for n, make in enumerate((_short, _short, _short, _long, _long))]
    strangers = [_long(dcid) for dcid in chosen] + [_short(dcid) for dcid in unknown]
    return [*ours, *strangers, *cut, *tiny]


def _short(dcid: bytes) -> bytes:
    """Return the start of a datagram with a short header (RFC 8999, 5.2)."""
    return b"\x40" + dcid


def _long(dcid: bytes) -> bytes:
    """Return the start of a datagram with a long header (RFC 8999, 5.1)."""
    return b"\xc0\0\0\0\1" + bytes([len(dcid)]) + dcid


class _Trial:
    """The datagrams sent to one group, and what the model says of them."""

    def __init__(self, group: SteeringGroup, rules: Rules) -> None:
        self.tally = Tally()
        self._group = group
        self._rules = rules
        self._decisions: list[Decision] = []
        self._expected: Counter[tuple[int | None, bytes]] = Counter()
        self._sockets = {
            sock.fileno(): (slot, sock)
            for worker in group.workers
            for slot, sock in ((worker.index, worker.listeners[0]), (worker.slot, worker.established[0]))
        }
        self._poll = select.poll()
        for fd in self._sockets:
            self._poll.register(fd, select.POLLIN)

    def send(self, clients: Sequence[socket.socket], datagrams: Sequence[bytes]) -> None:
        """Send each datagram from another port."""
        for client, datagram in zip(clients, datagrams, strict=False):
            decision = decide(datagram, self._rules)
            self._decisions.append(decision)
            self._expected[decision.slot, datagram] += 1
            try:
                client.send(datagram)
            except ConnectionRefusedError:
                self.tally.faults.append(_NOT_SILENT)
            except OSError as error:
                raise KernelError(error.errno or errno.ETIMEDOUT, "send", "a datagram over loopback") from error
        self.tally.sent = len(self._decisions)

    def collect(self) -> bool:
        """Read until all datagrams but the sink's have arrived; return whether they have."""
        due = self.tally.sent - self._sunk
        while True:
            self._read_all()
            if self.tally.right + self.tally.wrong >= due:
                return True
            if not self._poll.poll(PATIENCE * 1000):
                return False

    def _read_all(self) -> None:
        for slot, sock in self._sockets.values():
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._judge(slot, sock.recv(_LARGEST))

    def _judge(self, slot: int, datagram: bytes) -> None:
        """Compare with the model, which lets any listener slot have what is malformed."""
        for place in (slot, None) if slot < _LISTENERS else (slot,):
            if self._expected[place, datagram]:
                self._expected[place, datagram] -= 1
                self.tally.right += 1
                return
        self.tally.wrong += 1

    @property
    def _sunk(self) -> int:
        return sum(decision.slot == _SLOTS for decision in self._decisions)

    def await_sink(self) -> None:
        """Wait until the sink has swallowed what it should; a busy kernel may deliver after the call that sent."""
        deadline = time.monotonic() + PATIENCE
        while (self._group.stats().sink or 0) < self._sunk and time.monotonic() < deadline:
            self._poll.poll(_PAUSE)
            self._read_all()

    def check_counts(self) -> None:
        """Take over what the sink swallowed, and hold the counters of the mode against the model."""
        self._read_all()
        stats = self._group.stats()
        sunk = self._sunk
        self.tally.right += min(stats.sink or 0, sunk)
        if stats.sink != sunk:
            self.tally.faults.append(f"the sink counts {stats.sink} datagrams instead of {sunk}")
        if stats.mode is not SteeringMode.EBPF:
            return
        outcomes = Counter(decision.outcome for decision in self._decisions)
        if dict(stats.outcomes) != {outcome: outcomes[outcome] for outcome in Outcome}:
            counted = ", ".join(f"{outcome.name.lower()} {count}" for outcome, count in stats.outcomes.items())
            self.tally.faults.append(f"the outcome counters are not exact: {counted}")
        routed = Counter(decision.slot for decision in self._decisions if decision.outcome is Outcome.ROUTED)
        if any(slot.routed != routed[slot.slot] for slot in stats.slots):
            self.tally.faults.append("the counters of the slots are not exact")

    def check_silence(self, clients: Sequence[socket.socket]) -> None:
        """Make sure that no datagram was answered, least of all by ICMP port unreachable."""
        if any(client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for client in clients):
            self.tally.faults.append(_NOT_SILENT)
