"""What ``quicsteer check`` proves under the identities that servers run with, on the kernel of this host."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from privileges import NOBODY

RunAs = Callable[..., Any]

IMPORTS = ("quicsteer.check", "quicsteer.cli", "email.parser", "email.feedparser")
CHECK = """
    import json
    from quicsteer.check import exit_status, run_checks
    from quicsteer.cli import render
    from quicsteer.modes import SteeringMode

    report = run_checks()
    statuses = [exit_status(report, mode) for mode in (None, *SteeringMode)]
    found = {probe["mode"]: probe for probe in report.to_dict()["probes"] if probe["mode"]}
    print(json.dumps({"mode": report.mode, "statuses": statuses, "modes": found, "text": render(report)}))
"""
PROVEN = "datagrams reached the socket their connection ID names"
ALL_WORK, NO_EBPF = [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]

STEERED_BY_EBPF = {
    "nobody with CAP_BPF": {"uid": NOBODY, "capabilities": ["CAP_BPF"]},
    "root with CAP_BPF alone": {"capabilities": ["CAP_BPF"]},
    "root": {},
}
STEERED_BY_CBPF: dict[str, tuple[dict[str, Any], str, str]] = {
    "nobody": ({"uid": NOBODY}, "CAP_BPF is missing", "systemd unit: AmbientCapabilities=CAP_BPF"),
    "root without capability": ({"capabilities": []}, "CAP_BPF is missing", "container: --cap-add BPF"),
    "root in a user namespace": ({"user_namespace": True}, "only inside this user namespace", "PrivateUsers=no"),
    "seccomp, EPERM": ({"seccomp": "eperm"}, "a seccomp filter refuses bpf(2)", "systemd unit: SystemCallFilter=bpf"),
    "seccomp, ENOSYS": ({"seccomp": "enosys"}, "a seccomp filter hides bpf(2)", "--security-opt seccomp=PROFILE.json"),
    "seccomp, kill": ({"seccomp": "kill"}, "a seccomp filter kills the caller", "SystemCallFilter=bpf"),
    "nobody under seccomp": ({"uid": NOBODY, "seccomp": "kill"}, "a seccomp filter kills", "SystemCallFilter=bpf"),
}


@pytest.mark.parametrize("identity", STEERED_BY_EBPF.values(), ids=STEERED_BY_EBPF)
def test_ebpf_steers_with_the_least_capability(run_as: RunAs, identity: dict[str, Any]) -> None:
    found = run_as(CHECK, imports=IMPORTS, **identity)
    assert (found["mode"], found["statuses"]) == ("ebpf", ALL_WORK)
    for mode in ("ebpf", "cbpf"):
        assert found["modes"][mode]["ok"] is True
        assert PROVEN in found["modes"][mode]["detail"]


@pytest.mark.parametrize(("identity", "reason", "remedy"), STEERED_BY_CBPF.values(), ids=STEERED_BY_CBPF)
def test_classic_steers_without_and_ebpf_says_why_not(
    run_as: RunAs, identity: dict[str, Any], reason: str, remedy: str
) -> None:
    found = run_as(CHECK, imports=IMPORTS, **identity)
    assert (found["mode"], found["statuses"]) == ("cbpf", NO_EBPF)
    assert found["modes"]["cbpf"]["ok"] is True
    assert PROVEN in found["modes"]["cbpf"]["detail"]
    assert found["modes"]["ebpf"]["ok"] is False
    assert reason in found["modes"]["ebpf"]["detail"]
    assert remedy in found["modes"]["ebpf"]["remedy"]
    assert "no    eBPF steers" in found["text"]
    assert "Mode: cbpf. Connections keep their worker when addresses change" in found["text"]


def test_without_a_loopback_address_nothing_is_proven(run_as: RunAs) -> None:
    source = f"""
        import ctypes
        CLONE_NEWNET = 0x40000000
        assert ctypes.CDLL(None).unshare(CLONE_NEWNET) == 0
        {CHECK.strip().replace(chr(10), chr(10) + "    ")}
    """
    found = run_as(source, imports=IMPORTS)
    assert (found["mode"], found["statuses"]) == ("ebpf", [2, 2, 2, 0, 0])
    for mode in ("ebpf", "cbpf"):
        assert found["modes"][mode]["ok"] is None
        assert found["modes"][mode]["detail"].startswith("cannot be proven: ")
        assert found["modes"][mode]["remedy"] == "shell: ip link set lo up"
    assert " ".join(found["text"].split()).endswith("This could not be proven.")


def test_a_shortage_of_descriptors_is_no_answer_and_no_traceback(run_as: RunAs) -> None:
    source = """
        import json, os, resource
        from quicsteer.check import exit_status, run_checks

        free = os.dup(0)
        os.close(free)
        found = {}
        for spare in (2, 8, 20, 30, 200):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, 4096))
            report = run_checks()
            found[spare] = [[probe.ok, probe.detail] for probe in report.probes if probe.mode], exit_status(report)
        print(json.dumps(found))
    """
    found = run_as(source, imports=IMPORTS)
    for probes, _ in found.values():
        assert {ok for ok, _ in probes} <= {True, None}
        assert all("Too many open files" in detail for ok, detail in probes if ok is None)
    assert (found["8"][1], found["200"][1]) == (2, 0)


def test_a_port_for_root_alone_names_the_capability(run_as: RunAs) -> None:
    source = """
        import json
        from quicsteer.check import run_checks

        probe = run_checks("127.0.0.1:443").probes[-1]
        print(json.dumps([probe.ok, probe.detail, probe.remedy]))
    """
    ok, detail, remedy = run_as(source, imports=IMPORTS, uid=NOBODY)
    if ok or "taken" in detail:
        pytest.skip("port 443 is taken here, or not reserved for root (net.ipv4.ip_unprivileged_port_start)")
    assert (ok, detail) == (False, "bind: Permission denied")
    assert remedy.startswith("systemd unit: AmbientCapabilities=CAP_NET_BIND_SERVICE\nsysctl -w net.ipv4.ip_")


def test_a_stranger_who_has_the_port_is_known_by_uid_alone(run_as: RunAs) -> None:
    source = """
        import json, os, socket
        from privileges import become
        from quicsteer.check import run_checks

        holder = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        holder.bind(("127.0.0.1", 0))
        ours, theirs = os.pipe()
        child = os.fork()
        if child:  # root keeps the socket
            os.close(theirs)
            print(os.read(ours, 65536).decode())
            os.waitpid(child, 0)
        else:
            address = holder.getsockname()
            holder.close()
            become(uid=65534)
            probe = run_checks(address).probes[-1]
            os.write(theirs, json.dumps([probe.ok, probe.detail, address[1]]).encode())
            os._exit(0)
    """
    ok, detail, port = run_as(source, imports=(*IMPORTS, "privileges"))
    assert (ok, detail) == (False, f"taken; on the port: a process of uid 0 on 127.0.0.1:{port}")


def test_the_command_works_as_a_program_of_its_own(run_as: RunAs) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "quicsteer", "check", "--json", "--require", "ebpf"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["mode"] == "ebpf"


def test_a_required_mode_that_is_refused_ends_with_1_and_says_so(run_as: RunAs) -> None:
    source = """
        import contextlib, io, json
        from quicsteer.cli import main

        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = main(["check", "--require", "ebpf"])
        print(json.dumps([status, output.getvalue()]))
    """
    status, text = run_as(source, imports=IMPORTS, uid=NOBODY)
    assert status == 1
    assert text.endswith("The required mode ebpf does not work here.\n")
