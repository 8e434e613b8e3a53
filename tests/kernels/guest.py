"""What runs inside a guest: promises of the package on its kernel, and facts that differ between kernels.

Each finding is a line that starts with ``QS`` and goes on in JSON. A promise that is broken ends as an error of its
scenario, and the others go on.
"""

import contextlib
import errno
import io
import json
import os
import platform
import resource
import socket
import struct
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hostile import hostile_set
from steer import VectorGroup, load_decisions, receive_all, short_header
from trial import Trial, open_group

from quicsteer import KernelError, SteeringGroup, SteeringMode, SteeringUnavailable, Worker, _kernel
from quicsteer.abi import KEY_LENGTH
from quicsteer.classic import steering_program
from quicsteer.cli import main
from quicsteer.decision import Decision, Rules, decide

NOBODY = 65534
STEERING = (SteeringMode.EBPF, SteeringMode.CBPF)
MEMLOCKS = (0, 8192)
"""Bytes that may be locked: before Linux 5.11 too few for any map, and too few for a group's."""

HOSTILE_STEP = 8
"""Only every so many-th of the hostile datagrams: an emulated kernel is slow."""

ARGUMENTS = dict(word.partition("=")[::2] for word in Path("/proc/cmdline").read_text().split())


def say(name: str, value: Any) -> None:
    print("QS", json.dumps([name, value]), flush=True)


def rules_of(table: VectorGroup, drop_invalid: bool) -> Rules:
    return Rules(table.key, table.cid_length, table.listeners, table.slots, drop_invalid)


def run_vectors() -> dict[str, int]:
    """The shared table through real groups in both modes, with and without the sink."""
    sent = dict.fromkeys(map(str, STEERING), 0)
    for mode in STEERING:
        for table in load_decisions():
            for drop_invalid in (False, True):
                rules = rules_of(table, drop_invalid)
                datagrams = [vector.datagram for vector in table.vectors]
                if not drop_invalid:
                    for vector in table.vectors:
                        assert decide(vector.datagram, rules) == Decision(vector.outcome, vector.slot), vector.name
                sent[str(mode)] += send(rules, mode, datagrams, split=table.slots > table.listeners)
    return sent


def run_hostile() -> dict[str, int]:
    rules = Rules(bytes(range(KEY_LENGTH)), 8, 3, 9, True)
    datagrams = hostile_set(rules)[::HOSTILE_STEP]
    return {str(mode): send(rules, mode, datagrams) for mode in STEERING}


