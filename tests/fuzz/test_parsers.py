"""Whatever reads what others wrote: it takes what is well-formed, and refuses the rest in a way that is documented."""

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service import Service, echo, service

from quicsteer import QuicSteerError, SteeringGroup, Worker, addresses, handover, upgrade
from quicsteer.channel import Channel, channel_pair
from quicsteer.exporter import Exporter
from quicsteer.quicstats import QuicStats
from quicsteer.store import _SIZE, create_store

EXAMPLES = 300
TOO_DEEP = b"[" * 50_000
"""JSON that Python's parser gives up on with a RecursionError."""

FAST = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
CONTROL_LINES = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
ADDRESS_CHARACTERS = "0123456789abcdefg.:[]%/-@ \0é٣\ud800"


def mutations(valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """JSON that is valid but for some entries, and bytes that are not."""

    def change(changes: dict[str, Any], gone: set[str]) -> bytes:
        return json.dumps({name: value for name, value in {**valid, **changes}.items() if name not in gone}).encode()

    names = st.sampled_from(sorted(valid))
    changed = st.builds(change, st.dictionaries(names, JSON, min_size=1, max_size=2), st.sets(names, max_size=1))
    nonsense = st.binary(max_size=100) | JSON.map(lambda value: json.dumps(value).encode())
    return changed | nonsense


@given(st.text(ADDRESS_CHARACTERS, max_size=30) | st.tuples(st.text(max_size=10), st.integers()) | JSON)
@FAST
def test_an_address_is_read_or_refused(value: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", numeric_only)
        with contextlib.suppress(ValueError, TypeError):
            assert addresses.resolve(value)


_getaddrinfo = socket.getaddrinfo


def numeric_only(*arguments: Any, **named: Any) -> Any:
    """Look no name up: a fuzzer asks no name server."""
    return _getaddrinfo(*arguments, **{**named, "flags": socket.AI_NUMERICHOST})


class Inherited:
    """What a worker program finds when it starts, with a state that may be anything."""

    first = 300  # where the descriptors are, instead of at 3: those are taken here

    def __init__(self) -> None:
        self.group = SteeringGroup.open("127.0.0.1:0", 2, split=True)
        worker = self.group.workers[1]
        self.sockets = worker.sockets
        state = worker._state
        self.store = state.store
        self.state: dict[str, Any] = json.loads(handover._dump(state, state.sockets, 0))

    def take_over(self, data: bytes, environment: dict[str, str] | None = None) -> Worker | None:
        number = itertools.count(self.first)
        with contextlib.ExitStack() as stack:
            shared = [*(sock.fileno() for sock in self.sockets), *([self.store.descriptor] if self.store else [])]
            for descriptor in shared:
                place(stack, descriptor, next(number))
            memory = os.memfd_create("state", os.MFD_ALLOW_SEALING)
            os.write(memory, data)
            fcntl.fcntl(memory, fcntl.F_ADD_SEALS, handover._all_seals())
            state = next(number)
            place(stack, memory, state)
            os.close(memory)
            variables = {
                "LISTEN_PID": str(os.getpid()),
                "LISTEN_FDS": str(len(self.sockets)),
                "QUICSTEER_FD": str(state),
            }
            os.environ.update({**variables, **(environment or {})})
            worker = Worker.inherited()
            stack.pop_all()  # they are the worker's now
            return worker


def place(stack: contextlib.ExitStack, descriptor: int, number: int) -> None:
    """Put a descriptor where a started program finds it, until the end of a test."""
    os.dup2(descriptor, number)
    stack.callback(close_quietly, number)


def close_quietly(number: int) -> None:
    with contextlib.suppress(OSError):
        os.close(number)


@pytest.fixture
def inherited(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inherited]:
    monkeypatch.setattr(handover, "_LISTEN_FIRST", Inherited.first)
    found = Inherited()
    with found.group:
        yield found


def test_a_worker_takes_its_state_over(inherited: Inherited) -> None:
    worker = inherited.take_over(json.dumps(inherited.state).encode())
    assert worker is not None
    assert (worker.index, worker.slot) == (1, 3)
    worker.close()


@given(st.data())
@FAST
def test_a_worker_refuses_what_is_no_state(inherited: Inherited, data: st.DataObject) -> None:
    said = ""
    try:
        worker = inherited.take_over(data.draw(mutations(inherited.state)))
        assert worker is not None
        worker.close()
    except QuicSteerError as error:
        said = str(error)
    assert inherited.state["key"] not in said


@given(st.data())
@FAST
def test_a_worker_refuses_variables_that_lie(inherited: Inherited, data: st.DataObject) -> None:
    names = st.sampled_from(["LISTEN_PID", "LISTEN_FDS", "QUICSTEER_FD"])
    values = st.text("0123456789-x", max_size=6) | st.sampled_from(["-1", "0", "1", "٣", "99999999999"])
    changed = data.draw(st.dictionaries(names, values, min_size=1))
    same = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2"}
    if all(same.get(name) == value for name, value in changed.items()):
        return
    with pytest.raises(QuicSteerError):
        inherited.take_over(json.dumps(inherited.state).encode(), changed)


@given(st.data())
@FAST
def test_a_supervisor_reads_the_state_of_its_own_version_only(data: st.DataObject) -> None:
    text = data.draw(mutations({"version": upgrade._STATE_VERSION, "group": {}, "supervisor": {}}))
    memory = os.memfd_create("state")
    try:
        os.write(memory, text)
        with contextlib.suppress(QuicSteerError):
            assert upgrade._read_state(str(memory))["version"] == upgrade._STATE_VERSION
    finally:
        os.close(memory)


@given(st.lists(st.binary(min_size=1, max_size=100) | JSON.map(lambda value: json.dumps(value).encode()), max_size=5))
@FAST
def test_a_channel_skips_what_is_no_message(packets: list[bytes]) -> None:
    ours, theirs = channel_pair()
    with contextlib.closing(ours), contextlib.closing(theirs):
        for packet in [*packets, TOO_DEEP]:
            theirs.socket.send(packet)
        theirs.send("ready")
        messages = ours.receive()
        assert messages is not None
        assert messages[-1] == {"say": "ready"}
        assert all(isinstance(message["say"], str) for message in messages)


@given(JSON | st.dictionaries(st.sampled_from(["ends", "stream_resets", "opened", "connections"]), JSON))
@FAST
def test_figures_of_a_worker_are_read_or_refused(figures: Any) -> None:
    with contextlib.suppress(ValueError):
        QuicStats.from_dict(figures)


def test_a_shared_store_survives_a_worker_that_scribbles_over_it() -> None:
    store = create_store()
    assert store is not None
    with contextlib.closing(store):
        for filling in (os.urandom(_SIZE), b"\xff" * _SIZE, b"\x7f" * _SIZE):
            store._memory[:] = filling
            for number in range(200):
                key = number.to_bytes(4, "big")
                assert store.take(key) is None
                store.put(key, b"value", 60.0)


@given(st.lists(st.binary(max_size=300) | st.sampled_from([b"GET /metrics HTTP/1.1\r\n\r\n", b"\r\n\r\n"]), max_size=3))
@FAST
def test_the_exporter_answers_or_hangs_up(parts: list[bytes]) -> None:
    async def main() -> bytes:
        async def metrics() -> str:
            return "up 1\n"

        exporter = Exporter("127.0.0.1:0", metrics)
        await exporter.start()
        try:
            reader, writer = await asyncio.open_connection(*exporter.addresses[0])
            writer.write(b"".join(parts))
            writer.write_eof()
            answer = await reader.read()
            writer.close()
        finally:
            await exporter.close()
        return answer

    with contextlib.suppress(ConnectionError):
        answer = asyncio.run(main())
        assert answer.startswith(b"HTTP/1.1 ")


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    with service("--workers", "1") as started:
        yield started


def ask(running: Service, line: bytes) -> dict[str, Any]:
    """Send a line to the control socket as it is, and return the last answer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(running.control))
        sock.sendall(line.replace(b"\n", b" ") + b"\n")
        with sock.makefile() as answers:
            lines = answers.readlines()
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


@given(CONTROL_LINES)
@FAST
def test_the_control_socket_answers_every_line(running: Service, line: bytes) -> None:
    answer = ask(running, line)
    assert answer["ok"] is False
    assert answer["error"]


@given(
    st.sampled_from(["status", "stats", "dispatch", "reload", "Reload", ""]),
    st.dictionaries(st.sampled_from(["weights", "workers", "x"]), JSON.filter(lambda value: value not in (1, None))),
)
@FAST
def test_the_control_socket_refuses_arguments_that_make_no_sense(
    running: Service, command: str, arguments: dict[str, Any]
) -> None:
    if command == "reload":
        arguments = {"workers": "all", **arguments}
    answer = ask(running, json.dumps({"command": command, **arguments}).encode())
    assert isinstance(answer["ok"], bool)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_another_version_is_refused_and_named(inherited: Inherited, version: Any) -> None:
    state = {**inherited.state, "version": version}
    with pytest.raises(QuicSteerError, match=r"has version .*, this quicsteer reads 1: run the same release on both"):
        inherited.take_over(json.dumps(state).encode())
    memory = os.memfd_create("state")
    os.write(memory, json.dumps({"version": version}).encode())
    with pytest.raises(QuicSteerError, match=r"running supervisor's state has version .*, this program reads 1"):
        upgrade._read_state(str(memory))
    os.close(memory)


def test_what_is_nested_too_deeply_is_refused(running: Service, inherited: Inherited) -> None:
    assert "nested too deeply" in ask(running, TOO_DEEP)["error"]
    with pytest.raises(QuicSteerError, match="nested too deeply"):
        inherited.take_over(TOO_DEEP)


def test_the_control_socket_outlives_clients_that_do_not_finish(running: Service) -> None:
    for start in (b"", b"{", b'{"command": "status"}', b"x" * 200_000):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(running.control))
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(start)
    assert running.describe()["pid"] == running.pid
    assert "Exception in" not in running.log


async def babble(worker: Worker) -> None:
    """A worker that serves, and says what no worker should."""
    channel = worker.channel
    assert channel is not None
    flood(channel)
    await echo(worker)


def flood(channel: Channel) -> None:
    channel.socket.setblocking(True)
    for packet in (TOO_DEEP, b"\xff", b"[]", b'{"say": 5}', b'{"say": "report", "figures": [[]]}', b'{"say": ""}'):
        channel.socket.send(packet)
    for say in ("stopped", "alive", "hello", "reload", "listen", "report"):
        channel.socket.send(json.dumps({"say": say, "figures": {"ends": 7}, "seconds": []}).encode())
    channel.socket.setblocking(False)


def test_a_worker_that_talks_nonsense_troubles_nobody() -> None:
    with service("--workers", "1", serve=babble) as running:
        running.reload()
        assert len(running.workers("serving")) == 1
        assert "Exception in" not in running.log
