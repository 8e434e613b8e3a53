"""A view that is kept up to date in a terminal: in place, in any size, over ssh, with the terminal clean afterwards."""

import contextlib
import os
import re
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from .errors import QuicSteerError
from .readout import Readout, ServiceReadout
from .tables import Style, service_body, service_header, sockets_body, sockets_header, wrap

_ENTER = "\033[?1049h\033[?25l\033[?7l"  # alternate screen, no cursor, no line wrap (xterm's ctlseqs)
_LEAVE = "\033[?7h\033[?25h\033[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\033[H", "\033[K", "\033[J"
_SEQUENCES = re.compile(r"(\033\[[0-9;]*m)")
_KEYS = {b"\033[A": -1, b"k": -1, b"\033[B": 1, b"j": 1, b"\033[5~": -10, b"\033[6~": 10, b" ": 10}
_QUIT = (b"q", b"Q", b"\033")
_ADVICE_LINES = 6


@dataclass
class View:
    """What is on the screen: the last two readouts, how far it is scrolled, and what went wrong."""

    style: Style
    now: Readout | None = None
    before: Readout | None = None
    trouble: str = ""
    scrolled: int = 0

    def update(self, source: Callable[[], Readout]) -> None:
        """Read anew; keep what was read when that fails, for a service may come back."""
        try:
            readout = source()
        except QuicSteerError as error:
            self.trouble = str(error)
            return
        self.before, self.now, self.trouble = self.now, readout, ""

    def lines(self, width: int, height: int) -> list[str]:
        """Return at most ``height`` lines of at most ``width`` columns."""
        head, body = self._parts(width)
        clock = time.strftime("%H:%M:%S")
        foot = f"{clock}  q quits"
        room = max(height - len(head) - 1, 0)
        self.scrolled = max(0, min(self.scrolled, len(body) - room))
        hidden = len(body) - room - self.scrolled
        if hidden > 0 or self.scrolled:
            foot += f"  ↑↓ scroll{f', {hidden} below' if hidden > 0 else ''}" if self.style.unicode else "  j k scroll"
        shown = body[self.scrolled : self.scrolled + room]
        filled = [*head, *shown, *[""] * (room - len(shown))][: max(height - 1, 0)]
        footer = self.style.alarm(f"{clock}  {self.trouble}") if self.trouble else self.style.faint(foot)
        return [clip(line, width) for line in [*filled, footer]]

    def _parts(self, width: int) -> tuple[list[str], list[str]]:
        """Return what stays on top and what can be scrolled."""
        if self.now is None:
            return [], []
        if isinstance(self.now, ServiceReadout):
            span = self.now.since(self.before) if isinstance(self.before, ServiceReadout) else None
            head = service_header(self.now, span, self.style)
            advice = self.now.advice(span)
            body = service_body(self.now, span, width, self.style)
        else:
            earlier = None if isinstance(self.before, ServiceReadout) else self.before
            head = sockets_header(self.now, self.style)
            advice = self.now.advice()
            body = sockets_body(self.now, earlier, width, self.style)
        return [*head, *wrap(advice, width, self.style)[:_ADVICE_LINES]], body


def clip(line: str, width: int) -> str:
    """Cut a line to a number of columns; sequences that change the colour take none and all stay."""
    parts = _SEQUENCES.split(line)
    for number in range(0, len(parts), 2):
        parts[number] = parts[number][:width]
        width -= len(parts[number])
    return "".join(parts)


def watch(source: Callable[[], Readout], interval: float, style: Style) -> None:
    """Show what ``source`` returns, again and again, until the user quits.

    Raises:
        QuicSteerError: the first reading failed.
        KeyboardInterrupt: the user pressed Ctrl-C.
    """
    view = View(style, source())
    with _Terminal() as terminal:
        due = time.monotonic() + interval
        while True:
            terminal.draw(view)
            key = terminal.wait(due - time.monotonic())
            if key in _QUIT:
                return
            view.scrolled += _KEYS.get(key, 0)
            if time.monotonic() >= due:
                view.update(source)
                due = max(due + interval, time.monotonic())


class _Terminal:
    """The terminal while the view has it."""

    def __enter__(self) -> "_Terminal":
        self._input = sys.stdin.fileno() if sys.stdin.isatty() else -1
        self._settings = termios.tcgetattr(self._input) if self._input >= 0 else None
        self._wakes, self._wake = os.pipe()
        for end in (self._wakes, self._wake):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        self._handlers = {
            number: signal.signal(number, handler)
            for number, handler in (
                (signal.SIGWINCH, _ignore),
                (signal.SIGTSTP, _ignore),
                (signal.SIGTERM, _end),
                (signal.SIGHUP, _end),
            )
        }
        self._take()
        return self

    def __exit__(self, *exception: object) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._wakes)
        os.close(self._wake)

    def draw(self, view: View) -> None:
        """Put the view on the screen, in one write."""
        width, height = shutil.get_terminal_size()
        lines = view.lines(width, height)
        self._write(_HOME + "\n".join(line + _CLEAR_LINE for line in lines) + _CLEAR_BELOW)

    def wait(self, timeout: float) -> bytes:
        """Wait for a key, another size of the terminal, or the time; return the key, or nothing."""
        watched = [self._wakes] if self._input < 0 else [self._wakes, self._input]
        readable, _, _ = select.select(watched, [], [], max(timeout, 0))
        if self._wakes in readable and signal.SIGTSTP in os.read(self._wakes, 4096):
            self._give_back()
            os.kill(os.getpid(), signal.SIGSTOP)
            self._take()
        return os.read(self._input, 32) if self._input in readable else b""

    def _take(self) -> None:
        if self._settings:
            tty.setcbreak(self._input)
        self._write(_ENTER)

    def _give_back(self) -> None:
        with contextlib.suppress(OSError):  # the terminal is gone
            self._write(_LEAVE)
        if self._settings:
            with contextlib.suppress(termios.error):
                termios.tcsetattr(self._input, termios.TCSADRAIN, self._settings)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _ignore(number: int, frame: FrameType | None) -> None:
    """The wake-up descriptor says what happened."""


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def follow(source: Callable[[], Readout], interval: float) -> Iterator[Readout]:
    """Yield a readout now and after each interval, for output that is no terminal."""
    while True:
        yield source()
        time.sleep(interval)
