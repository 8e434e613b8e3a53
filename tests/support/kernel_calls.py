"""Every function of the extension, called so that it succeeds and so that each of its errors comes up.

Run as a program it calls all of them many times: for an extension that was built with sanitizers.
"""

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterator

from quicsteer import KernelError, _kernel
from quicsteer.classic import steering_program
from quicsteer.dropreasons import counting_program

KEY = secrets.token_bytes(16)
NOT_OPEN = 1_000_000
HARMLESS_PORT = 9


@contextlib.contextmanager
def refused(kind: type[Exception] = KernelError) -> Iterator[None]:
    """What must be refused."""
    try:
        yield
    except kind:
        return
    raise AssertionError("it was not refused")


@contextlib.contextmanager
def shared_socket() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield sock


@contextlib.contextmanager
def loaded() -> Iterator[tuple[int, int, int, int]]:
    descriptors = _kernel.load_program(KEY, 8, 2, 4, False)
    try:
        yield descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def call_siphash24() -> None:
    assert _kernel.siphash24(KEY, bytes(8)) >= 0
    for key, message in ((KEY, b""), (b"", bytes(8)), (KEY, bytes(9))):
        with refused(ValueError):
            _kernel.siphash24(key, message)


def call_seal() -> None:
    for length in range(4, 17):
        assert len(_kernel.seal(KEY, bytes(length), 3)) == length + 4
    for key, body in ((KEY, b""), (KEY, bytes(17)), (b"short", bytes(4))):
        with refused(ValueError):
            _kernel.seal(key, body, 3)
    with refused(OverflowError):
        _kernel.seal(KEY, bytes(4), 2**32)


def call_open_seal() -> None:
    for length in range(4, 17):
        assert _kernel.open_seal(KEY, _kernel.seal(KEY, bytes(length), 7)) == 7
    _kernel.open_seal(KEY, secrets.token_bytes(20))
    for cid in (b"", bytes(7), bytes(21)):
        with refused(ValueError):
            _kernel.open_seal(KEY, cid)


def call_close_filter() -> None:
    with shared_socket() as sock:
        _kernel.close_filter(sock.fileno())
    with refused():
        _kernel.close_filter(NOT_OPEN)


def call_open_filter() -> None:
    with shared_socket() as sock:
        _kernel.close_filter(sock.fileno())
        _kernel.open_filter(sock.fileno())
        with refused():
            _kernel.open_filter(sock.fileno())


def call_attach_classic() -> None:
    program = steering_program(KEY, 8, 2, 2, False)
    with shared_socket() as sock:
        _kernel.attach_classic(sock.fileno(), program)
    with shared_socket() as sock:
        for wrong in (b"", b"\xff" * 80, program * 20):
            with refused():
                _kernel.attach_classic(sock.fileno(), wrong)


def call_attach_program() -> None:
    with loaded() as (program, sockets, _, _), shared_socket() as sock:
        _kernel.attach_program(sock.fileno(), program)
        for descriptor in (sockets, NOT_OPEN):
            with refused():
                _kernel.attach_program(sock.fileno(), descriptor)


def call_read_meminfo() -> None:
    with shared_socket() as sock:
        assert _kernel.read_meminfo(sock.fileno())[1] > 0
    with refused():
        _kernel.read_meminfo(NOT_OPEN)


def call_load_program() -> None:
    with loaded() as descriptors:
        assert len(set(descriptors)) == 4
    with refused(ValueError):
        _kernel.load_program(b"", 8, 1, 1, False)
    for listeners, slots in ((0, 0), (1, 2**32 - 2)):
        with refused():
            _kernel.load_program(KEY, 8, listeners, slots, False)


def call_set_socket() -> None:
    with loaded() as (_, sockets, _, _), shared_socket() as sock:
        with refused():
            _kernel.set_socket(sockets, 0, sock.fileno())
        sock.bind(("127.0.0.1", 0))
        _kernel.set_socket(sockets, 0, sock.fileno())
        for slot, number in ((99, sock.fileno()), (1, sock.fileno()), (1, NOT_OPEN), (1, sockets)):
            with refused():
                _kernel.set_socket(sockets, slot, number)


def call_set_listener() -> None:
    with loaded() as (_, _, table, _):
        _kernel.set_listener(table, 1023, 1)
        with refused():
            _kernel.set_listener(table, 1024, 1)


def call_read_counters() -> None:
    with loaded() as (_, _, _, counters):
        assert _kernel.read_counters(counters, 4) == (0, 0, 0, 0)
        for descriptor, slot in ((counters, 5), (NOT_OPEN, 0)):
            with refused():
                _kernel.read_counters(descriptor, slot)


def call_make_counts() -> None:
    os.close(_kernel.make_counts(4))
    with refused():
        _kernel.make_counts(0)


def call_load_tracing() -> None:
    counts = _kernel.make_counts(4)
    os.close(_kernel.load_tracing(counting_program(counts, HARMLESS_PORT, 14)))
    os.close(counts)
    with refused():
        _kernel.load_tracing(b"")


def call_open_tracepoint() -> None:
    counts = _kernel.make_counts(4)
    program = _kernel.load_tracing(counting_program(counts, HARMLESS_PORT, 14))
    os.close(_kernel.open_tracepoint(program, b"kfree_skb"))
    with refused():
        _kernel.open_tracepoint(program, b"nonsense")
    for descriptor in (program, counts):
        os.close(descriptor)


def call_read_count() -> None:
    counts = _kernel.make_counts(4)
    assert _kernel.read_count(counts, 3) == 0
    with refused():
        _kernel.read_count(counts, 4)
    os.close(counts)


def call_probe_bpf() -> None:
    assert _kernel.probe_bpf()["signal"] == 0


def call_spawn() -> None:
    with shared_socket() as sock:
        pid = _kernel.spawn(b"/bin/true", [b"true"], [b"LISTEN_PID=", b"A=1"], (sock.fileno(), sock.fileno()))
        assert os.waitpid(pid, 0)[1] == 0
    for path, arguments, descriptors in ((b"/nonexistent", [b"x"], ()), (b"/bin/true", [b"true"], (NOT_OPEN,))):
        with refused():
            _kernel.spawn(path, arguments, [], descriptors)
    with refused(TypeError):
        _kernel.spawn(b"/bin/true", ["text"], [], ())  # type: ignore[list-item]
    for path, arguments in ((b"/bin/true\0", [b"x"]), (b"/bin/true", [b"x\0y"])):
        with refused(ValueError):
            _kernel.spawn(path, arguments, [], ())
    with refused(TypeError):
        _kernel.spawn(b"/bin/true", [b"true"], [], ("text",))  # type: ignore[arg-type]


CALLS: dict[str, Callable[[], None]] = {
    name.removeprefix("call_"): call for name, call in list(globals().items()) if name.startswith("call_")
}


def main(rounds: int) -> None:
    for call in CALLS.values():
        for _ in range(rounds):
            call()
    print(f"{len(CALLS)} functions, {rounds} rounds")


if __name__ == "__main__":
    main(int(sys.argv[1]))
