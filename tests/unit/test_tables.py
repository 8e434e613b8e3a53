"""Text for people: it fits, it says what rises, and it leaves the terminal's width alone."""

import re
from dataclasses import replace

import pytest
from figures import FIGURES, SOCKET, group, slots

from quicsteer.live import View, clip
from quicsteer.readout import ServiceReadout, SocketsReadout
from quicsteer.stats import render_text
from quicsteer.tables import BAR, Style, short

PLAIN, COLOUR = Style(), Style(colour=True)
STATUS = {
    "pid": 7,
    "addresses": [["192.0.2.1", 443]],
    "reloading": "",
    "reloads": 1,
    "restarts": 0,
    "workers": [{"state": "serving", "hung": False}] * 2,
}
BUSY = slots(dropped=[0, 12], routed=[1_234_567, 20], queued_bytes=[200_000, 425_984], swallowed=[0, 0])
EARLIER = ServiceReadout(STATUS, group(slots(dropped=[0, 2], routed=[1_000_000, 20])), {0: FIGURES})
LATER = ServiceReadout(STATUS, group(BUSY, time=11.0), {0: FIGURES, 1: FIGURES})
SOCKETS = SocketsReadout("192.0.2.1:443", 1.0, [SOCKET, replace(SOCKET, dropped=5, grouped=True)])


def bare(text: str) -> str:
    return re.sub(r"\033\[[0-9;]*m", "", text)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "?"), (0, "0"), (0.25, "0.2"), (7, "7"), (7.5, "7.5"), (999, "999"), (9_994, "9,994"), (9_999, "10k"),
        (12_345, "12.3k"), (999_400, "999k"), (999_600, "1M"), (1_250_000, "1.25M"), (4.2e9, "4.2G"), (2e12, "2000G"),
    ],
)  # fmt: skip
def test_numbers_are_short(number: float | None, text: str) -> None:
    assert short(number) == text
    assert len(text) <= 6


@pytest.mark.parametrize("share", [None, 0.0, 0.001, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("unicode", [True, False])
def test_bars_are_of_one_length_and_show_the_least_bit(share: float | None, unicode: bool) -> None:
    bar = Style(unicode=unicode).bar(share)
    assert len(bar) == BAR
    assert unicode or bar.isascii()
    assert (bar == "·" * BAR) == (share == 0 and unicode)


def test_a_service_fits_80_columns_and_says_everything() -> None:
    lines = render_text(LATER, PLAIN)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in ("192.0.2.1:443  mode ebpf  workers: 2 serve", "1,234,567", "routed 1,234,587", "dropped 12", "0x10c"):
        assert part in text
    assert "NO_ERROR" in text
    assert "\033" not in text


def test_a_view_fits_any_terminal_and_shows_rates() -> None:
    view = View(COLOUR, LATER, EARLIER)
    for width, height in ((80, 24), (120, 40), (40, 10), (20, 3), (1, 1)):
        lines = view.lines(width, height)
        assert len(lines) == height
        assert max(len(bare(line)) for line in lines) <= width
    text = bare("\n".join(view.lines(80, 24)))
    assert "routed 23.5k/s" in text
    assert "dropped 1/s" in text
    wide = bare("\n".join(view.lines(120, 40)))
    assert "malformed/s" in wide


def test_red_is_where_drops_rise() -> None:
    rising = [line for line in View(COLOUR, LATER, EARLIER).lines(80, 24) if "\033[1;31m" in line]
    assert len(rising) == 2  # the totals, and worker 1
    assert bare(rising[1]).split()[0] == "1"
    still = replace(LATER, group=replace(LATER.group, time=12.0))
    assert not any("\033[1;31m" in line for line in View(COLOUR, still, LATER).lines(80, 24))
    assert not any("\033" in line for line in View(PLAIN, LATER, EARLIER).lines(80, 24))


def test_another_run_of_the_service_has_no_rates_yet() -> None:
    restarted = replace(LATER, supervisor={**STATUS, "pid": 8})
    assert restarted.since(LATER) is None
    assert "/s" not in bare("\n".join(View(COLOUR, restarted, LATER).lines(120, 40)))


def test_a_view_scrolls_as_far_as_there_is_something() -> None:
    view = View(PLAIN, LATER, EARLIER)
    view.scrolled = 100
    bottom = view.lines(80, 14)
    assert "0x10c" in "\n".join(bottom)
    assert " below" not in bottom[-1]
    view.scrolled = -5
    assert " below" in view.lines(80, 14)[-1]


def test_sockets_fit_80_columns_with_and_without_rates() -> None:
    long = replace(SOCKET, address=("2001:db8:1234:5678:9abc:def0:1234:5678", 44330))
    readout = SocketsReadout("[::]:44330", 2.0, [long, *SOCKETS.sockets])
    lines = [*render_text(readout, PLAIN), *View(PLAIN, readout, SOCKETS).lines(80, 24)]
    assert max(map(len, lines)) <= 80
    assert any("7 nginx" in line for line in lines)


def test_clip_counts_what_can_be_seen() -> None:
    assert clip("abc", 2) == "ab"
    assert clip("\033[1mabc\033[0mdef", 4) == "\033[1mabc\033[0md"
    assert clip("\033[1mabc\033[0m", 0) == "\033[1m\033[0m"
