"""``quicsteer run`` as operators meet it: signals, service manager, control socket, privileges, statuses."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import privileges
import pytest
from load import SHORT, clients
from privileges import NOBODY
from quic import TIMEOUT, Client, connected
from service import Service, children_of, echo, echo_command, program, service

from quicsteer import SteeringMode, Worker
from quicsteer import control as control_module
from quicsteer.control import find_socket
from quicsteer.errors import QuicSteerError

OLD = "ended with status 0"
SLEEP = ["sleep", "1000"]

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


def quicsteer(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quicsteer", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd="/",
    )


async def echo_once(address: tuple[str, int]) -> int:
    async with connected(address) as client:
        return await client.exchange()


# Service manager


def test_the_service_manager_hears_what_the_service_does(steering_mode: SteeringMode) -> None:
    with program("--workers", "2", "--mode", steering_mode, environment={"WATCHDOG_USEC": "400000"}) as running:
        manager = running.manager
        ready = manager.wait_for("READY=1")
        assert f"STATUS=2 workers serve in mode {steering_mode}" in manager.messages[ready - 1]
        manager.wait_for("WATCHDOG=1", after=manager.wait_for("WATCHDOG=1"))
        start = time.monotonic()
        running.kill(signal.SIGHUP)
        begun = manager.wait_for("RELOADING=1", after=ready)
        [stamp] = [line for line in manager.messages[begun - 1] if line.startswith("MONOTONIC_USEC=")]
        assert int(stamp.partition("=")[2]) >= start * 1e6
        again = manager.wait_for("READY=1", after=begun)
        print(f"from SIGHUP to serving, with the imports of two workers: {time.monotonic() - start:.2f} s")
        assert "STATUS=2 workers serve" in " ".join(manager.messages[again - 1])
        running.kill(signal.SIGTERM)
        manager.wait_for("STOPPING=1", after=again)
        assert running.wait() == 0
        assert len(manager.said("READY=1")) == 2


def test_a_watchdog_that_is_for_another_process_hears_nothing() -> None:
    environment = {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}
    with program("--workers", "1", "--mode", "single", environment=environment) as running:
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert not running.manager.said("WATCHDOG")


def test_workers_do_not_speak_for_the_service() -> None:
    """Nothing of the service manager is in their environment, and no secret in what others could read."""
    environment = {"WATCHDOG_USEC": "400000000"}
    with program("--workers", "1", environment=environment, command_line=SLEEP, wait=False) as running:
        running.wait_for_log("worker 0 .* started")
        [pid] = running.wait_until(running.children)
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        names = {entry.partition(b"=")[0].decode() for entry in variables}
        assert not names & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "QUICSTEER_UPGRADE_FD"}
        assert {"LISTEN_FDS", "LISTEN_PID", "QUICSTEER_FD"} <= names


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_ends_in_order(number: signal.Signals) -> None:
    """Connections that exist may go on until their end; new ones are not taken."""

    async def main(running: Service) -> None:
        async with connected(running.address) as client:
            await client.exchange()
            if number == signal.SIGINT:  # a terminal sends it to all processes
                for pid in running.children():
                    os.kill(pid, number)
            running.kill(number)
            await asyncio.to_thread(running.manager.wait_for, "STOPPING=1")
            await asyncio.to_thread(running.wait_for_workers, lambda workers: len(workers) == 1)
            await client.change_port()
            await client.exchange()

    with program("--workers", "2", "--drain-timeout", "forever") as running:
        asyncio.run(main(running))
        assert running.wait() == 0
        assert running.endings() == [OLD] * 2
        assert not running.control.exists()


def test_connections_are_closed_when_a_service_has_to_end() -> None:
    async def main(running: Service) -> None:
        client = Client()
        await client.connect(running.address)
        await client.exchange()
        running.kill(signal.SIGTERM)
        await asyncio.wait_for(client.protocol.wait_closed(), TIMEOUT)
        client.drop()

    with program("--workers", "2", "--drain-timeout", "1") as running:
        asyncio.run(main(running))
        assert running.wait() == 0
        assert running.endings() == [OLD] * 2


def test_a_second_signal_ends_a_service_at_once() -> None:
    async def main(running: Service) -> None:
        async with connected(running.address) as client:
            await client.exchange()
            running.kill(signal.SIGTERM)
            await asyncio.to_thread(running.wait_for_workers, lambda workers: len(workers) == 1)
            running.kill(signal.SIGTERM)
            assert await asyncio.to_thread(running.wait) == 0

    with program("--workers", "2", "--drain-timeout", "forever") as running:
        asyncio.run(main(running))
        assert Counter(running.endings()) == {OLD: 1, "was ended by SIGKILL": 1}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGWINCH])
def test_signals_for_the_workers_go_on_to_them(number: signal.Signals, tmp_path: Path) -> None:
    async def serve(worker: Worker) -> None:
        heard = tmp_path / str(worker.index)
        asyncio.get_running_loop().add_signal_handler(number, heard.touch)
        await echo(worker)

    with service("--workers", "3", serve=serve) as running:
        running.kill(number)
        running.wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
        assert running.describe()["restarts"] == 0


def test_signals_while_the_workers_start_do_no_harm(tmp_path: Path) -> None:
    go = tmp_path / "go"

    async def serve(worker: Worker) -> None:
        while not go.exists():
            await asyncio.sleep(0.01)
        await echo(worker)

    with service("--workers", "2", serve=serve, wait=False) as running:
        running.wait_for_log("worker 1 .* started")
        running.kill(signal.SIGHUP)
        running.wait_for_log("reload failed: workers are starting")
        running.kill(signal.SIGUSR2)
        running.wait_for_log("upgrade refused, this supervisor goes on: workers are starting")
        go.touch()
        running.manager.wait_for("STATUS=2 workers serve")
        go.unlink()
        assert running.describe()["restarts"] == 0
    with service("--workers", "2", serve=serve, wait=False) as running:
        running.wait_for_log("worker 1 .* started")
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert not running.manager.said("READY=1")


def test_a_program_without_quicsteer_counts_as_ready_after_a_while() -> None:
    with program("--workers", "2", "--mute-after", "0.5", command_line=SLEEP) as running:
        assert len(re.findall("taken for a program without quicsteer", running.log)) == 2
        before = running.workers("serving")
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert len(before) == 2
        assert running.endings() == ["was ended by SIGTERM"] * 2


# Upgrade


def is_upgraded(running: Service) -> bool:
    return b"QUICSTEER_UPGRADE_FD=" in Path(f"/proc/{running.pid}/environ").read_bytes()


def upgrade(running: Service) -> None:
    done = "upgraded: this program goes on with"
    before = len(re.findall(done, running.log))
    running.kill(signal.SIGUSR2)
    running.wait_for_log(done, before + 1)


def test_an_upgrade_of_the_supervisor_disturbs_nobody(steering_mode: SteeringMode) -> None:
    async def main(running: Service) -> None:
        async with clients(running.address, (24, SHORT)) as load:
            before = running.workers("serving")
            for _ in range(3):
                await asyncio.to_thread(upgrade, running)
                assert running.workers("serving") == before
            assert is_upgraded(running)
            await asyncio.to_thread(running.reload)
            await asyncio.to_thread(running.reload)
            assert not set(running.workers("serving").values()) & set(before.values())
            await asyncio.to_thread(upgrade, running)  # with connections on workers that drain
        print(load)
        assert load.lost == []
        assert load.failed_handshakes == []

    with program("--workers", "2", "--mode", steering_mode) as running:
        descriptors = running.descriptors()
        asyncio.run(main(running))
        assert running.describe()["pid"] == running.pid
        assert running.describe()["reloads"] == 2
        running.wait_for_workers(lambda workers: len(workers) == 2)
        running.wait_until(lambda: running.descriptors() == descriptors)
        slots = running.command("stats")["group"]["slots"]
        assert [slot["parked"] for slot in slots] == [False] * 4 + [True] * 2
        victim = running.workers()[0]
        os.kill(victim, signal.SIGKILL)
        running.wait_until(lambda: running.workers("serving").get(0, victim) != victim)
        running.kill(signal.SIGTERM)
        assert running.wait() == 0
        assert Counter(running.endings()) == {OLD: 6, "was ended by SIGKILL": 1}


@pytest.fixture
def launcher(tmp_path: Path) -> tuple[list[str], Path]:
    """Starts quicsteer, after whatever is written in a file: what a new release may have wrong."""
    change = tmp_path / "change.py"
    script = tmp_path / "launcher.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            from pathlib import Path
            change = Path({str(change)!r})
            if change.exists():
                exec(change.read_text())
            from quicsteer.cli import main
            sys.exit(main())
            """
        )
    )
    return [sys.executable, str(script)], change


