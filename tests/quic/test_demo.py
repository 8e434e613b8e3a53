"""``quicsteer demo``: real servers and clients, as root and as nobody."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import privileges
import pytest

from quicsteer import SteeringMode, demo

SCRIPT = """
import argparse, json, sys
from quicsteer import demo
parser = argparse.ArgumentParser()
demo.add_arguments(parser)
sys.exit(demo.run(parser.parse_args(sys.argv[1:])))
"""

LATE_IMPORTS = [
    "quicsteer.demo",
    "quicsteer.aioquic",
    "cryptography.hazmat.primitives.asymmetric.ec",
    "cryptography.hazmat.primitives.serialization",
    "cryptography.x509",
    "multiprocessing.connection",
    "multiprocessing.popen_fork",
]

OUTCOMES = ["routed", "dispatched", "unroutable", "malformed"]


def run_demo(*arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd="/")


def by_mode(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {result["mode"]: result for result in document["modes"]}


def test_every_connection_survives_where_it_is_steered(steering_mode: SteeringMode) -> None:
    ended = run_demo("--connections", "24", "--json", "--mode", str(steering_mode))
    assert ended.returncode == 0, ended.stderr
    document = json.loads(ended.stdout)
    assert (document["workers"], document["changes"]) == (4, 3)
    [result] = document["modes"]
    assert (result["mode"], result["available"], result["connections"]) == (str(steering_mode), True, 24)
    assert (result["survived"], result["same_worker"], result["dropped"]) == (24, 24, 0)
    assert sum(result["connections_by_worker"].values()) == 24
    if steering_mode is SteeringMode.EBPF:
        assert result["outcomes"]["routed"] >= 24 * 4
        assert result["outcomes"]["dispatched"] >= 24
        assert (result["outcomes"]["unroutable"], result["outcomes"]["malformed"]) == (0, 0)
    else:
        assert result["outcomes"] == dict.fromkeys(OUTCOMES)


def test_a_whole_run_compares_all_modes_and_ends_with_a_sentence() -> None:
    ended = run_demo("--connections", "24")
    lines = ended.stdout.splitlines()
    assert lines[0].split() == ["mode", "connections", "survived", "same", "worker", *OUTCOMES, "dropped"]
    assert [line.split()[0] for line in lines[1:4]] == ["hash", "cbpf", "ebpf"]
    assert lines[4] == ""
    assert lines[5].startswith("Of 24 connections with 3 port changes each, these survived: ")
    assert len(lines) == 6
    assert int(lines[1].split()[2]) < 24
    assert "hash: 24 connected, 0 of 24 done, 0 lost" in ended.stderr


def test_a_user_without_privileges_sees_classic_steering_and_why_not_more() -> None:
    source = """
        import argparse, contextlib, io, json
        from quicsteer import demo
        parser = argparse.ArgumentParser()
        demo.add_arguments(parser)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = demo.run(parser.parse_args(["--connections", "24", "--json"]))
        print(json.dumps({"status": status, **json.loads(output.getvalue())}))
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become nobody")
    document = privileges.run_as(source, uid=privileges.NOBODY, imports=LATE_IMPORTS)
    results = by_mode(document)
    assert document["status"] == 0
    assert (results["cbpf"]["survived"], results["cbpf"]["same_worker"]) == (24, 24)
    assert results["ebpf"]["available"] is False
    assert "CAP_BPF is missing" in results["ebpf"]["reason"]


def test_an_interrupt_ends_all_processes() -> None:
    command = [sys.executable, "-c", SCRIPT, "--connections", "24", "--mode", "hash"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stderr
        assert process.stderr.readline() == "hash: 24 connected, 0 of 24 done, 0 lost\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 4
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
        assert process.wait(timeout=60) == 130
    assert not any(Path(f"/proc/{child}").exists() for child in children)


@pytest.mark.parametrize("arguments", [["--connections", "0"], ["--workers", "-1"], ["--mode", "single"]])
def test_wrong_arguments_are_refused(arguments: list[str]) -> None:
    ended = run_demo(*arguments)
    assert ended.returncode == 2
    assert arguments[0] in ended.stderr


def result(mode: SteeringMode, survived: int = 10, reason: str = "") -> demo.ModeResult:
    outcomes = dict.fromkeys(OUTCOMES, 7 if mode is SteeringMode.EBPF else None)
    made = demo.ModeResult(mode, 10, reason=reason, survived=survived, same_worker=survived, dropped=0)
    made.outcomes.update(outcomes)
    return made


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([result(SteeringMode.HASH, 1), result(SteeringMode.CBPF), result(SteeringMode.EBPF)], 0),
        ([result(SteeringMode.HASH, 1), result(SteeringMode.CBPF), result(SteeringMode.EBPF, 0, "no")], 0),
        ([result(SteeringMode.HASH, 1), result(SteeringMode.CBPF, 9), result(SteeringMode.EBPF)], 1),
        ([result(SteeringMode.HASH, 1), result(SteeringMode.CBPF, 0, "no"), result(SteeringMode.EBPF, 0, "no")], 1),
        ([result(SteeringMode.EBPF, 0, "no")], 1),
        ([result(SteeringMode.HASH, 1)], 0),
    ],
)
def test_the_status_says_whether_every_steered_connection_survived(results: list[demo.ModeResult], status: int) -> None:
    assert demo.exit_status(results) == status


def test_the_table_says_what_is_not_known_and_what_is_not_available() -> None:
    results = [result(SteeringMode.HASH, 1), result(SteeringMode.CBPF), result(SteeringMode.EBPF, 0, "no CAP_BPF")]
    rows = [line.split() for line in demo.format_table(results).splitlines()]
    assert rows[1:] == [
        ["hash", "10", "1", "1", "-", "-", "-", "-", "0"],
        ["cbpf", "10", "10", "10", "-", "-", "-", "-", "0"],
        ["ebpf", "not", "available:", "no", "CAP_BPF"],
    ]
    sentence = demo.summarize(results, 1)
    assert (
        sentence == "Of 10 connections with one port change each, these survived: 1 in mode hash and 10 in mode cbpf."
    )


def test_the_arguments_have_the_defaults_of_the_documentation() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert vars(parser.parse_args([])) == {"connections": 100, "workers": 4, "changes": 3, "mode": None, "json": False}
