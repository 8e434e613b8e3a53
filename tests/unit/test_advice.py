"""Figures in, one sentence out."""

from dataclasses import replace

import pytest
from figures import SOCKET, group, slots

from quicsteer import GroupStats, HostStats, Outcome, advice
from quicsteer.quicstats import QuicStats
from quicsteer.sockdiag import SocketStats

TABLE = {
    "nothing": (group(), None),
    "nothing is known": (
        group(
            slots(dropped=[None, None], routed=[None, None], queued_bytes=[None, None], swallowed=[None, None]),
            host=None,
            sink=None,
        ),
        None,
    ),
    "one slot overflows": (
        group(slots(dropped=[0, 1000])),
        "Worker 1 on 192.0.2.1:443 lost 1,000 datagrams for want of receive buffer: --receive-buffer 2097152 "
        "(receive_buffer=2097152) holds such a burst, and sysctl -w net.core.rmem_max=2097152 allows it without "
        "CAP_NET_ADMIN.",
    ),
    "one datagram is lost": (
        group(slots(dropped=[1, 0], role=["listener", "listener"])),
        "Worker 0 (listener) on 192.0.2.1:443 lost 1 datagram for want of receive buffer: --receive-buffer 262144 "
        "(receive_buffer=262144) holds such a burst, and sysctl -w net.core.rmem_max=262144 allows it without "
        "CAP_NET_ADMIN.",
    ),
    "several slots overflow": (
        group(slots(dropped=[10, 0, 30], role=["established"] * 3, bank=[1, 1, 1])),
        "2 slots, most of all worker 2 (established of bank 1) on 192.0.2.1:443, lost 40 datagrams for want of receive "
        "buffer: --receive-buffer 262144 (receive_buffer=262144) holds such a burst, and sysctl -w "
        "net.core.rmem_max=262144 allows it without CAP_NET_ADMIN.",
    ),
    "more is lost than any buffer holds": (
        group(slots(dropped=[1_000_000])),
        "Worker 0 on 192.0.2.1:443 lost 1,000,000 datagrams for want of receive buffer: no buffer holds so many, more "
        "workers or faster ones are needed (--workers).",
    ),
    "a queue is nearly full": (
        group(slots(queued_bytes=[0, 400_000])),
        "The receive buffer of worker 1 on 192.0.2.1:443 is 94% full: the worker does not read as fast as datagrams "
        "come, or it hangs.",
    ),
    "a queue is half full": (group(slots(queued_bytes=[0, 212_992])), None),
    "one worker is busy": (
        group(slots(routed=[100, 9000, 100, 200])),
        "Worker 1 gets 96% of the datagrams, an even share is 25%: few connections carry most of the traffic; "
        "quicsteer dispatch 1=0 keeps new connections away.",
    ),
    "one worker is busier than others, but not by far": (group(slots(routed=[1000, 2500, 1000, 1000])), None),
    "one worker got all of very few": (group(slots(routed=[0, 900])), None),
    "there is only one worker": (group(slots(routed=[100_000])), None),
    "clients of an earlier process": (
        group(
            slots(routed=[900, 900], unroutable=[0, 0]), sink_outcomes={**dict.fromkeys(Outcome, 0), Outcome(2): 200}
        ),
        "10% of the datagrams carry no connection ID of this group: clients of an earlier process (they come back by "
        "themselves), or a server that issues other connection IDs than worker.connection_ids.",
    ),
    "a few strays": (group(slots(routed=[9000, 9000], unroutable=[100, 100])), None),
    "somebody writes to a parked slot": (
        group(slots(swallowed=[0, 12], parked=[False, True])),
        "12 datagrams came for slots that nobody reads: clients of replaced workers that had not ended when the "
        "workers did (a longer --drain-timeout lets them).",
    ),
    "the host has no memory for UDP": (
        group(host=HostStats(5, 7, 0, 0)),
        "This host dropped 7 datagrams because the memory for UDP was used up: raise net.ipv4.udp_mem, or use smaller "
        "receive buffers.",
    ),
}


@pytest.mark.parametrize(("figures", "sentence"), TABLE.values(), ids=TABLE)
def test_a_group_gets_advice_where_there_is_some(figures: GroupStats, sentence: str | None) -> None:
    assert advice.for_group(figures) == ([sentence] if sentence else [])


def test_advice_is_about_the_span_that_was_asked_for() -> None:
    before, after = group(slots(dropped=[5, 0])), group(slots(dropped=[5, 3]), time=2.0)
    [sentence] = advice.for_group(after - before)
    assert "Worker 1" in sentence
    assert "lost 3 datagrams" in sentence


def test_the_buffer_that_is_advised_holds_the_burst() -> None:
    for buffer, lost in ((425_984, 1000), (212_992, 1), (5_000_000, 123_456)):
        asked = advice.buffer_for(buffer, lost)
        assert 2 * asked >= buffer + lost * advice.DATAGRAM_BYTES
        assert asked & (asked - 1) == 0


def test_others_on_the_port_and_answers_that_were_not_sent() -> None:
    assert advice.for_group(group(), {0: QuicStats(unsent=2), 1: QuicStats(unsent=1)}, ["nginx (pid 7)"]) == [
        "On the same port, with traffic of their own: nginx (pid 7).",
        "The kernel did not take 3 datagrams that workers sent: a larger SO_SNDBUF helps (socket_options).",
    ]


@pytest.mark.parametrize(
    ("pages", "sentence"),
    [
        (10, None),
        (799, None),
        (
            800,
            "UDP uses 800 of 1500 pages of memory, pressure begins at 1000: raise net.ipv4.udp_mem, or use smaller "
            "receive buffers.",
        ),
    ],
)
def test_memory_for_udp_runs_short(pages: int, sentence: str | None) -> None:
    assert advice.udp_memory(pages, 1000, 1500) == sentence


SOCKETS: dict[str, tuple[list[SocketStats], str | None]] = {
    "none": ([], None),
    "quiet": ([SOCKET], None),
    "one drops": (
        [SOCKET, replace(SOCKET, dropped=17)],
        "A socket of nginx (pid 7) dropped 17 datagrams: its buffer of 212,992 bytes holds some 92 full ones, or a "
        "filter drops them on purpose, as in the sink and the parked slots of quicsteer.",
    ),
    "one is full": (
        [replace(SOCKET, queued_bytes=212_000, processes=())],
        "A receive buffer of a process of uid 33 is 100% full: nobody reads it fast enough.",
    ),
    "a member is connected": (
        [replace(SOCKET, grouped=True), replace(SOCKET, grouped=True, peer=("198.51.100.1", 5))],
        "A socket of nginx (pid 7) is connected to 198.51.100.1:5 on the address of a group: a member that calls "
        "connect() slows or splits the whole group.",
    ),
    "a client is connected": ([replace(SOCKET, peer=("198.51.100.1", 5))], None),
}


@pytest.mark.parametrize(("sockets", "sentence"), SOCKETS.values(), ids=SOCKETS)
def test_sockets_get_advice_where_there_is_some(sockets: list[SocketStats], sentence: str | None) -> None:
    assert advice.for_sockets(sockets) == ([sentence] if sentence else [])