def send(rules: Rules, mode: SteeringMode, datagrams: list[bytes], split: bool = True) -> int:
    with (
        open_group("127.0.0.1:0", rules, mode, split=split) as (group, sockets),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        client.connect(group.addresses[0])
        trial = Trial(group, rules, sockets)
        trial.send(client, datagrams)
        trial.verify()
        return trial.sent


def run_claim() -> int:
    """An address that anybody has is refused, in every mode and against every kind of holder."""
    refused = 0
    for held in SteeringMode:
        with SteeringGroup.open("127.0.0.1:0", 1, mode=held) as group:
            for mode in SteeringMode:
                refused += is_taken(group.addresses[0], mode)
    for option in (None, socket.SO_REUSEPORT, socket.SO_REUSEADDR):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            if option is not None:
                other.setsockopt(socket.SOL_SOCKET, option, 1)
            other.bind(("0.0.0.0", 0))
            for mode in SteeringMode:
                refused += is_taken(("127.0.0.1", other.getsockname()[1]), mode)
    assert refused == (len(SteeringMode) + 3) * len(SteeringMode)
    return refused


def is_taken(address: tuple[str, int], mode: SteeringMode) -> bool:
    try:
        SteeringGroup.open(address, 1, mode=mode).close()
    except KernelError as error:
        return error.errno == errno.EADDRINUSE
    return False


def run_drops() -> dict[str, int]:
    """A known overflow is read back exactly."""
    counts = {}
    for mode in STEERING:
        with (
            SteeringGroup.open("127.0.0.1:0", 2, mode=mode, receive_buffer=20_000) as group,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
        ):
            worker = group.workers[1]
            datagram = short_header(worker.connection_ids.issue(), 1200)
            for _ in range(500):
                client.sendto(datagram, group.addresses[0])
            read = len(receive_all(worker.socket))
            stats = group.stats()
            assert stats.dropped is not None
            assert stats.dropped + read == 500
            counts[str(mode)] = stats.dropped
    return counts


def probe_as_nobody() -> dict[str, int]:
    os.setuid(NOBODY)
    return _kernel.probe_bpf()


def as_child(work: Callable[[], Any]) -> Any:
    """Do something in a forked child, which may give up privileges."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.write(theirs, json.dumps(attempt(work)).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answers:
        answer = json.load(answers)
    os.waitpid(child, 0)
    return answer


def attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception:  # noqa: BLE001  # a finding, whatever it is
        return {"error": traceback.format_exc()}


def run_fallback() -> Any:
    """What a user without privileges gets, and root with no memory to lock."""
    found = {"nobody": as_child(open_as_nobody)}
    for size in MEMLOCKS:
        found[f"{size} bytes to lock"] = as_child(partial(open_with_memlock, size))
    return found


def open_as_nobody() -> Any:
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    return open_auto()


def open_with_memlock(size: int) -> Any:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (size, size))
    return open_auto()


def open_auto() -> list[str | None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with SteeringGroup.open("127.0.0.1:0", 2) as group:
            return [group.mode, group.stats().fallback]


def run_check() -> Any:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = main(["check", "--json"])
    return {"status": status, **json.loads(output.getvalue())}


def run_check_as_nobody() -> Any:
    def check() -> Any:
        os.setuid(NOBODY)
        return run_check()

    return as_child(check)


def read_facts() -> dict[str, Any]:
    """What is not promised, and differs between kernels."""
    return {
        "rmem_max": int(Path("/proc/sys/net/core/rmem_max").read_text()),
        "optmem_max": int(Path("/proc/sys/net/core/optmem_max").read_text()),
        "bpf answers to root": _kernel.probe_bpf(),
        "bpf answers to nobody": as_child(probe_as_nobody),
        "datagrams of others reach a connected member": attempt(connected_member_is_selected),
        "a worker can replace the program": attempt(worker_can_replace_the_program),
        "milliseconds to load": attempt(time_to_load),
    }


def connected_member_is_selected() -> bool:
    with (
        SteeringGroup.open("127.0.0.1:0", 2, mode="ebpf") as group,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        worker = group.workers[1]
        worker.socket.connect(("127.0.0.1", 9))
        client.sendto(short_header(worker.connection_ids.issue()), group.addresses[0])
        return bool(receive_all(worker.socket))


def worker_can_replace_the_program() -> bool:
    """Whether a worker without privileges can put a program of its own in the place of the group's.

    The one that it replaces is an eBPF program, which no kernel frees too early.
    """

    def replace(worker: Worker) -> None:
        os.setuid(NOBODY)
        everything_to_slot_0 = struct.pack("=HBBI", 0x06, 0, 0, 0)
        _kernel.attach_classic(worker.sockets[0].fileno(), everything_to_slot_0)

    with (
        SteeringGroup.open("127.0.0.1:0", 2, mode="ebpf") as group,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        as_child(partial(replace, group.workers[1]))
        for _ in range(8):
            client.sendto(short_header(group.workers[1].connection_ids.issue()), group.addresses[0])
        return len(receive_all(group.workers[0].socket)) == 8


def time_to_load() -> float:
    start = time.monotonic()
    for descriptor in _kernel.load_program(bytes(KEY_LENGTH), 8, 4, 8, False):
        os.close(descriptor)
    return round(1000 * (time.monotonic() - start), 1)


def refuse_without_ipv6() -> Any:
    """For a kernel that was booted without IPv6."""
    try:
        SteeringGroup.open("[::1]:0", 1).close()
    except (KernelError, SteeringUnavailable) as error:
        return [str(error), open_auto(), as_child(lambda: list(SteeringGroup.open(":0", 1).addresses[0]))]
    return None


def replace_classic(seconds: float) -> int:
    """Replace the classic program of a group that gets datagrams: CVE-2026-52910. The kernel may not survive it.

    Never do this on a machine that is needed.
    """
    program = steering_program(bytes(KEY_LENGTH), 8, 2, 2, False)
    end = time.monotonic() + seconds
    with SteeringGroup.open("127.0.0.1:0", 2, mode="cbpf") as group:
        sockets = [worker.socket for worker in group.workers]
        flood = threading.Thread(target=send_until, args=(group.addresses[0], end), daemon=True)
        flood.start()
        replaced = 0
        while time.monotonic() < end:
            for _ in range(100):
                _kernel.attach_classic(sockets[0].fileno(), program)
                replaced += 1
            for sock in sockets:
                receive_all(sock)
        flood.join()
    return replaced


def send_until(address: tuple[str, int], end: float) -> None:
    """Send, in a process of its own so that both processors are busy, until the time is over."""
    child = os.fork()
    if not child:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            number = 0
            while time.monotonic() < end:
                for number in range(number, number + 200):  # noqa: B020  # it goes on where it was
                    with contextlib.suppress(OSError):
                        client.sendto(struct.pack(">B8x", 0x40) + number.to_bytes(8, "big"), address)
        os._exit(0)
    os.waitpid(child, 0)


SCENARIOS: dict[str, Callable[[], Any]] = {
    "vectors": run_vectors,
    "hostile": run_hostile,
    "claim": run_claim,
    "drops": run_drops,
    "fallback": run_fallback,
    "check": run_check,
    "check as nobody": run_check_as_nobody,
    "facts": read_facts,
}


def run_all() -> None:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    say("kernel", [platform.release(), os.uname().version])
    if "quicsteer.replace" in ARGUMENTS:
        say("replaced", replace_classic(float(ARGUMENTS["quicsteer.replace"])))
    elif "quicsteer.only" in ARGUMENTS:
        say("without IPv6", attempt(refuse_without_ipv6))
        say("vectors", attempt(run_vectors))
    else:
        for name, scenario in SCENARIOS.items():
            say(name, attempt(scenario))
    say("end", None)


if __name__ == "__main__":
    run_all()