REFUSALS = {
    "other state": (
        "import quicsteer.upgrade; quicsteer.upgrade._STATE_VERSION = 99",
        "the new program cannot take over: .*state has version 1, this program reads 99",
    ),
    "broken": ("import quicsteer.no_such_module", "the new program cannot take over: ModuleNotFoundError"),
    "other arguments": (
        "import quicsteer.run; quicsteer.run.add_arguments = lambda parser: None",
        "the new program cannot take over: .*unrecognized arguments",
    ),
    "crash": ("import os; os.abort()", "the new program cannot take over: .*"),
    "hangs": ("import time; time.sleep(1000)", "the new program says nothing for 5 s"),
}


def test_an_upgrade_that_cannot_work_is_refused(launcher: tuple[list[str], Path]) -> None:
    entry, change = launcher
    short = "import quicsteer.upgrade; quicsteer.upgrade.CHECK_TIMEOUT = 5.0"

    async def main(running: Service) -> None:
        async with connected(running.address) as client:
            before = running.workers()
            for text, reason in REFUSALS.values():
                change.write_text(text)
                refused = len(re.findall("upgrade refused", running.log))
                running.kill(signal.SIGUSR2)
                await asyncio.to_thread(running.wait_for_log, "upgrade refused", refused + 1)
                assert re.search(f"upgrade refused, this supervisor goes on: {reason}", running.log)
                assert running.workers() == before
                await client.exchange()
            change.unlink()
            assert not is_upgraded(running)
            await asyncio.to_thread(running.reload)
            await asyncio.to_thread(upgrade, running)
            assert is_upgraded(running)
            await client.exchange()

    change.write_text(short)
    with program("--workers", "2", entry=entry) as running:
        descriptors = running.descriptors()
        asyncio.run(main(running))
        running.wait_for_workers(lambda workers: len(workers) == 2)
        running.wait_until(lambda: running.descriptors() == descriptors)
        assert "Traceback" not in running.log


