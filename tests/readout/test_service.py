"""What a running service tells: totals that no restart takes back, in the command, in JSON and as metrics."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from quic import TIMEOUT, Client
from service import Service, program, service
from steer import short_header

from quicsteer import QuicSteerError, SteeringMode, cli
from quicsteer.quicstats import QuicStats, total
from quicsteer.readout import ServiceReadout
from quicsteer.stats import find_source

H3_REQUEST_CANCELLED = 0x10C


def read(running: Service) -> ServiceReadout:
    readout = find_source(str(running.control))()
    assert isinstance(readout, ServiceReadout)
    return readout


def wait_for_quic(running: Service, **figures: int) -> QuicStats:
    """Read until the workers' figures together are as they should be: a client's words take their time."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        together = total(read(running).quic.values())
        seen = {name: getattr(together, name) for name in figures} | {"ends": sum(together.ends.values())}
        if seen == {"ends": 0} | figures:
            return together
        assert time.monotonic() < deadline, seen
        time.sleep(0.01)


async def talk(address: tuple[str, int], *codes: int) -> None:
    """Have connections that exchange something and are closed with these error codes."""
    for code in codes:
        client = Client()
        await client.connect(address)
        await client.exchange()
        await client.close(code)


def ends(figures: QuicStats) -> dict[tuple[str, bool, int], int]:
    return {tuple(end): count for end, count in figures.ends.items()}  # type: ignore[misc]


def test_connections_are_counted_by_error_code(steering_mode: SteeringMode) -> None:
    with service("--workers", "2", "--mode", steering_mode) as running:
        assert set(read(running).quic) == {0, 1}
        asyncio.run(talk(running.address, 0, 0, H3_REQUEST_CANCELLED))
        figures = wait_for_quic(running, opened=3, connections=0, ends=3)
        assert ends(figures) == {("client", True, 0): 2, ("client", True, H3_REQUEST_CANCELLED): 1}


def test_stream_resets_are_counted_in_and_out() -> None:
    async def main(running: Service) -> None:
        client = Client()
        await client.connect(running.address)
        await client.exchange()
        stream = client.connection.get_next_available_stream_id()
        client.connection.send_stream_data(stream, b"never mind")
        client.connection.reset_stream(stream, 0x10C)
        client.protocol.transmit()
        await client.close(7)

    with service("--workers", "1") as running:
        asyncio.run(main(running))
        figures = wait_for_quic(running, opened=1, ends=1)
        assert {tuple(reset): count for reset, count in figures.stream_resets.items()} == {
            ("client", "RESET_STREAM", 0x10C): 1
        }


def test_a_crash_takes_no_total_back() -> None:
    with service("--workers", "2") as running:
        asyncio.run(talk(running.address, 0, 0, 0, 0))
        before = wait_for_quic(running, opened=4, connections=0, ends=4)
        workers = running.workers("serving")
        for pid in workers.values():
            os.kill(pid, signal.SIGKILL)
        running.wait_for_workers(
            lambda found: (
                [w["state"] for w in found] == ["serving"] * 2 and not {w["pid"] for w in found} & set(workers.values())
            )
        )
        assert total(read(running).quic.values()) == before
        asyncio.run(talk(running.address, 5))
        after = wait_for_quic(running, opened=5, connections=0, ends=5)
        assert ends(after) == {("client", True, 0): 4, ("client", True, 5): 1}


def test_reload_and_upgrade_take_no_total_back() -> None:
    with program("--workers", "2") as running:
        asyncio.run(talk(running.address, 0, 0))
        wait_for_quic(running, opened=2, connections=0, ends=2)
        running.reload()
        running.wait_for_workers(lambda found: len(found) == 2)
        asyncio.run(talk(running.address, 1))
        before = wait_for_quic(running, opened=3, connections=0, ends=3)
        heard = len(running.manager.messages)
        running.kill(signal.SIGUSR2)
        running.manager.wait_for("READY=1", after=heard)
        assert total(read(running).quic.values()) == before
        asyncio.run(talk(running.address, 2))
        wait_for_quic(running, opened=4, connections=0, ends=4)


def test_what_a_worker_closes_at_the_deadline_counts_too() -> None:
    async def main(running: Service) -> None:
        client = Client()
        await client.connect(running.address)
        await client.exchange()
        await asyncio.to_thread(running.reload)
        await asyncio.wait_for(client.protocol.wait_closed(), TIMEOUT)
        client.drop()

    with service("--workers", "1", "--drain-timeout", "0") as running:
        asyncio.run(main(running))
        running.wait_for_workers(lambda found: len(found) == 1)
        figures = wait_for_quic(running, opened=1, connections=0, ends=1)
        assert ends(figures) == {("server", True, 0): 1}


