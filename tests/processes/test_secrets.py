"""The group's key and what follows from it are shown nowhere: not to others, not in what is logged or asked for."""

import asyncio
import contextlib
import io
import json
import logging
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from privileges import NOBODY
from service import Service, program, service

from quicsteer import QuicSteerError, SteeringGroup, SteeringMode, Worker
from quicsteer.cid import GroupKeys
from quicsteer.cli import main

KEY = bytes.fromhex("8a7b6c5d4e3f2a1b0c9d8e7f6a5b4c3d")
KEYS = GroupKeys.from_key(KEY)
SECRETS = (KEYS.steering, KEYS.reset, KEYS.permutation, KEYS.token_secret)


def forms(secret: bytes) -> Iterable[bytes]:
    """What a secret would look like in a text: as bytes, in hexadecimal, as Python shows bytes, as numbers of JSON."""
    yield from (secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode())
    yield ", ".join(map(str, secret)).encode()
    for half in (secret[:8], secret[8:16]):
        for order in ("little", "big"):
            number = int.from_bytes(half, order)
            yield from (str(number).encode(), f"{number:x}".encode())


FORMS = [form for secret in SECRETS for form in forms(secret)]


def assert_silent(*texts: Any) -> None:
    for text in texts:
        data = text if isinstance(text, bytes) else str(text).encode()
        assert not [form for form in FORMS if form in data]


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def shown_of_process(pid: int) -> list[bytes]:
    """What any user can see of a process, and what its own user sees without looking into its memory."""
    names = ("environ", "cmdline", "comm", "maps", "status", "mountinfo", "net/udp", "net/unix")
    texts = [read(f"/proc/{pid}/{name}") for name in names]
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            texts.append(os.readlink(f"/proc/{pid}/fd/{number}").encode())
        texts.append(read(f"/proc/{pid}/fdinfo/{number}"))
    return texts


def test_the_forms_would_be_found() -> None:
    """The proof that the test sees what it looks for."""
    for shown in (KEY.hex(), json.dumps({"key": list(KEY)}), repr({"key": KEY}), int.from_bytes(KEY[:8], "little")):
        with pytest.raises(AssertionError):
            assert_silent(shown)


def test_a_running_service_shows_no_secret(steering_mode: SteeringMode) -> None:
    with service("--workers", "2", "--mode", steering_mode, key=KEY) as running:
        running.reload()
        answers = [running.command(name) for name in ("status", "stats")]
        for pid in (running.pid, *running.workers().values()):
            assert_silent(*shown_of_process(pid))
        refused = []
        for request in ({"workers": "all"}, {"workers": 1000}):
            with pytest.raises(QuicSteerError) as caught:
                running.command("reload", **request)
            refused.append(str(caught.value))
        assert_silent(
            json.dumps(answers),
            *refused,
            *running.progress,
            *(line for message in running.manager.messages for line in message),
            running.log,
        )


def test_the_programs_of_a_service_show_no_secret() -> None:
    """With real programs, which get their state by exec. Their key is random, so its place is looked for."""
    with program("--workers", "1") as running:
        running.reload()
        pids = [running.pid, *running.workers().values()]
        environments = b"".join(read(f"/proc/{pid}/environ") + read(f"/proc/{pid}/cmdline") for pid in pids)
        assert b'"key"' not in environments
        assert not [pid for pid in pids if state_is_open(pid)], "the sealed memory is closed once it was read"


def state_is_open(pid: int) -> bool:
    links = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    return any(link.startswith(("/memfd:quicsteer ", "/memfd:quicsteer-upgrade")) for link in links)


def test_nothing_that_is_printed_shows_a_secret(any_mode: SteeringMode) -> None:
    with warnings.catch_warnings(record=True) as caught, capture_logs() as log:
        warnings.simplefilter("always")
        with SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode, key=KEY, receive_buffer=2**31 - 1) as group:
            worker = group.workers[0]
            things: list[Any] = [group, worker, worker.connection_ids, group._options, worker._state, group.stats()]
            things += [group._options.rules(), group._parts[0].steering]
            things += [group.stats().to_dict(), worker._state.identity]
            shown = [text for thing in things for text in (repr(thing), str(thing), f"{thing}")]
            assert_silent(*shown, log.getvalue(), *(str(each.message) for each in caught))