def test_the_supervisor_goes_on_with_its_work_while_an_upgrade_is_looked_at(launcher: tuple[list[str], Path]) -> None:
    entry, change = launcher
    with program("--workers", "2", entry=entry) as running:
        change.write_text("import time; time.sleep(1000)")
        running.kill(signal.SIGUSR2)
        [child] = running.wait_until(lambda: set(running.children()) - set(running.workers().values()))
        running.kill(signal.SIGUSR2)  # one at a time
        victim = running.workers()[0]
        os.kill(victim, signal.SIGKILL)
        running.wait_until(lambda: running.workers("serving").get(0, victim) != victim)
        assert set(running.children()) == {child, *running.workers().values()}
        os.kill(child, signal.SIGKILL)
        running.wait_for_log("upgrade refused")
        assert len(re.findall("upgrade refused", running.log)) == 1
        running.kill(signal.SIGTERM)
        assert running.wait() == 0


def test_a_service_ends_although_an_upgrade_is_looked_at(launcher: tuple[list[str], Path]) -> None:
    entry, change = launcher
    with program("--workers", "1", entry=entry) as running:
        change.write_text("import time; time.sleep(1000)")
        running.kill(signal.SIGUSR2)
        running.wait_until(lambda: set(running.children()) - set(running.workers().values()))
        running.kill(signal.SIGTERM)
        assert running.wait() == 0


def test_a_worker_that_was_waiting_for_its_next_attempt_is_started_after_an_upgrade(tmp_path: Path) -> None:
    """It is nobody's child at that moment; the new supervisor must know that somebody is missing."""
    broken = tmp_path / "broken"
    script = f"test -e {broken} && exit 1; exec {' '.join(echo_command(tmp_path))}"
    with program("--workers", "2", command_line=["sh", "-c", script]) as running:
        broken.touch()
        victim = running.workers()[1]
        os.kill(victim, signal.SIGKILL)
        running.wait_for_log("worker 1 died 5 times in a row: next start in 0.8 s")
        upgrade(running)
        broken.unlink()
        running.wait_until(lambda: 1 in running.workers("serving"))
        assert asyncio.run(echo_once(running.address)) in (0, 1)


