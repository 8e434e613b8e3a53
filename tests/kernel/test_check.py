"""``quicsteer check`` on the kernel of this host, with every mode that it has."""

import functools
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from steer import open_descriptors

from quicsteer import SteeringGroup, SteeringMode
from quicsteer.check import exit_status, run_checks
from quicsteer.cli import main
from quicsteer.proof import prove, try_group

ADDRESS_LINE = re.compile(r"^(ok|no)    address ", re.MULTILINE)


@pytest.fixture
def holder() -> Iterator[socket.socket]:
    """A socket of this process on a free port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


def families() -> int:
    """How many of IPv4 and IPv6 have a loopback address here."""
    count = 0
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((host, 0))
                sock.connect(sock.getsockname())
            count += 1
        except OSError:
            continue
    return count


def test_each_mode_that_steers_is_proven(steering_mode: SteeringMode) -> None:
    probe = prove(steering_mode)
    sent = families() * 400  # with and without drop_invalid
    assert probe.ok is True
    assert probe.mode is steering_mode
    assert probe.detail.startswith(f"{sent} of {sent} datagrams reached the socket their connection ID names, over IPv")
    assert probe.detail.endswith("exact")


def test_sockets_that_do_not_steer_are_found_out() -> None:
    tally = try_group(SteeringMode.HASH, "IPv4", drop_invalid=False)
    assert tally.sent == 200
    assert tally.wrong > 0
    assert tally.right + tally.wrong == tally.sent


def test_the_report_is_complete_and_for_machines(capsys: pytest.CaptureFixture[str], ebpf: SteeringMode) -> None:
    assert main(["check", "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    report = json.loads(output.out)
    assert list(report) == ["version", "kernel", "mode", "probes"]
    assert report["mode"] == ebpf
    assert report["kernel"] == os.uname().release
    assert [probe["mode"] for probe in report["probes"] if probe["mode"]] == ["hash", "cbpf", "ebpf"]
    for probe in report["probes"]:
        assert list(probe) == ["name", "mode", "ok", "warning", "detail", "remedy"]
        assert probe["ok"] in (True, False, None)
        assert isinstance(probe["warning"], bool)
        assert "\n" not in probe["detail"]


def test_the_report_for_people_has_the_shape_that_was_promised(
    capsys: pytest.CaptureFixture[str], ebpf: SteeringMode
) -> None:
    assert main(["check"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    body, closing = output.out.split("\n\n")
    starts = [line for line in body.splitlines() if not line.startswith(" ")]
    wanted = ["Linux ", "shared port ", "classic BPF steers ", "eBPF steers ", "BPF compiler ", "receive buffer "]
    wanted.append("UDP on this host ")
    assert all(re.match(rf"(ok  |warn|\?   )  {name}", line) for name, line in zip(wanted, starts, strict=True))
    assert all(len(line) <= 100 for line in output.out.splitlines())
    assert "\033" not in output.out
    assert closing.startswith("Mode: ebpf. Connections keep their worker when addresses change")


def test_a_required_mode_that_works_is_no_failure(any_mode: SteeringMode, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--require", any_mode]) == 0
    assert "required" not in capsys.readouterr().out


def test_a_free_port_is_free_before_and_after(holder: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    host, port = holder.getsockname()
    holder.close()
    assert main(["check", "--bind", f"{host}:{port}"]) == 0
    assert re.search(rf"^ok    address 127.0.0.1:{port}  +free$", capsys.readouterr().out, re.MULTILINE)
    with SteeringGroup.open((host, port), 2) as group:
        assert group.addresses == ((host, port),)


def test_a_taken_port_names_who_has_it(holder: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    port = holder.getsockname()[1]
    name = Path("/proc/self/comm").read_text().strip()
    assert main(["check", "--bind", f"127.0.0.1:{port}", "--json"]) == 1
    probe = json.loads(capsys.readouterr().out)["probes"][-1]
    assert (probe["name"], probe["ok"]) == (f"address 127.0.0.1:{port}", False)
    who = f"{name} (pid {os.getpid()}, uid {os.geteuid()}) on 127.0.0.1:{port}"
    assert probe["detail"] == f"taken; on the port: {who}"
    assert probe["remedy"] == f"shell: ss -ulpn 'sport = :{port}'"


def test_a_running_group_is_named_with_its_sockets(any_mode: SteeringMode) -> None:
    workers = 1 if any_mode is SteeringMode.SINGLE else 3
    with SteeringGroup.open("127.0.0.1:0", workers, mode=any_mode) as group:
        port = group.addresses[0][1]
        probe = run_checks(group.addresses).probes[-1]
    count = {1: "", 3: " (3 sockets)", 4: " (4 sockets)"}[workers + any_mode.steers]  # the sink too
    assert probe.ok is False
    assert probe.detail.endswith(f"(pid {os.getpid()}, uid {os.geteuid()}) on 127.0.0.1:{port}{count}")


def test_a_wildcard_and_a_specific_socket_are_both_named(holder: socket.socket) -> None:
    """Whoever asks for one of them meets the other."""
    port = holder.getsockname()[1]
    probe = run_checks(f"0.0.0.0:{port}").probes[-1]
    assert probe.ok is False
    assert f"on 127.0.0.1:{port}" in probe.detail
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as wildcard,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as specific,
    ):
        for sock in (wildcard, specific):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        wildcard.bind(("0.0.0.0", 0))
        port = wildcard.getsockname()[1]
        specific.bind(("127.0.0.1", port))
        probe = run_checks(f"127.0.0.2:{port}").probes[-1]
    assert probe.ok is False
    assert f"on 0.0.0.0:{port}" in probe.detail
    assert f"on 127.0.0.1:{port}" in probe.detail
    assert probe.detail.endswith("go there, not to the wildcard")


def test_a_socket_on_another_address_does_not_take_the_port(holder: socket.socket) -> None:
    port = holder.getsockname()[1]
    report = run_checks(f"127.0.0.2:{port}")
    assert report.probes[-1].ok is True
    assert report.probes[-1].detail.endswith(f"(pid {os.getpid()}, uid {os.geteuid()}) on 127.0.0.1:{port}")
    assert exit_status(report) == 0


def test_an_address_of_another_host_cannot_be_had() -> None:
    probe = run_checks("192.0.2.1:4433").probes[-1]  # TEST-NET-1 (RFC 5737)
    assert (probe.ok, probe.remedy) == (False, "shell: ip address")
    assert probe.detail == "bind: Cannot assign requested address"


def test_several_addresses_have_a_probe_each(holder: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    taken = f"127.0.0.1:{holder.getsockname()[1]}"
    assert main(["check", "--bind", "127.0.0.1:0", "--bind", taken]) == 1
    assert ADDRESS_LINE.findall(capsys.readouterr().out) == ["ok", "no"]


def test_a_check_leaves_nothing_behind() -> None:
    run_checks("127.0.0.1:0")
    before = open_descriptors()
    run_checks("127.0.0.1:0")
    assert open_descriptors() == before


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
    ids=["terminal", "NO_COLOR", "NO_COLOR empty", "dumb"],
)
def test_colour_is_for_terminals(variables: dict[str, str], coloured: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm", **variables}
    ours, theirs = os.openpty()
    with subprocess.Popen([sys.executable, "-m", "quicsteer", "check"], stdout=theirs, env=environment, cwd="/"):
        os.close(theirs)
        text = b"".join(iter(functools.partial(read_terminal, ours), b""))
    os.close(ours)
    assert (b"\033[32mok\033[0m    Linux" in text) is coloured
    assert (b"\033" in text) is coloured


def read_terminal(fd: int) -> bytes:
    """Read from a terminal; nothing when the last process has closed it."""
    try:
        return os.read(fd, 65536)
    except OSError:
        return b""
