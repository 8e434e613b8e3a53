"""Readouts as text for people: in 80 columns, and with more figures where there is more room. No I/O."""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .abi import Outcome
from .addresses import format_address
from .counters import GroupDifference, SlotStats
from .quicstats import OTHER_CODES, QuicStats, name_transport_error, total
from .readout import ServiceReadout, SocketsReadout
from .sockdiag import SocketStats

WIDTH = 80
WIDE = 112
"""Columns from which on each outcome gets one of its own."""

BAR = 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_CODES_SHOWN = 12
_SOCKET_FIGURES, _SOCKET_RATE, _NAME = 41, 7, 14
"""Columns that the figures of a socket take, its rate, and at least the name of its process."""

Cell = tuple[str, bool]
"""A text, and whether it is an alarm."""


@dataclass(frozen=True)
class Style:
    """How text may look: with colours (SGR sequences of ECMA-48), and with characters beyond ASCII."""

    colour: bool = False
    unicode: bool = True

    def alarm(self, text: str) -> str:
        return f"\033[1;31m{text}\033[0m" if self.colour else text

    def strong(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self.colour else text

    def faint(self, text: str) -> str:
        return f"\033[2m{text}\033[0m" if self.colour else text

    def bar(self, share: float | None) -> str:
        """Return a bar of ``BAR`` columns; anything above nothing shows."""
        if share is None:
            return "?".ljust(BAR)
        if not self.unicode:
            return ("#" * max(round(share * BAR), share > 0)).ljust(BAR, ".")
        eighths = max(round(share * BAR * 8), share > 0)
        return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(BAR, "·")


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, how wide it is (negative: text, on the left), and what it shows of a row."""

    title: str
    width: int
    show: Callable[[Any], Cell]

    def place(self, text: str) -> str:
        return text.ljust(-self.width)[: -self.width] if self.width < 0 else text.rjust(self.width)


def short(number: float | None) -> str:
    """Return a number in at most six characters."""
    if number is None:
        return "?"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size * (10 if unit == "k" else 1):
            return f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number / size:.0f}{unit}"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def exact(number: int | None) -> str:
    return "?" if number is None else f"{number:,}"


def _plain(text: str) -> Cell:
    return text, False


def _table(columns: Sequence[Column], rows: Iterable[Any], style: Style) -> list[str]:
    lines = [style.faint(" ".join(column.place(column.title) for column in columns))]
    for row in rows:
        cells = []
        for column in columns:
            text, alarm = column.show(row)
            cells.append(style.alarm(column.place(text)) if alarm else column.place(text))
        lines.append(" ".join(cells))
    return lines


def wrap(sentences: Iterable[str], width: int, style: Style) -> list[str]:
    """Return advice as lines."""
    mark = "→ " if style.unicode else "> "
    return [
        style.strong(line) if number == 0 else line
        for sentence in sentences
        for number, line in enumerate(
            textwrap.wrap(sentence, width, initial_indent=mark, subsequent_indent="  ", break_on_hyphens=False)
        )
    ]


def service_header(readout: ServiceReadout, span: GroupDifference | None, style: Style) -> list[str]:
    """Return the lines on top: what runs, and the totals; per second if there is a span."""
    status, figures = readout.supervisor, span or readout.group
    states = [worker["state"] for worker in status["workers"]]
    parts = [f"{states.count(state)} {verb}" for state, verb in _VERBS.items() if state in states]
    hung = sum(worker["hung"] for worker in status["workers"])
    workers = f"workers: {', '.join(parts) or 'none'}" + (f", {hung} hung" if hung else "")
    first = f"{style.strong(readout.title)}  mode {readout.group.mode}  {workers}"
    lines = [first, f"restarts {status['restarts']}  reloads {status['reloads']}"]
    if status["reloading"]:
        lines[1] += f"  reload: {status['reloading']}"
    steered = [f"{outcome.name.lower()} {_amount(count, span)}" for outcome, count in figures.outcomes.items()]
    if any(count is not None for count in figures.outcomes.values()):
        lines.append("  ".join(steered))
    dropped = f"dropped {_amount(figures.dropped, span)}"
    host = figures.host
    lost = [
        style.alarm(dropped) if figures.dropped else dropped,
        f"sink {_amount(figures.sink, span)}",
        f"parked {_amount(figures.parked, span)}",
    ]
    if host:
        lost.append(f"host: no buffer {_amount(host.rcvbuf_errors, span)}, no memory {_amount(host.mem_errors, span)}")
    return [*lines, "  ".join(lost)]


_VERBS = {"serving": "serve", "ready": "ready", "starting": "start", "draining": "drain"}


def _amount(count: int | None, span: GroupDifference | None) -> str:
    return f"{short(span.rate(count))}/s" if span else exact(count)


def service_body(readout: ServiceReadout, span: GroupDifference | None, width: int, style: Style) -> list[str]:
    """Return the tables of a service: its slots by address, and its QUIC connections."""
    lines: list[str] = []
    changes = {(slot.address, slot.slot): slot for slot in span.slots} if span else {}
    columns = _slot_columns(changes, span, width, style)
    for address in dict.fromkeys(slot.address for slot in readout.group.slots):
        slots = [slot for slot in readout.group.slots if slot.address == address]
        shown = [slot for slot in slots if not slot.parked or _is_news(changes.get((address, slot.slot)))]
        hidden = len(slots) - len(shown)
        note = f"  {hidden} parked slots not shown" if hidden else ""
        lines += ["", f"{style.strong(format_address(address))}{style.faint(note)}", *_table(columns, shown, style)]
    return [*lines, *_quic_lines(readout.quic, width, style)]


def _is_news(change: SlotStats | None) -> bool:
    return bool(change and change.swallowed)


def _slot_columns(
    changes: dict[Any, SlotStats], span: GroupDifference | None, width: int, style: Style
) -> list[Column]:
    def change(slot: SlotStats) -> SlotStats:
        return changes.get((slot.address, slot.slot), slot)

    def rising(slot: SlotStats) -> bool:
        return bool(change(slot).dropped)

    def counted(title: str, count: Callable[[SlotStats], int | None]) -> Column:
        if span:
            return Column(
                f"{title}/s", max(10, len(title) + 2), lambda slot: _plain(short(span.rate(count(change(slot)))))
            )
        return Column(title, 13 if title == "received" else 11, lambda slot: _plain(exact(count(slot))))

    def by_outcome(outcome: Outcome) -> Column:
        name = outcome.name.lower()
        return counted(name, lambda slot: getattr(slot, name))

    received = [counted("received", lambda slot: slot.steered)]
    if width >= WIDE:
        received = [by_outcome(outcome) for outcome in Outcome]
    dropped = [Column("dropped", 11, lambda slot: (exact(slot.dropped), rising(slot)))]
    if span:
        per_second = span.rate
        dropped.append(Column("dropped/s", 9, lambda slot: (short(per_second(change(slot).dropped)), rising(slot))))
    return [
        Column("worker", 6, lambda slot: _plain(str(slot.worker))),
        Column("slot", -16, lambda slot: _plain(_role(slot))),
        *received,
        *dropped,
        Column("queue", -15, lambda slot: _plain(f"{style.bar(slot.fill)} {_percent(slot.fill)}")),
        Column("buffer", 6, lambda slot: _plain(short(slot.buffer_bytes))),
    ]


def _role(slot: SlotStats) -> str:
    text = f"{slot.slot} {slot.role}" if slot.bank is None else f"{slot.slot} bank {slot.bank}"
    return f"{text} parked" if slot.parked else text


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{share:4.0%}"


def _quic_lines(workers: dict[int, QuicStats] | Any, width: int, style: Style) -> list[str]:
    if not workers:
        return []
    columns = [
        Column("QUIC", -7, lambda row: _plain(row[0])),
        Column("open", 7, lambda row: _plain(exact(row[1].connections))),
        Column("opened", 11, lambda row: _plain(exact(row[1].opened))),
        Column("closed", 11, lambda row: _plain(exact(sum(row[1].ends.values())))),
        Column("retries", 9, lambda row: _plain(exact(row[1].retries))),
        Column("resets", 9, lambda row: _plain(exact(row[1].stateless_resets))),
        Column("streams reset", 13, lambda row: _plain(exact(sum(row[1].stream_resets.values())))),
    ]
    rows = [(f"{index}", figures) for index, figures in workers.items()]
    together = total(workers.values())
    if len(rows) > 1:
        rows.append(("all", together))
    return ["", *_table(columns, rows, style), *_code_lines(together, width, style)]


def _code_lines(figures: QuicStats, width: int, style: Style) -> list[str]:
    rows = [
        (count, "closed", end.sender, "application" if end.application else "transport", end.code)
        for end, count in figures.ends.items()
    ] + [
        (count, "stream reset", reset.sender, reset.frame, reset.code) for reset, count in figures.stream_resets.items()
    ]
    if not rows:
        return []
    columns = [
        Column("count", 9, lambda row: _plain(exact(row[0]))),
        Column("what", -12, lambda row: _plain(row[1])),
        Column("by", -6, lambda row: _plain(row[2])),
        Column("kind", -14, lambda row: _plain(row[3])),
        Column("code", -(width - 45), lambda row: _plain(_name_code(row[3], row[4]))),
    ]
    rows.sort(key=lambda row: (-row[0], row[1:]))
    lines = ["", *(line.rstrip() for line in _table(columns, rows[:_CODES_SHOWN], style))]
    return [*lines, style.faint(f"{len(rows) - _CODES_SHOWN} more")] if len(rows) > _CODES_SHOWN else lines


def _name_code(kind: str, code: int) -> str:
    if code == OTHER_CODES:
        return "others"
    name = name_transport_error(code) if kind == "transport" else None
    return f"{code:#x} {name}" if name else f"{code:#x}"


def sockets_header(readout: SocketsReadout, style: Style) -> list[str]:
    """Return the line on top."""
    dropped = sum(sock.dropped for sock in readout.sockets)
    number = len(readout.sockets)
    return [f"{style.strong(readout.title)}  {number} socket{'' if number == 1 else 's'}  dropped {dropped:,}"]


def sockets_body(readout: SocketsReadout, earlier: SocketsReadout | None, width: int, style: Style) -> list[str]:
    """Return the table of sockets; with drops per second if there is an earlier readout."""
    before = {sock.cookie: sock.dropped for sock in earlier.sockets} if earlier else {}
    seconds = readout.time - earlier.time if earlier else 0.0

    def change(sock: SocketStats) -> int:
        return sock.dropped - before.get(sock.cookie, sock.dropped)

    def rate(sock: SocketStats) -> Cell:
        return short(change(sock) / seconds) if seconds else "?", change(sock) > 0

    room = width - _SOCKET_FIGURES - (_SOCKET_RATE if earlier else 0)
    address = min(max((len(_place(sock)) for sock in readout.sockets), default=0), room - _NAME)
    name = min(room - address, 2 * _NAME)
    columns = [
        Column("address", -address, lambda sock: _plain(_place(sock))),
        Column("uid", 5, lambda sock: _plain(str(sock.uid))),
        Column("process", -name, lambda sock: _plain(_name(sock, name))),
        Column("dropped", 9, lambda sock: (exact(sock.dropped), change(sock) > 0)),
        *([Column("/s", 6, rate)] if earlier else []),
        Column("queue", -15, lambda sock: _plain(f"{style.bar(sock.fill)} {_percent(sock.fill)}")),
        Column("buffer", 6, lambda sock: _plain(short(sock.buffer_bytes))),
    ]
    return ["", *_table(columns, readout.sockets, style), *_group_lines(readout.sockets, style)]


def _place(sock: SocketStats) -> str:
    peer = f" to {format_address(sock.peer)}" if sock.peer else ""
    return f"{format_address(sock.address)}{peer}"


def _name(sock: SocketStats, width: int) -> str:
    if not sock.processes:
        return "?"
    first, *others = sock.processes
    more = f" +{len(others)}" if others else ""
    return f"{first.pid} {first.name}"[: width - len(more)] + more


def _group_lines(sockets: Sequence[SocketStats], style: Style) -> list[str]:
    sizes: dict[str, int] = {}
    for sock in sockets:
        if sock.grouped and not sock.peer:
            sizes[format_address(sock.address)] = sizes.get(format_address(sock.address), 0) + 1
    lines = [style.faint(f"{size} sockets share {address}: a group") for address, size in sizes.items()]
    return ["", *lines] if lines else []