# A container's first process


@as_root
def test_as_the_first_process_it_reaps_orphans_and_ends_in_order(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed (Debian: util-linux)")
    # Each worker leaves three orphans behind, which end at different times.
    orphans = "for i in 1 2 3; do (sleep 0.$i &); done"
    script = f"{orphans}; exec {' '.join(echo_command(tmp_path))}"
    entry = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "quicsteer"]
    with program("--workers", "2", entry=entry, command_line=["sh", "-c", script]) as running:
        [first] = running.children()
        assert running.describe()["pid"] == 1
        pidfd = os.pidfd_open(first)
        try:
            running.wait_until(lambda: len(children_of(first)) == 2)
            assert asyncio.run(echo_once(running.address)) in (0, 1)
            running.reload()
            signal.pidfd_send_signal(pidfd, signal.SIGUSR2)
            running.wait_for_log("upgraded: this program goes on with")
            running.wait_for_workers(lambda workers: len(workers) == 2)
            running.wait_until(lambda: len(children_of(first)) == 2)
            for pid in children_of(first):
                os.kill(pid, signal.SIGKILL)
            running.wait_until(lambda: running.describe()["restarts"] == 2 and len(running.workers("serving")) == 2)
            running.wait_until(lambda: len(children_of(first)) == 2)
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)
        assert running.wait() == 0


# Privileges


@as_root
@pytest.mark.parametrize("arguments", [["--user", "nobody"], ["--user", "nobody", "--group", "daemon"]], ids=" ".join)
def test_workers_run_as_another_user_without_capabilities(arguments: list[str]) -> None:
    import grp
    import pwd

    entry = pwd.getpwnam("nobody")
    gid = grp.getgrnam("daemon").gr_gid if "daemon" in arguments else entry.pw_gid
    with program("--workers", "2", *arguments, command_line=SLEEP, wait=False) as running:
        running.wait_for_log("worker 1 .* started")
        for pid in running.children():
            status = dict(
                line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
            )
            assert status["Uid"].split() == [str(entry.pw_uid)] * 4
            assert status["Gid"].split() == [str(gid)] * 4
            assert status["Groups"].strip() == ""
            for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(status[kind], 16) == 0
        running.kill(signal.SIGTERM)
        assert running.wait() == 0


WHO_MAY = "only root and the supervisor's own user may command it"

ASK = """
import json, socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    try:
        sock.connect({path!r})
    except OSError as error:
        print(json.dumps(str(error)))
    else:
        sock.sendall(b'{{"command": "reload"}}\\n')
        print(json.dumps(json.loads(sock.makefile().readline())))
"""


@as_root
def test_only_root_and_the_own_user_may_command() -> None:
    with service("--workers", "1") as running:
        source = ASK.format(path=str(running.control))
        assert running.control.stat().st_mode & 0o777 == 0o600
        answer = privileges.run_as(source, uid=NOBODY, imports=("json", "socket"))
        assert "Permission denied" in answer
        running.control.chmod(0o666)
        answer = privileges.run_as(source, uid=NOBODY, imports=("json", "socket"))
        assert answer == {"ok": False, "error": f"the request is refused: {WHO_MAY}"}
        assert running.describe()["reloads"] == 0
    with service("--workers", "1", "--mode", "cbpf", uid=NOBODY) as running:
        assert running.reload()["ok"]


# Control socket


