"""A worker's slots in another process or thread: fork, multiprocessing, exec."""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from handover import report, report_to
from steer import arrivals, long_header, open_descriptors, receive_all, short_header

import quicsteer
from quicsteer import QuicSteerError, SteeringGroup, SteeringMode, Worker

SUPPORT = Path(__file__).parent.parent / "support"


def feed(group: SteeringGroup, count: int = 3) -> None:
    """Send every worker some datagrams that carry its connection IDs."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for worker in group.workers:
            for _ in range(count):
                client.sendto(short_header(worker.connection_ids.issue()), group.addresses[0])


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
def test_a_worker_travels_to_a_process(steering_mode: SteeringMode, method: str, split: bool) -> None:
    context: Any = multiprocessing.get_context(method)
    with SteeringGroup.open("127.0.0.1:0", 3, split=split, mode=steering_mode) as group:
        feed(group)
        reports = []
        for worker in group.workers:
            ours, theirs = context.Pipe()
            process = context.Process(target=report_to, args=(theirs, worker))
            process.start()
            reports.append(ours.recv())
            process.join()
            assert process.exitcode == 0
        assert [entry["index"] for entry in reports] == [0, 1, 2]
        assert [entry["slot"] for entry in reports] == [worker.slot for worker in group.workers]
        assert [entry["received"] for entry in reports] == [3, 3, 3]
        assert [group.workers[0].connection_ids.slot_of(entry["cid"]) for entry in reports] == [
            worker.slot for worker in group.workers
        ]
        assert {entry["token_secret"] for entry in reports} == {group.workers[0].token_secret}
        assert not any(entry["blocking"] for entry in reports)
        assert [entry["maps"] for entry in reports] == [0, 0, 0], "no worker has the program or its maps"


def test_a_forked_child_keeps_only_its_own_sockets(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 8, split=True, mode=steering_mode) as group:
        inherited = sum("socket:" in entry for entry in open_descriptors()) - 17  # 16 slots and the sink
        answer, report_end = os.pipe()
        if os.fork() == 0:
            seen = report(group.workers[5])
            try:
                _ = group.workers[4].sockets
            except QuicSteerError as error:
                seen["second"] = str(error)
            seen["cid"] = seen["token_secret"] = None
            os.write(report_end, json.dumps(seen).encode())
            os._exit(0)
        os.wait()
        seen = json.loads(os.read(answer, 4096))
        os.close(answer)
        os.close(report_end)
        assert seen["sockets"] == inherited + 2
        assert "serves one worker" in seen["second"]
        feed(group, 1)
        assert arrivals(worker.established[0] for worker in group.workers) == [1] * 8


def test_a_child_that_leaves_the_with_block_closes_nothing_for_the_owner(steering_mode: SteeringMode) -> None:
    group = SteeringGroup.open("127.0.0.1:0", 2, mode=steering_mode)
    with group:
        pid = os.fork()
        if pid == 0:
            group.close()
            os._exit(0)
        os.waitpid(pid, 0)
        feed(group, 1)
        assert arrivals(worker.socket for worker in group.workers) == [1, 1]


def test_threads_serve_workers_side_by_side(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 4, split=True, mode=steering_mode) as group:
        feed(group)
        counts = [0] * 4

        def serve(worker: Worker) -> None:
            with worker:
                counts[worker.index] = len(receive_all(worker.established[0]))

        threads = [threading.Thread(target=serve, args=(worker,)) for worker in group.workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts == [3, 3, 3, 3]
        feed(group, 1)
        assert arrivals(group.worker(index).established[0] for index in range(4)) == [1, 1, 1, 1]


def test_a_worker_is_never_written_to_a_file() -> None:
    with SteeringGroup.open("127.0.0.1:0", 1) as group, pytest.raises(TypeError, match="cannot pickle"):
        pickle.dumps(group.workers[0])


def interpreter() -> tuple[str, dict[str, str]]:
    """An interpreter that uid nobody can execute, and the environment in which it finds quicsteer."""
    package = Path(quicsteer.__file__).parent.parent
    for candidate in (sys.executable, "/usr/bin/python3"):
        environment = {"PYTHONPATH": f"{package}:{SUPPORT}", "PATH": os.environ["PATH"]}
        with contextlib.suppress(OSError):
            done = subprocess.run(
                [candidate, "-c", "import quicsteer"],
                check=False,
                user=65534,
                group=65534,
                extra_groups=[],
                env=environment,
                capture_output=True,
            )
            if done.returncode == 0:
                return candidate, environment
    pytest.fail("uid nobody can execute no interpreter here: install one outside of private directories")


def children() -> str:
    """The pids of this process's children, dead or alive."""
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text()