def test_a_hung_worker_keeps_nobody_waiting_twice() -> None:
    with service("--workers", "2") as running:
        pid = running.workers("serving")[0]
        read(running)
        os.kill(pid, signal.SIGSTOP)
        try:
            assert set(read(running).quic) == {0, 1}
            started = time.monotonic()
            for _ in range(20):
                read(running)
            assert time.monotonic() - started < TIMEOUT / 2  # and not 20 times the patience
        finally:
            os.kill(pid, signal.SIGCONT)


def metrics(port: int, path: str = "/metrics") -> str:
    with socket.create_connection(("127.0.0.1", port)) as sock, sock.makefile("rb") as answer:
        sock.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        head, _, body = answer.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    return body.decode()


def test_the_exporter_and_the_command_agree(steering_mode: SteeringMode, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--workers", "2", "--mode", steering_mode, "--drop-invalid", "--metrics", "127.0.0.1:0")
    with service(*arguments) as running:
        [port] = running.wait_for_log(r"metrics: http://127.0.0.1:(\d+)/metrics")
        asyncio.run(talk(running.address, 0))
        wait_for_quic(running, opened=1, connections=0, ends=1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            for _ in range(100):
                client.sendto(short_header(os.urandom(8)), running.address)
        assert cli.main(["stats", str(running.control), "--prometheus"]) == 0
        shown, served = capsys.readouterr().out, metrics(int(port))
        values = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(served)
            for sample in family.samples
        }
        assert values["quicsteer_sink_datagrams_total",] == 100
        assert values["quicsteer_workers", ("state", "serving")] == 2
        outcome = values.get(
            ("quicsteer_datagrams_total", ("address", ""), ("outcome", "unroutable"), ("slot", "sink"))
        )
        assert outcome == (100 if steering_mode is SteeringMode.EBPF else None)
        names = {name for name, *_ in values}
        assert {line.split("{")[0].split()[0] for line in shown.splitlines() if line[0] != "#"} == names


def test_json_holds_what_the_documentation_promises(capsys: pytest.CaptureFixture[str]) -> None:
    with service("--workers", "1") as running:
        assert cli.main(["stats", str(running.control), "--json"]) == 0
        shown: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert list(shown) == ["schema", "supervisor", "group", "quic", "strangers", "advice"]
        assert shown["schema"] == 1
        assert shown["quic"][0]["worker"] == 0
        documented = (Path(__file__).parents[2] / "docs" / "stats.md").read_text()
        keys = {*shown, *shown["supervisor"], *shown["group"], *shown["group"]["slots"][0], *shown["quic"][0]}
        assert [key for key in keys if f"`{key}`" not in documented] == []


def test_the_address_of_the_metrics_must_be_free_at_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        host, port = taken.getsockname()
        with service("--workers", "1", "--metrics", f"{host}:{port}", wait=False) as running:
            assert running.wait() == 2
            assert "bind(TCP 127.0.0.1" in running.log
            assert "started" not in running.log


def test_a_service_is_found_by_its_pid() -> None:
    with program("--workers", "1") as running:
        by_pid = find_source(f"pid:{running.pid}")()
        assert isinstance(by_pid, ServiceReadout)
        assert by_pid.supervisor["pid"] == running.pid
        [worker] = running.workers().values()
        assert not isinstance(find_source(f"pid:{worker}")(), ServiceReadout)


def test_a_socket_of_somebody_else_on_the_port_is_named() -> None:
    with service("--workers", "1") as running, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        assert read(running).strangers == []
        other.bind(("127.0.0.2", running.address[1]))
        [stranger] = read(running).strangers
        assert f"(pid {os.getpid()}, uid {os.geteuid()}) on 127.0.0.2" in stranger
        assert any(stranger in sentence for sentence in read(running).advice())


def test_a_target_that_is_not_there_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(QuicSteerError, match="no supervisor answers"):
        find_source(f"{tmp_path}/control")()
    with pytest.raises(QuicSteerError, match="no UDP socket"):
        find_source("127.0.0.1:1")()
    with pytest.raises(QuicSteerError, match="no process"):
        find_source("pid:4194304")()
    for wrong in ("nothing", "pid:x", "127.0.0.1:port"):
        with pytest.raises(ValueError, match=r"pid:N|host:port"):
            find_source(wrong)


def test_the_readout_needs_no_pyroute2_for_a_service() -> None:
    script = "import sys; sys.modules['pyroute2'] = None; import quicsteer.stats, quicsteer.run"
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")
