"""Error codes by name, and figures that nobody can blow up."""

from collections import Counter

import pytest
from figures import FIGURES

from quicsteer.quicstats import (
    CODES_MAX,
    OTHER_CODES,
    ConnectionEnd,
    QuicStats,
    StreamReset,
    count_end,
    count_reset,
    name_transport_error,
    total,
)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (0x00, "NO_ERROR"),
        (0x0A, "PROTOCOL_VIOLATION"),
        (0x10, "NO_VIABLE_PATH"),
        (0x100 + 120, "CRYPTO_ERROR(no_application_protocol)"),
        (0x100 + 255, "CRYPTO_ERROR(255)"),
        (0x200, None),
        (2**62 - 1, None),
    ],
)
def test_transport_errors_have_the_names_of_rfc_9000(code: int, name: str | None) -> None:
    assert name_transport_error(code) == name


def test_codes_that_clients_make_up_are_told_apart_only_so_far() -> None:
    ends: Counter[ConnectionEnd] = Counter()
    for code in range(10_000, 11_000):
        count_end(ends, ConnectionEnd("client", False, code))
        count_end(ends, ConnectionEnd("client", True, code))
    for code in range(0x11):  # those with a name are always told apart
        count_end(ends, ConnectionEnd("client", False, code))
    count_end(ends, ConnectionEnd("server", False, 10_500))
    assert ends[ConnectionEnd("client", False, OTHER_CODES)] == 1000 - CODES_MAX
    assert ends[ConnectionEnd("client", True, OTHER_CODES)] == 1000 - CODES_MAX
    assert ends[ConnectionEnd("client", False, 0x10)] == 1
    assert ends[ConnectionEnd("server", False, 10_500)] == 1
    assert ends.total() == 2018
    resets: Counter[StreamReset] = Counter()
    for code in range(1000):
        count_reset(resets, StreamReset("client", "RESET_STREAM", code))
    assert len(resets) == CODES_MAX + 1
    assert resets.total() == 1000


def test_figures_survive_json_and_add_up() -> None:
    assert QuicStats.from_dict(FIGURES.to_dict()) == FIGURES
    both = total([FIGURES, FIGURES])
    assert both.opened == 18
    assert both.ends[ConnectionEnd("client", True, 0x100)] == 8
    assert both.stream_resets[StreamReset("client", "STOP_SENDING", 0x10C)] == 4
    assert (FIGURES.past().connections, FIGURES.past().handshakes, FIGURES.past().opened) == (0, 0, 9)


@pytest.mark.parametrize(
    "figures",
    [
        None,
        [],
        {"opened": -1},
        {"opened": True},
        {"opened": 2**63},
        {"opened": "many"},
        {"ends": {}},
        {"ends": [1]},
        {"ends": [{}] * 5000},
        {"ends": [{"sender": "me", "layer": "transport", "code": 1, "count": 1}]},
        {"ends": [{"sender": "client", "layer": "transport", "code": -5, "count": 1}]},
        {"stream_resets": [{"sender": "client", "frame": "PING", "code": 1, "count": 1}]},
        {"stream_resets": [{"sender": ["client"], "frame": "RESET_STREAM", "code": 1, "count": 1}]},
    ],
)
def test_what_a_worker_makes_up_is_refused(figures: object) -> None:
    with pytest.raises(ValueError, match=r".+"):
        QuicStats.from_dict(figures)
