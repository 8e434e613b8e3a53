"""``quicsteer stats`` on the sockets of any process, and whether something was dropped since the last look."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from privileges import NOBODY, CannotBecome, run_as
from readouts import overflow
from service import service

from quicsteer import SteeringGroup, cli, control, stats
from quicsteer.sockdiag import read_port

MANY = 1000


@pytest.fixture(autouse=True)
def private_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command keeps what it saw last."""
    directory = tmp_path / "quicsteer"
    monkeypatch.setattr(stats, "default_directory", lambda: directory)
    return directory


@pytest.fixture
def group() -> Iterator[SteeringGroup]:
    with SteeringGroup.open("127.0.0.1:0", 2, mode="cbpf", receive_buffer=20_000) as opened:
        yield opened


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = cli.main(["stats", *arguments])
    return status, capsys.readouterr().out


def test_the_sockets_on_a_port_are_shown_with_their_drops(
    group: SteeringGroup, client: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    overflow(group, group.workers[1], MANY, client)
    target = f"127.0.0.1:{group.addresses[0][1]}"
    status, text = run(capsys, target)
    assert status == 0
    assert text.startswith(f"{target}  3 sockets  dropped 1,000\n")
    assert f"{os.getpid()} " in text
    assert f"3 sockets share {target}: a group" in text
    assert "dropped 1,000 datagrams: its buffer of 40,000 bytes" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80

    _, text = run(capsys, target, "--json")
    shown = json.loads(text)
    assert list(shown) == ["schema", "target", "time", "dropped", "sockets", "advice"]
    assert [sock["dropped"] for sock in shown["sockets"]] == [0, MANY, 0]
    documented = (Path(__file__).parents[2] / "docs" / "stats.md").read_text()
    assert [key for key in {*shown, *shown["sockets"][0]} if f"`{key}`" not in documented] == []

    _, text = run(capsys, target, "--prometheus")
    inode = read_port(group.addresses[0][1])[1].inode
    assert f'dropped_total{{address="{target}",inode="{inode}",uid="{os.geteuid()}"}} 1000' in text


def test_a_wildcard_shows_all_hosts_and_an_address_those_that_serve_it(capsys: pytest.CaptureFixture[str]) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode="hash") as group:
        port = group.addresses[0][1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.2", port))
            for target, count in (
                (f"127.0.0.1:{port}", 1),
                (f"127.0.0.2:{port}", 1),
                (f"*:{port}", 2),
                (f":{port}", 2),
            ):
                _, text = run(capsys, target, "--json")
                assert len(json.loads(text)["sockets"]) == count
            _, text = run(capsys, f"0.0.0.0:{port}")
            assert "2 sockets" in text


def test_the_exit_status_says_whether_something_was_dropped_since_the_last_look(
    group: SteeringGroup, client: socket.socket, capsys: pytest.CaptureFixture[str], private_directory: Path
) -> None:
    ask = (f"127.0.0.1:{group.addresses[0][1]}", "--fail-on-drops")
    assert run(capsys, *ask)[0] == 0
    overflow(group, group.workers[0], 1, client)
    assert run(capsys, *ask)[0] == 1
    assert run(capsys, *ask)[0] == 0
    overflow(group, group.workers[0], 1, client)
    assert run(capsys, ask[0])[0] == 0  # who does not ask takes nothing away
    assert run(capsys, *ask, "--json")[0] == 1
    [saved] = private_directory.iterdir()
    assert saved.stat().st_mode & 0o077 == 0
    saved.write_text("[]")  # as good as none: counts from the start
    assert run(capsys, *ask)[0] == 1
    assert run(capsys, *ask)[0] == 0


def test_a_service_that_started_anew_counts_anew(
    capsys: pytest.CaptureFixture[str], client: socket.socket, private_directory: Path
) -> None:
    directory = private_directory.parent
    for _ in range(2):
        with service("--workers", "1", "--receive-buffer", "20000") as running:
            link = directory / "control.sock"
            link.unlink(missing_ok=True)
            link.symlink_to(running.control)
            pid = running.workers()[0]
            os.kill(pid, signal.SIGSTOP)
            for _ in range(200):
                client.sendto(b"\xc0\0\0\0\1\x08" + bytes(1200), running.address)
            assert run(capsys, str(link), "--fail-on-drops")[0] == 1
            assert run(capsys, str(link), "--fail-on-drops")[0] == 0
            os.kill(pid, signal.SIGCONT)


def test_a_directory_that_others_may_write_to_is_refused(
    group: SteeringGroup, private_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    private_directory.mkdir()
    private_directory.chmod(0o777)
    assert run(capsys, f"127.0.0.1:{group.addresses[0][1]}", "--fail-on-drops")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--watch", "--prometheus", "127.0.0.1:9"], "does not go with"),
        (["--watch", "0", "127.0.0.1:9"], "too short"),
        (["--watch", "soon", "127.0.0.1:9"], "not a number"),
        (["nonsense"], "'host:port'"),
        (["pid:nonsense"], "pid:N"),
    ],
)
def test_wrong_arguments_are_explained(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stats", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_watch_without_a_terminal_gives_a_line_of_json_each_time(group: SteeringGroup) -> None:
    command = [sys.executable, "-m", "quicsteer", "stats", "--json", "--watch", "0.1"]
    target = f"127.0.0.1:{group.addresses[0][1]}"
    with subprocess.Popen([*command, target], stdout=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout
        times = [json.loads(process.stdout.readline())["time"] for _ in range(3)]
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    assert times == sorted(set(times))


def test_the_only_service_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "default_directory", lambda: tmp_path)
    with service("--workers", "1") as running:
        (tmp_path / "4433.sock").symlink_to(running.control)
        assert stats.find_source(None)().title == f"127.0.0.1:{running.address[1]}"


def test_without_privilege_the_figures_are_the_same_but_not_the_names(
    group: SteeringGroup, client: socket.socket
) -> None:
    overflow(group, group.workers[1], MANY, client)
    port = group.addresses[0][1]
    source = f"""
        import json
        from quicsteer.sockdiag import read_port
        print(json.dumps([[sock.dropped, sock.uid, list(sock.processes)] for sock in read_port({port})]))
    """
    try:
        seen = run_as(source, uid=NOBODY, capabilities=(), imports=("quicsteer.sockdiag", *_pyroute2_modules()))
    except CannotBecome as error:
        pytest.skip(str(error))
    assert seen == [[0, os.geteuid(), []], [MANY, os.geteuid(), []], [0, os.geteuid(), []]]


def _pyroute2_modules() -> tuple[str, ...]:
    return ("pyroute2", "pyroute2.netlink.diag", "pyroute2.netlink.exceptions")


def test_a_snapshot_of_sockets_can_be_pickled(group: SteeringGroup) -> None:
    found = read_port(group.addresses[0][1])
    assert pickle.loads(pickle.dumps(found)) == found