def run_program(worker: Worker, **options: Any) -> dict[str, Any]:
    """Start the inheriting program and return what it prints."""
    python, environment = interpreter()
    answer, output = os.pipe()
    os.set_inheritable(output, True)
    program = str(SUPPORT / "inheriting.py")
    script = f"import os, runpy; os.dup2({output}, 1); runpy.run_path({program!r}, run_name='__main__')"
    pid = worker.spawn([python, "-c", script], env=environment, **options)
    os.close(output)
    with os.fdopen(answer) as lines:
        text = lines.read()
    assert os.waitpid(pid, 0)[1] == 0, text
    seen: dict[str, Any] = json.loads(text)
    assert seen["variables"]["LISTEN_PID"] == str(pid)
    return seen


@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
def test_a_worker_travels_by_exec_to_a_user_without_privileges(steering_mode: SteeringMode, split: bool) -> None:
    with SteeringGroup.open("127.0.0.1:0", 3, split=split, mode=steering_mode) as group:
        feed(group)
        before = open_descriptors()
        worker = group.worker(1)
        seen = run_program(worker, user="nobody")
        assert open_descriptors() == before
        assert seen["variables"]["LISTEN_FDS"] == ("2" if split else "1")
        assert seen["variables"]["LISTEN_FDNAMES"] == ("established:listener" if split else "established")
        assert seen["left"] == []
        assert seen["again"]
        assert (seen["index"], seen["slot"], seen["mode"]) == (1, worker.slot, steering_mode)
        assert seen["received"] == [3]
        assert worker.connection_ids.slot_of(bytes.fromhex(seen["cid"])) == worker.slot
        assert seen["token_secret"] == worker.token_secret.hex()
        assert seen["reset_token"] == worker.connection_ids.reset_token(bytes(8)).hex()
        assert (seen["uid"], seen["groups"], int(seen["effective"], 16)) == (65534, [], 0)
        assert (seen["child_sockets"], seen["child_memory"]) == (0, 0), "nothing goes on to children"


def test_no_secret_is_shown_anywhere(steering_mode: SteeringMode) -> None:
    key = bytes.fromhex("8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c3d")
    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode, key=key) as group:
        worker = group.workers[0]
        secrets = [key, worker.token_secret]
        seen = run_program(worker, user="nobody")
        shown = [
            seen["environment"],
            seen["command_line"],
            seen["repr"],
            repr(group),
            repr(worker),
            repr(worker.connection_ids),
            repr(group._options.rules()),
            repr(group.stats()),
            str(vars(worker)),
        ]
        for text in shown:
            for secret in secrets:
                assert secret.hex() not in text
                assert repr(secret)[2:-1] not in text


def test_generations_of_a_slot_count_in_ranges_of_their_own(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=steering_mode) as group:
        generations = [group.worker(0) for _ in range(5)]
        issued = [worker.connection_ids.issue() for worker in generations for _ in range(2000)]
        assert len(set(issued)) == len(issued)


def test_a_new_connection_reaches_the_listener_of_an_inherited_worker(steering_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, split=True, mode=steering_mode) as group:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(long_header(os.urandom(8)), group.addresses[0])
        seen = run_program(group.workers[0])
        assert (seen["received"], seen["listeners"]) == ([0], [1])


@pytest.mark.parametrize(
    ("command", "options", "kind", "text"),
    [
        ([], {}, ValueError, "empty"),
        (["/nonexistent/program"], {}, quicsteer.KernelError, "execve: No such file"),
        (["/etc/passwd"], {}, quicsteer.KernelError, "execve: Permission denied"),
        (["true"], {"user": "no-such-user"}, ValueError, "no-such-user"),
        (["true"], {"ignored_signals": [signal.SIGINT, 64]}, ValueError, "ignored_signals has 64"),
        (["true"], {"ignored_signals": [0]}, ValueError, "ignored_signals has 0"),
    ],
)
def test_a_program_that_cannot_start_is_reported(
    command: list[str], options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1) as group:
        before, children_before = open_descriptors(), children()
        with pytest.raises(kind, match=text):
            group.workers[0].spawn(command, **options)
        assert open_descriptors() == before
        assert children() == children_before


def test_a_program_finds_signals_ignored_as_it_was_told_to() -> None:
    script = """
import signal
ignored = [number for number in range(1, 64) if signal.getsignal(number) is signal.SIG_IGN]
assert ignored == [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ], ignored  # the last two: CPython
"""
    python, environment = interpreter()
    again = [signal.SIGINT, signal.SIGHUP, signal.SIGINT]
    with SteeringGroup.open("127.0.0.1:0", 1) as group:
        pid = group.workers[0].spawn([python, "-c", script], env=environment, ignored_signals=again)
        assert os.waitpid(pid, 0)[1] == 0


def test_nothing_inherited_is_none_and_nonsense_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUICSTEER_FD", raising=False)
    assert Worker.inherited() is None
    for variables, text in (
        ({"QUICSTEER_FD": "5", "LISTEN_PID": "1"}, "LISTEN_PID is '1'"),
        ({"QUICSTEER_FD": "x", "LISTEN_PID": str(os.getpid())}, "'x'"),
        ({"QUICSTEER_FD": "9999", "LISTEN_PID": str(os.getpid())}, "9999"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(QuicSteerError, match=text):
            Worker.inherited()
        assert "QUICSTEER_FD" not in os.environ
