"""The live view in a terminal of its own: it updates in place, follows the terminal's size, and leaves it clean."""

import fcntl
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest
from quic import TIMEOUT
from readouts import overflow

from quicsteer import SteeringGroup

ENTER, LEAVE = "\033[?1049h", "\033[?1049l"
SHOW_CURSOR = "\033[?25h"


class Terminal:
    """A pseudo-terminal with ``quicsteer stats --watch`` in it, and all that was ever written there."""

    def __init__(self, target: str, size: tuple[int, int], environment: dict[str, str] | None = None) -> None:
        self.master, self.slave = os.openpty()
        self.resize(*size, tell=False)
        self.before = termios.tcgetattr(self.slave)
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "quicsteer", "stats", "--watch", "0.1", target],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            cwd="/",
            env={**os.environ, "TERM": "xterm", "PYTHONUTF8": "1", **(environment or {})},
            start_new_session=True,
        )

    def resize(self, columns: int, rows: int, tell: bool = True) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("=4H", rows, columns, 0, 0))
        if tell:  # the kernel tells the foreground group of a controlling terminal; this is none
            self.process.send_signal(signal.SIGWINCH)

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def wait_for(self, pattern: str, after: int = 0) -> int:
        """Read until the text behind ``after`` has a match; return where it ends."""
        deadline = time.monotonic() + TIMEOUT
        while not (match := re.search(pattern, self.text[after:], re.S)):
            left = deadline - time.monotonic()
            assert left > 0, f"never seen: {pattern}\n{self.text[after:][-3000:]!r}"
            self.read(left)
        return after + match.end()

    def read(self, patience: float) -> None:
        if select.select([self.master], [], [], patience)[0]:
            self.text += os.read(self.master, 65536).decode(errors="replace")

    def wait_for_frame(self, columns: int, rows: int) -> list[str]:
        """Read until a frame of another size is whole, and return it."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            for frame in self.frames()[:-1]:
                if len(frame) == rows:
                    assert max(map(len, frame)) <= columns
                    return frame
            assert time.monotonic() < deadline, f"no frame of {rows} lines"
            self.read(TIMEOUT)

    def frames(self) -> list[list[str]]:
        """What was drawn each time, as lines without sequences."""
        drawn = self.text.split("\033[H")[1:]
        return [re.sub(r"\033\[[0-9;?]*[a-zA-Z]", "", frame).split("\r\n") for frame in drawn]

    def end(self) -> int:
        """Wait for the end of the process, and return its status."""
        status = self.process.wait(TIMEOUT)
        self.wait_for(re.escape(LEAVE))
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def group() -> Iterator[SteeringGroup]:
    with SteeringGroup.open("127.0.0.1:0", 12, mode="cbpf", receive_buffer=20_000) as opened:
        yield opened


@pytest.fixture
def terminal(group: SteeringGroup) -> Iterator[Terminal]:
    opened = Terminal(f"127.0.0.1:{group.addresses[0][1]}", (80, 24))
    yield opened
    opened.close()


def test_q_ends_it_and_the_terminal_is_as_before(terminal: Terminal) -> None:
    terminal.wait_for("q quits")
    assert terminal.text.startswith(ENTER)
    assert termios.tcgetattr(terminal.slave) != terminal.before
    terminal.press("q")
    assert terminal.end() == 0
    assert terminal.text.index(SHOW_CURSOR) < terminal.text.index(LEAVE)
    assert termios.tcgetattr(terminal.slave) == terminal.before


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 129)]
)
def test_signals_end_it_cleanly_too(terminal: Terminal, number: signal.Signals, status: int) -> None:
    terminal.wait_for("q quits")
    terminal.process.send_signal(number)
    assert terminal.end() == status
    assert "Traceback" not in terminal.text
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_it_fits_and_follows_the_size_of_the_terminal(terminal: Terminal) -> None:
    assert "q quits" in terminal.wait_for_frame(80, 24)[-1]
    terminal.resize(120, 40)
    assert "q quits" in terminal.wait_for_frame(120, 40)[-1]
    terminal.resize(40, 8)
    assert "below" in terminal.wait_for_frame(40, 8)[-1]


def test_it_scrolls(terminal: Terminal) -> None:
    terminal.resize(80, 10)
    seen = terminal.wait_for("address .*, \\d+ below")
    terminal.press("\033[6~")
    terminal.wait_for("a group\033", seen)


def test_drops_that_rise_are_red(group: SteeringGroup, client: socket.socket, terminal: Terminal) -> None:
    seen = terminal.wait_for("q quits")
    assert "\033[1;31m" not in terminal.text
    overflow(group, group.workers[3], 1000, client)
    seen = terminal.wait_for("\033\\[1;31m +1,000\033\\[0m", seen)
    terminal.wait_for("   1,000 +0", seen)  # and not red any more when they do not


def test_no_colour_where_none_is_wanted(group: SteeringGroup, client: socket.socket) -> None:
    overflow(group, group.workers[3], 1000, client)
    terminal = Terminal(f"127.0.0.1:{group.addresses[0][1]}", (80, 24), {"NO_COLOR": "1"})
    seen = terminal.wait_for("q quits")
    overflow(group, group.workers[3], 1000, client)
    terminal.wait_for("2,000", seen)
    assert not re.search("\033\\[[0-9;]*m", terminal.text)
    terminal.close()


def test_it_stops_and_goes_on_as_any_program_of_a_shell(terminal: Terminal) -> None:
    terminal.wait_for("q quits")
    terminal.process.send_signal(signal.SIGTSTP)
    seen = terminal.wait_for(re.escape(LEAVE))
    _, status = os.waitpid(terminal.process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert termios.tcgetattr(terminal.slave) == terminal.before
    terminal.process.send_signal(signal.SIGCONT)
    terminal.wait_for(re.escape(ENTER) + ".*q quits", seen)
    terminal.press("q")
    assert terminal.end() == 0


def test_what_goes_away_is_said_and_may_come_back(group: SteeringGroup, terminal: Terminal) -> None:
    seen = terminal.wait_for("q quits")
    [(host, port)] = group.addresses
    group.close()
    seen = terminal.wait_for("no UDP socket", seen)
    with SteeringGroup.open((host, port), 1, mode="cbpf"):
        terminal.wait_for("2 sockets", seen)