@contextlib.contextmanager
def capture_logs() -> Any:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger("quicsteer").addHandler(handler)
    try:
        yield text
    finally:
        logging.getLogger("quicsteer").removeHandler(handler)


def failures() -> list[BaseException]:
    """Everything that can go wrong around a key."""
    found: list[BaseException] = []

    def attempt(call: Any) -> None:
        try:
            call()
        except (OSError, ValueError, TypeError, QuicSteerError) as error:
            found.append(error)

    with SteeringGroup.open("127.0.0.1:0", 1, key=KEY) as group:
        worker = group.workers[0]
        attempt(lambda: SteeringGroup.open(group.addresses[0], 1, key=KEY))
        attempt(lambda: SteeringGroup.open("127.0.0.1:0", 1, key=KEY + b"x"))
        attempt(lambda: SteeringGroup.open("127.0.0.1:0", 1, key=KEY.hex()))  # type: ignore[arg-type]
        attempt(lambda: SteeringGroup.open("192.0.2.1:0", 1, key=KEY))
        attempt(lambda: worker.spawn(["/nonexistent"]))
        attempt(lambda: worker.connection_ids(9))
        attempt(lambda: pickle.dumps(worker))
    attempt(lambda: worker.sockets)
    return found


def test_no_error_shows_a_secret() -> None:
    found = failures()
    assert len(found) == 8
    for error in found:
        assert_silent(str(error), repr(error), *traceback.format_exception(error))


def test_a_worker_cannot_be_written_to_a_file_or_sent_by_accident(any_mode: SteeringMode) -> None:
    with SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode, key=KEY) as group:
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises((TypeError, RuntimeError, pickle.PicklingError)):
                pickle.dumps(group.workers[0], protocol)


def test_the_check_command_shows_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.token_bytes", lambda length: (KEY * 2)[:length])
    main(["check", "--json"])
    output = capsys.readouterr()
    assert_silent(output.out, output.err)


def test_another_user_sees_nothing_of_a_service() -> None:
    with service("--workers", "1", key=KEY) as running:
        assert asyncio.run(look_as_nobody(running)) == []


async def look_as_nobody(running: Service) -> list[str]:
    """Return what of a service's processes a user without privileges can open."""
    pids = [running.pid, *running.workers().values()]
    paths = [f"/proc/{pid}/{name}" for pid in pids for name in ("environ", "maps", "mem", "fd", "fdinfo")]
    ours, theirs = socket.socketpair()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        theirs.sendall(json.dumps([path for path in paths if may_look(path)]).encode())
        os._exit(0)
    theirs.close()
    os.waitpid(child, 0)
    with ours:
        found: list[str] = json.loads(ours.recv(65536))
    return found


def may_look(path: str) -> bool:
    try:
        os.listdir(path) if path.endswith(("fd", "fdinfo")) else Path(path).read_bytes()[:1]
    except OSError:
        return False
    return True


def test_the_state_that_a_worker_inherits_is_sealed_and_gone_once_it_was_read(tmp_path: Path) -> None:
    """What spawn() passes cannot be changed by anybody, and does not reach the worker's own children."""
    report = tmp_path / "report"
    script = f"""
import os, json, subprocess, sys
from quicsteer import Worker
number = int(os.environ["QUICSTEER_FD"])
try:
    os.write(number, b"x")
    changed = True
except PermissionError:
    changed = False
worker = Worker.inherited()
try:
    os.fstat(number)
    left = os.readlink(f"/proc/self/fd/{{number}}").startswith("/memfd:quicsteer ")
except OSError:
    left = False
child = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False).stdout
open({str(report)!r}, "w").write(json.dumps([changed, left, "memfd:quicsteer" in child, dict(os.environ)]))
"""
    with SteeringGroup.open("127.0.0.1:0", 1, key=KEY) as group:
        worker: Worker = group.workers[0]
        pid = worker.spawn([sys.executable, "-c", script])
        assert os.waitpid(pid, 0)[1] == 0
    changed, left, inherited, environment = json.loads(report.read_text())
    assert (changed, left, inherited) == (False, False, False)
    assert not {"QUICSTEER_FD", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} & environment.keys()
    assert_silent(report.read_text())
