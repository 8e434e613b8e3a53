"""Metrics: the text that Prometheus reads, and the same through prometheus_client."""

import asyncio
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
from figures import FIGURES, SOCKET, group, slots
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from quicsteer import GroupStats, Outcome, SteeringMode, exporter
from quicsteer.errors import KernelError, QuicSteerError
from quicsteer.exporter import Exporter, exporting
from quicsteer.prometheus import (
    Family,
    GroupCollector,
    group_families,
    quic_families,
    render,
    socket_families,
    supervisor_families,
)

SINK = dict(zip(Outcome, (0, 0, 700, 300), strict=True))
STATS = group(
    slots(dropped=[3, 0], routed=[10, 20], swallowed=[0, 4], parked=[False, True]), sink=1000, sink_outcomes=SINK
)
STATUS = {
    "workers": [{"state": "serving", "hung": False}, {"state": "draining", "hung": True}],
    "restarts": 2,
    "reloads": 5,
}


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a text, by name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_text_names_each_figure_as_promised() -> None:
    found = samples(render(group_families(STATS)))

    def value(name: str, **labels: str) -> float | None:
        return found.get((name, tuple(sorted(labels.items()))))

    here = {"slot": "0", "address": "192.0.2.1:443"}
    assert value("quicsteer_datagrams_total", **here, outcome="routed") == 10
    assert value("quicsteer_datagrams_total", slot="sink", address="", outcome="unroutable") == 700
    assert value("quicsteer_datagrams_dropped_total", **here) == 3
    assert value("quicsteer_datagrams_parked_total", slot="1", address="192.0.2.1:443") == 4
    assert value("quicsteer_receive_buffer_bytes", **here) == 425_984
    assert value("quicsteer_receive_queue_bytes", **here) == 0
    assert value("quicsteer_sink_datagrams_total") == 1000
    assert value("quicsteer_host_udp_errors_total", error="rcvbuf_errors") == 0
    assert value("quicsteer_slot_parked", slot="1", address="192.0.2.1:443", worker="1", role="both", bank="") == 1
    [info] = [dict(labels) for name, labels in found if name == "quicsteer_info"]
    assert (info["mode"], info["fallback"]) == ("ebpf", "no")


def test_what_cannot_be_known_has_no_sample() -> None:
    unknown = slots(dropped=[None], routed=[None], dispatched=[None], unroutable=[None], malformed=[None])
    stats = replace(
        group(unknown, host=None, sink=None, sink_outcomes=dict.fromkeys(Outcome)),
        mode=SteeringMode.HASH,
        fallback="why",
    )
    names = {name for name, _ in samples(render(group_families(stats)))}
    assert names == {
        "quicsteer_info",
        "quicsteer_datagrams_parked_total",
        "quicsteer_receive_queue_bytes",
        "quicsteer_receive_buffer_bytes",
        "quicsteer_slot_parked",
    }


def test_quic_errors_have_their_code_and_name() -> None:
    found = samples(render(quic_families({3: FIGURES})))
    labels = {"worker": "3", "sender": "nobody", "layer": "transport", "code": "0x0", "name": "NO_ERROR"}
    assert found["quicsteer_quic_connections_closed_total", tuple(sorted(labels.items()))] == 3
    labels = {"worker": "3", "sender": "client", "frame": "STOP_SENDING", "code": "0x10c"}
    assert found["quicsteer_quic_stream_resets_total", tuple(sorted(labels.items()))] == 2
    assert found["quicsteer_quic_connections_opened_total", (("worker", "3"),)] == 9
    assert found["quicsteer_quic_connections", (("worker", "3"),)] == 2


def test_labels_are_escaped() -> None:
    family = Family("quicsteer_test", "gauge", "A test.", [({"name": 'a"b\\c\nd'}, 1)])
    assert samples(family.text()) == {("quicsteer_test", (("name", 'a"b\\c\nd'),)): 1}


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool (Debian: prometheus) is not here")
def test_promtool_finds_nothing_to_object_to() -> None:
    text = render(
        [
            *group_families(STATS),
            *supervisor_families(STATUS),
            *quic_families({0: FIGURES, 1: FIGURES}),
            *socket_families([SOCKET, replace(SOCKET, inode=2)]),
        ]
    )
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