@pytest.mark.parametrize(
    ("request_line", "error"),
    [
        (b"\n", "the request is refused"),
        (b"[]\n", "the request is refused: it is no JSON object"),
        (b"\xff\n", "the request is refused"),
        (b"x" * 100_000 + b"\n", "the request is refused"),
        (b"{}\n", "the request is refused: it has no command"),
        (b'{"command": "explode"}\n', "'explode' is not known to this release"),
        (b'{"command": "reload", "workers": "2"}\n', "workers is '2', it must be an integer"),
        (b'{"command": "dispatch"}\n', "dispatch takes weights by index"),
        (b'{"command": "dispatch", "weights": {"x": 1}}\n', "invalid literal"),
        (b'{"command": "dispatch", "weights": {"0": "1"}}\n', "weight of worker 0 is '1'"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(any_request: Service, request_line: bytes, error: str) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(str(any_request.control))
        sock.sendall(request_line)
        [answer] = map(json.loads, sock.makefile().read().splitlines())
    assert answer["ok"] is False
    assert error in answer["error"]
    assert any_request.describe()["ok"]
    assert "Traceback" not in any_request.log


@pytest.fixture(scope="module")
def any_request() -> Any:
    with service("--workers", "1") as running:
        yield running


def test_a_control_socket_that_nobody_serves_is_replaced(tmp_path: Path) -> None:
    control = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(control))
    with program("--workers", "1", control=control) as running:
        assert running.describe()["ok"]
        with program("--workers", "1", control=control, wait=False) as second:
            assert second.wait() == 2
            assert f"another process serves {control}" in second.log
        assert running.describe()["ok"]


def test_a_command_finds_the_only_supervisor_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was killed has left its socket."""
    monkeypatch.setattr(control_module, "default_directory", lambda: tmp_path)
    with pytest.raises(QuicSteerError, match="no control socket in"):
        find_socket(None)
    paths = [tmp_path / f"{number}.sock" for number in range(3)]
    sockets = [socket.socket(socket.AF_UNIX) for _ in paths]
    for path, sock in zip(paths, sockets, strict=True):
        sock.bind(str(path))
    sockets[1].listen()
    assert find_socket(None) == paths[1]
    sockets[2].listen()
    with pytest.raises(QuicSteerError, match=r"several supervisors run: name one of .*1\.sock, .*2\.sock"):
        find_socket(None)
    for sock in sockets:
        sock.close()
    assert find_socket("elsewhere") == Path("elsewhere")


def test_a_file_in_the_place_of_the_control_socket_is_kept(tmp_path: Path) -> None:
    control = tmp_path / "precious"
    control.write_text("precious")
    with program("--workers", "1", control=control, wait=False) as running:
        assert running.wait() == 2
        assert f"{control} is no socket" in running.log
    assert control.read_text() == "precious"


@as_root
def test_a_control_socket_does_not_lie_where_others_could_replace_it(tmp_path: Path) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    with program("--workers", "1", control=directory / "control", wait=False) as running:
        assert running.wait() == 2
        assert f"directory {directory} can be written to by others" in running.log


# Commands


def test_the_reload_command(steering_mode: SteeringMode) -> None:
    with service("--workers", "2", "--capacity", "3", "--mode", steering_mode) as running:
        before = running.workers()
        done = quicsteer("reload", str(running.control))
        assert (done.returncode, done.stdout) == (0, "reloaded: 2 workers serve\n")
        assert not set(running.workers("serving").values()) & set(before.values())
        done = quicsteer("reload", str(running.control), "--workers", "3")
        assert (done.returncode, done.stdout) == (0, "reloaded: 3 workers serve\n")
        done = quicsteer("reload", str(running.control), "--workers", "4")
        assert done.returncode == 2
        assert done.stderr == "quicsteer: workers is 4, the group has room for 1 to 3\n"
    done = quicsteer("reload", str(running.control))
    assert done.returncode == 2
    assert done.stderr.startswith(f"quicsteer: no supervisor answers at {running.control}")


def test_the_dispatch_command_drains_a_worker(ebpf: SteeringMode) -> None:
    async def answered_by(address: tuple[str, int]) -> set[int]:
        return {await echo_once(address) for _ in range(16)}

    with service("--workers", "2", "--mode", ebpf) as running:
        done = quicsteer("dispatch", "--control", str(running.control), "0=0")
        assert (done.returncode, done.stderr) == (0, "")
        assert asyncio.run(answered_by(running.address)) == {1}
        done = quicsteer("dispatch", "--control", str(running.control))
        assert (done.returncode, done.stderr) == (0, "")
        assert asyncio.run(answered_by(running.address)) == {0, 1}
        for weights, error in (
            (["0=0", "1=0"], "all weights are 0"),
            (["2=1"], "index is 2"),
            (["x"], "is not INDEX="),
        ):
            done = quicsteer("dispatch", "--control", str(running.control), *weights)
            assert done.returncode == 2
            assert error in done.stderr


def test_dispatch_is_by_worker_however_many_there_are(ebpf: SteeringMode) -> None:
    """With fewer workers than listeners some workers read several."""

    async def answered_by(address: tuple[str, int]) -> set[int]:
        return {await echo_once(address) for _ in range(24)}

    with service("--workers", "2", "--capacity", "4", "--mode", ebpf) as running:
        running.command("dispatch", weights={"1": 0})
        assert asyncio.run(answered_by(running.address)) == {0}
        running.reload(4)
        assert asyncio.run(answered_by(running.address)) <= {0, 2, 3}
        running.reload(1)
        assert asyncio.run(answered_by(running.address)) == {0}
        running.command("dispatch", weights={"0": 3})
        with pytest.raises(QuicSteerError, match="index is 1, it must be 0 to 0"):
            running.command("dispatch", weights={"1": 0})
        running.reload(3)
        assert asyncio.run(answered_by(running.address)) <= {0, 1, 2}


def test_the_dispatch_command_is_refused_where_the_table_is_fixed() -> None:
    with service("--workers", "2", "--mode", "cbpf") as running:
        done = quicsteer("dispatch", "--control", str(running.control), "0=0")
        assert done.returncode == 2
        assert "the group is in mode cbpf, which has a fixed dispatch table" in done.stderr


# Arguments


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--bind", "127.0.0.1:0"],
        ["--bind", "127.0.0.1:0", "--"],
        ["--bind", "nowhere", "--", "true"],
        ["--bind", "127.0.0.1:99999", "--", "true"],
        ["--bind", "127.0.0.1:0", "--workers", "0", "--", "true"],
        ["--bind", "127.0.0.1:0", "--workers", "-1", "--", "true"],
        ["--bind", "127.0.0.1:0", "--workers", "many", "--", "true"],
        ["--bind", "127.0.0.1:0", "--workers", "2", "--capacity", "1", "--", "true"],
        ["--bind", "127.0.0.1:0", "--capacity", "0", "--", "true"],
        ["--bind", "127.0.0.1:0", "--banks", "0", "--", "true"],
        ["--bind", "127.0.0.1:0", "--mode", "best", "--", "true"],
        ["--bind", "127.0.0.1:0", "--mode", "hash", "--drop-invalid", "--", "true"],
        ["--bind", "127.0.0.1:0", "--mode", "single", "--workers", "2", "--", "true"],
        ["--bind", "127.0.0.1:0", "--drain-timeout", "nan", "--", "true"],
        ["--bind", "127.0.0.1:0", "--drain-timeout", "-1", "--", "true"],
        ["--bind", "127.0.0.1:0", "--ready-timeout", "forever", "--", "true"],
        ["--bind", "127.0.0.1:0", "--hung-after", "soon", "--", "true"],
        ["--bind", "127.0.0.1:0", "--cid-length", "7", "--", "true"],
        ["--bind", "127.0.0.1:0", "--receive-buffer", "0", "--", "true"],
        ["--bind", "127.0.0.1:0", "--user", "no-such-user", "--", "true"],
        ["--bind", "127.0.0.1:0", "--user", "nobody", "--group", "no-such-group", "--", "true"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_end_with_status_2(arguments: list[str], tmp_path: Path) -> None:
    done = quicsteer("run", "--control", str(tmp_path / "control"), *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert re.search(r"^quicsteer( run)?: ", done.stderr, re.M)


def test_the_command_may_have_options_and_dashes_of_its_own(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = ["sh", "-c", f'printf "%s\\n" "$@" > {told}; sleep 1000', "name", "--bind", "x", "--", "-v"]
    with program("--workers", "1", command_line=command, wait=False) as running:
        running.wait_until(lambda: told.exists() and told.read_text() == "--bind\nx\n--\n-v\n")


def test_one_worker_is_the_default_where_only_one_can_be() -> None:
    with program("--mode", "single") as running:
        assert set(running.workers("serving")) == {0}
        assert asyncio.run(echo_once(running.address)) == 0