class Group:
    """Stands for a group."""

    def __init__(self) -> None:
        self.read = 0

    def stats(self) -> GroupStats:
        self.read += 1
        return STATS


def test_a_collector_gives_prometheus_client_the_same_figures() -> None:
    registry, source = CollectorRegistry(), Group()
    registry.register(GroupCollector(source, lambda: {0: FIGURES}))
    assert source.read == 0
    text = generate_latest(registry).decode()
    assert source.read == 1
    assert samples(text) == samples(render([*group_families(STATS), *quic_families({0: FIGURES})]))


# The exporter

Answer = tuple[int, dict[str, str], bytes]


async def ask(port: int, request: bytes) -> Answer | None:
    """Send a request as it is; ``None`` when the connection is closed without an answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        answer = await reader.read()
    except ConnectionError:
        answer = b""
    writer.close()
    if not answer:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    return int(status.split()[1]), dict(header.split(": ", 1) for header in headers), body


def with_exporter(test: Callable[[int], Awaitable[None]], metrics: Callable[[], Awaitable[str]] | None = None) -> None:
    async def default() -> str:
        return "a 1\n"

    async def main() -> None:
        served = Exporter("127.0.0.1:0", metrics or default)
        await served.start()
        [(_, port)] = served.addresses
        await test(port)
        await served.close()

    asyncio.run(main())


def test_the_exporter_answers_get_metrics_and_nothing_else() -> None:
    async def test(port: int) -> None:
        for request, status, body in (
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 200, b"a 1\n"),
            (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200, b"a 1\n"),
            (b"HEAD /metrics HTTP/1.1\r\n\r\n", 200, b""),
            (b"GET / HTTP/1.1\r\n\r\n", 404, b"the metrics are at /metrics\n"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", 405, b"only GET is served\n"),
            (b"nonsense\r\n\r\n", 400, b"this is no HTTP/1.1 request\n"),
            (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * exporter.REQUEST_MAX, 431, b"the request is too long\n"),
        ):
            answer = await ask(port, request)
            assert answer is not None, request
            assert (answer[0], answer[2]) == (status, body)
            assert answer[1]["Content-Length"] == str(len(body)) or request.startswith(b"HEAD")
            assert answer[1]["Connection"] == "close"

    with_exporter(test)


def test_the_content_type_says_which_format_it_is() -> None:
    async def test(port: int) -> None:
        answer = await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert answer is not None
        assert answer[1]["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"

    with_exporter(test)


def test_a_service_that_ends_says_so() -> None:
    async def ended() -> str:
        raise QuicSteerError("the group is closed in this process")

    async def test(port: int) -> None:
        answer = await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert answer is not None
        assert answer[0] == 503

    with_exporter(test, ended)


def test_who_asks_nothing_is_not_served_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "REQUEST_TIMEOUT", 0.01)

    async def test(port: int) -> None:
        assert await ask(port, b"GET /metrics HTT") is None

    with_exporter(test)


def test_only_so_many_are_served_at_once() -> None:
    async def test(port: int) -> None:
        waiting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(exporter.CONNECTIONS_MAX)]
        assert await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n") is None
        for _, writer in waiting:
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        for reader, writer in waiting:
            assert (await reader.read()).endswith(b"a 1\n")
            writer.close()

    with_exporter(test)


def test_an_address_that_is_taken_is_an_error_only_at_the_first_start() -> None:
    async def metrics() -> str:
        return ""

    async def main() -> None:
        first = Exporter("127.0.0.1:0", metrics)
        await first.start()
        [(host, port)] = first.addresses
        taken: dict[str, Any] = {"bind": f"{host}:{port}", "metrics": metrics}
        with pytest.raises(KernelError, match=r"bind\(TCP 127.0.0.1"):
            async with exporting(**taken, required=True):
                pass
        entered = False
        async with exporting(**taken, required=False):
            entered = True
        assert entered
        async with exporting(None, metrics, required=True):
            pass
        await first.close()

    asyncio.run(main())


def test_a_group_without_slots_has_metrics_too() -> None:
    assert "quicsteer_info" in render(group_families(group(())))
