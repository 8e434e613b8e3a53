"""What a refusal means: every combination of answers and host that was met, and what would change it."""

import dataclasses
import errno
import signal
from pathlib import Path

import pytest

from quicsteer.capability import detect, probe_jit, read_host, refusal
from quicsteer.errors import KernelError
from quicsteer.modes import SteeringMode
from quicsteer.triage import (
    Host,
    Probe,
    explain_bpf,
    explain_classic_fix,
    explain_group,
    explain_receive_buffer,
    explain_socket,
)

CAP_BPF = 1 << 39
CAP_SYS_ADMIN = 1 << 21
CAP_NET_ADMIN = 1 << 12
ALL_BEFORE_5_8 = (1 << 38) - 1
ENOTSUPP = 524

PLAIN = Host(
    capabilities=0,
    last_capability=40,
    seccomp=0,
    user_namespace=False,
    kernel=(6, 1),
    release="6.1.0",
    memlock=8 << 20,
    interpreter="/usr/bin/python3.12",
)


def host(kernel: tuple[int, int] = (6, 1), **facts: object) -> Host:
    fields = {"kernel": kernel, "release": f"{kernel[0]}.{kernel[1]}.0", **facts}
    return dataclasses.replace(PLAIN, **fields)  # type: ignore[arg-type]


def answers(
    bad_pointer: int = errno.EFAULT,
    bad_command: int = errno.EINVAL,
    array: int = 0,
    socket_array: int = 0,
    program: int = 0,
    *,
    signal: int = 0,
) -> dict[str, int]:
    return {
        "bad_pointer": bad_pointer,
        "bad_command": bad_command,
        "array": array,
        "socket_array": socket_array,
        "program": program,
        "signal": signal,
    }


def closed(number: int) -> dict[str, int]:
    """Every call is refused."""
    return answers(number, number, number, number, number)


def denied(number: int = errno.EPERM) -> dict[str, int]:
    """Whatever makes a map or loads a program is refused."""
    return answers(array=number, socket_array=number, program=number)


KILLED = answers(0, 0, signal=signal.SIGSYS)

MISSING = "bpf(BPF_MAP_CREATE): Operation not permitted, CAP_BPF is missing"
INSIDE = "bpf(BPF_MAP_CREATE): Operation not permitted, capabilities are valid only inside this user namespace"
FILTERED = "bpf(BPF_MAP_CREATE): Operation not permitted, a seccomp filter refuses bpf(2)"
HIDDEN = "bpf(BPF_MAP_CREATE): Function not implemented, a seccomp filter hides bpf(2)"
MEMLOCK = "bpf(BPF_MAP_CREATE): Operation not permitted, RLIMIT_MEMLOCK of 0 bytes is too small"

UNIT = "systemd unit: AmbientCapabilities=CAP_BPF"
CALL_FILTER = "systemd unit: SystemCallFilter=bpf"

REFUSED = {
    "no capability": (denied(), host(), MISSING, UNIT),
    "CAP_NET_ADMIN only": (denied(), host(capabilities=CAP_NET_ADMIN), MISSING, UNIT),
    "no capability, 5.10": (closed(errno.EPERM), host((5, 10)), MISSING, UNIT),
    "no capability, 5.10, filter": (closed(errno.EPERM), host((5, 10), seccomp=2), MISSING, UNIT),
    "no capability, unprivileged bpf": (answers(socket_array=errno.EPERM, program=errno.EPERM), host(), MISSING, UNIT),
    "no capability, 5.4": (
        closed(errno.EPERM),
        host((5, 4), last_capability=37),
        "CAP_SYS_ADMIN is missing",
        "systemd unit: AmbientCapabilities=CAP_SYS_ADMIN",
    ),
    "no capability, CAP_BPF carried back": (closed(errno.EPERM), host((4, 18), last_capability=40), MISSING, UNIT),
    "user namespace": (denied(), host(capabilities=CAP_BPF, user_namespace=True), INSIDE, "PrivateUsers=no"),
    "user namespace, 5.10": (
        closed(errno.EPERM),
        host((5, 10), capabilities=CAP_BPF, user_namespace=True),
        INSIDE,
        "--userns=host --cap-add BPF",
    ),
    "seccomp EPERM": (closed(errno.EPERM), host(capabilities=CAP_BPF, seccomp=2), FILTERED, CALL_FILTER),
    "seccomp EPERM, no capability": (closed(errno.EPERM), host(seccomp=2), FILTERED, UNIT),
    "seccomp EPERM, capability, 5.10": (
        closed(errno.EPERM),
        host((5, 10), capabilities=CAP_SYS_ADMIN, seccomp=2),
        FILTERED,
        "--security-opt seccomp=PROFILE.json",
    ),
    "seccomp EACCES": (
        closed(errno.EACCES),
        host(seccomp=2),
        "bpf(BPF_MAP_CREATE): Permission denied, a seccomp filter refuses bpf(2)",
        CALL_FILTER,
    ),
    "seccomp ENOSYS": (closed(errno.ENOSYS), host(seccomp=2), HIDDEN, CALL_FILTER),
    "seccomp kill": (KILLED, host(seccomp=2), "bpf(2): a seccomp filter kills the caller (SIGSYS)", CALL_FILTER),
    "no bpf in the kernel": (closed(errno.ENOSYS), host(), "built without bpf(2)", "kernel: CONFIG_BPF_SYSCALL=y"),
    "LSM, BPF program": (
        answers(errno.EFAULT, errno.EPERM, errno.EPERM, errno.EPERM, errno.EPERM),
        host(capabilities=CAP_BPF),
        "bpf(BPF_MAP_CREATE): Operation not permitted, a security module (LSM) denies bpf(2)",
        "cat /sys/kernel/security/lsm",
    ),
    "LSM, SELinux": (
        denied(errno.EACCES),
        host(capabilities=CAP_BPF),
        "bpf(BPF_MAP_CREATE): Permission denied, a security module (LSM) denies bpf(2)",
        "allow DOMAIN self:bpf",
    ),
    "LSM, AppArmor": (
        denied(),
        host(capabilities=CAP_BPF),
        "a security module (LSM) denies CAP_BPF",
        "AppArmor rule: capability bpf,",
    ),
    "memlock": (
        denied(),
        host((5, 10), capabilities=CAP_BPF, memlock=0),
        MEMLOCK,
        "systemd unit: LimitMEMLOCK=infinity\nshell: ulimit -l unlimited",
    ),
    "memlock, large maps only": (
        answers(program=errno.EPERM),
        host((5, 4), capabilities=ALL_BEFORE_5_8, last_capability=37, memlock=65536),
        "RLIMIT_MEMLOCK of 65536 bytes is too small",
        "shell: ulimit -l unlimited",
    ),
    "no map names": (
        denied(errno.E2BIG),
        host((4, 14), capabilities=CAP_SYS_ADMIN, last_capability=37),
        "the kernel is too old (Linux 4.14.0): it cannot make an array map",
        "kernel: Linux 5.8",
    ),
    "no socket array": (
        answers(socket_array=errno.EINVAL, program=errno.EINVAL),
        host((4, 18), capabilities=CAP_SYS_ADMIN, last_capability=37),
        "the kernel is too old (Linux 4.18.0): it cannot make a REUSEPORT_SOCKARRAY map",
        "kernel: Linux 5.8",
    ),
    "no frozen maps": (
        answers(program=errno.EINVAL),
        host((5, 1), capabilities=CAP_SYS_ADMIN, last_capability=37),
        "the kernel is too old (Linux 5.1.0): frozen maps need 5.2",
        "kernel: Linux 5.8",
    ),
    "program too long": (
        answers(program=errno.E2BIG),
        host((5, 1), capabilities=CAP_SYS_ADMIN, last_capability=37),
        "bpf(BPF_PROG_LOAD): Argument list too long, the kernel is too old (Linux 5.1.0)",
        "kernel: Linux 5.8",
    ),
    "verifier": (
        answers(program=errno.EACCES),
        host(capabilities=CAP_BPF),
        "bpf(BPF_PROG_LOAD): Permission denied, the verifier refuses the program",
        "",
    ),
    "verifier EINVAL": (
        answers(program=errno.EINVAL),
        host(capabilities=CAP_BPF),
        "bpf(BPF_PROG_LOAD): Invalid argument, the verifier refuses the program",
        "",
    ),
    "JIT": (answers(program=ENOTSUPP), host(capabilities=CAP_BPF), "the JIT compiler cannot compile the program", ""),
    "never met": (denied(errno.EDOM), host(capabilities=CAP_BPF), "no known cause", ""),
}


def assert_explained(probe: Probe, detail: str, remedy: str) -> None:
    assert detail in probe.detail
    assert "\n" not in probe.detail
    if remedy:
        assert remedy in probe.remedy
    else:
        assert probe.remedy == ""


@pytest.mark.parametrize(("given", "on", "detail", "remedy"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_its_cause_and_a_way_out(given: dict[str, int], on: Host, detail: str, remedy: str) -> None:
    probe = explain_bpf(given, on)
    assert probe.ok is False
    assert_explained(probe, detail, remedy)


UNTOLD = {
    "no descriptor": (answers(array=errno.EMFILE), "Too many open files, this process has no", "ulimit -n"),
    "no descriptor on the host": (answers(program=errno.ENFILE), "this host has no descriptor left", ""),
    "no memory": (denied(errno.ENOMEM), "the control group has no memory left", ""),
    "interrupted": (answers(program=errno.EAGAIN), "the kernel was interrupted", ""),
    "another signal": (answers(0, 0, signal=signal.SIGKILL), "was ended by signal 9", ""),
}


@pytest.mark.parametrize(("given", "detail", "remedy"), UNTOLD.values(), ids=UNTOLD)
def test_a_shortage_is_no_answer(given: dict[str, int], detail: str, remedy: str) -> None:
    probe = explain_bpf(given, host(capabilities=CAP_BPF))
    assert probe.ok is None
    assert_explained(probe, detail, remedy)


UNKNOWN_HOST = host(capabilities=None, last_capability=None, seccomp=None, user_namespace=None)


@pytest.mark.parametrize(
    ("given", "detail"),
    [
        (denied(), "CAP_BPF is missing or valid only inside a user namespace (/proc does not tell)"),
        (closed(errno.EPERM), "CAP_BPF is missing or a seccomp filter refuses bpf(2) (/proc does not tell)"),
        (closed(errno.ENOSYS), "a seccomp filter hides bpf(2) (or the kernel has no bpf(2))"),
    ],
    ids=["denied", "closed", "hidden"],
)
def test_a_hidden_proc_is_admitted(given: dict[str, int], detail: str) -> None:
    probe = explain_bpf(given, UNKNOWN_HOST)
    assert probe.ok is False
    assert_explained(probe, detail, UNIT)


@pytest.mark.parametrize(
    "on",
    [
        host(capabilities=CAP_BPF),
        host(capabilities=CAP_SYS_ADMIN, seccomp=2),
        host((5, 4), last_capability=37, memlock=0),
        UNKNOWN_HOST,
    ],
)
def test_what_works_needs_no_explanation(on: Host) -> None:
    assert explain_bpf(answers(), on) == Probe(
        "eBPF steering", True, "the program loads, with its maps", mode=SteeringMode.EBPF
    )


def test_an_active_filter_is_mentioned_where_either_may_refuse() -> None:
    assert explain_bpf(closed(errno.EPERM), host((5, 10), seccomp=2)).detail.endswith("a seccomp filter is active too")


VERIFIER_LOG = (
    "0: (61) r2 = *(u32 *)(r1 +8)\ninvalid bpf_context access off=8 size=4\nprocessed 1 insns (limit 1000000)"
)


@pytest.mark.parametrize(
    ("number", "call", "log", "on", "detail"),
    [
        (errno.EACCES, "bpf(BPF_PROG_LOAD)", VERIFIER_LOG, host(), "program: invalid bpf_context access off=8 size=4"),
        (errno.EINVAL, "bpf(BPF_PROG_LOAD)", VERIFIER_LOG, host((5, 4)), "program: invalid bpf_context access off=8"),
        (errno.EACCES, "bpf(BPF_PROG_LOAD)", "", host(), "a security module (LSM) denies bpf(2)"),
        (errno.EINVAL, "bpf(BPF_MAP_FREEZE)", "", host((5, 1)), "the kernel is too old"),
    ],
    ids=["verifier EACCES", "verifier EINVAL", "LSM", "no frozen maps"],
)
def test_a_refused_load_names_its_call_and_what_the_verifier_said(
    number: int, call: str, log: str, on: Host, detail: str
) -> None:
    capable = dataclasses.replace(on, capabilities=CAP_SYS_ADMIN)
    probe = explain_bpf(answers(program=number), capable, KernelError(number, call, log))
    assert probe.detail.startswith(f"{call}: ")
    assert detail in probe.detail


def test_a_file_capability_names_the_interpreter_and_what_it_means() -> None:
    remedy = explain_bpf(denied(), host(interpreter="/opt/my python/bin/python3")).remedy
    line = next(line for line in remedy.splitlines() if line.startswith("file: "))
    assert line.startswith("file: setcap cap_bpf+ep '/opt/my python/bin/python3' # every script")
    assert "LD_LIBRARY_PATH" in line
    assert "container: --cap-add BPF (for its root user; and its seccomp profile must allow bpf)" in remedy


def test_nobody_is_told_to_make_an_interpreter_root() -> None:
    assert "setcap" not in explain_bpf(closed(errno.EPERM), host((5, 4), last_capability=37)).remedy


@pytest.mark.parametrize(
    ("number", "ok", "detail", "remedy"),
    [
        (errno.ENOMEM, False, "Cannot allocate memory, net.core.optmem_max", "sysctl -w net.core.optmem_max=131072"),
        (errno.ENOPROTOOPT, False, "the kernel is too old", "kernel: Linux 4.6"),
        (errno.EINVAL, False, "the kernel is too old", "kernel: Linux 4.6"),
        (errno.EPERM, False, "a seccomp filter", ""),
        (errno.EACCES, False, "a seccomp filter", ""),
        (errno.ENOSYS, False, "a seccomp filter", ""),
        (errno.EAFNOSUPPORT, False, "neither IPv4 nor IPv6", ""),
        (ENOTSUPP, False, "the JIT compiler has no room left", "sysctl -w net.core.bpf_jit_limit="),
        (errno.EMFILE, None, "no descriptor left", "ulimit -n"),
        (errno.EDOM, False, "no known cause", ""),
    ],
)
def test_a_refused_socket_call_names_its_cause(number: int, ok: bool | None, detail: str, remedy: str) -> None:
    probe = explain_socket(SteeringMode.CBPF, number, "setsockopt(SO_ATTACH_REUSEPORT_CBPF)")
    assert probe.ok is ok
    assert probe.detail.startswith("setsockopt(SO_ATTACH_REUSEPORT_CBPF): ")
    assert_explained(probe, detail, remedy)


def test_a_small_receive_buffer_is_a_warning() -> None:
    probe = explain_receive_buffer(default=212992, largest=2 * 212992)
    assert (probe.ok, probe.warning) == (True, True)
    assert "net.core.rmem_max is 212992: a burst of 512 small datagrams fills the largest buffer, 256" in probe.detail
    assert probe.remedy == "sysctl -w net.core.rmem_max=8388608"


def test_a_large_receive_buffer_is_none() -> None:
    probe = explain_receive_buffer(default=212992, largest=2 * (4 << 20))
    assert (probe.ok, probe.warning, probe.remedy) == (True, False, "")


@pytest.mark.parametrize("system", ["darwin", "win32", "freebsd14"])
def test_other_systems_have_one_socket_and_one_reason(system: str) -> None:
    found = detect(system)
    assert found.best_mode is SteeringMode.SINGLE
    assert [probe.ok for probe in found.probes] == [False]
    assert system in found.probes[0].detail
    assert found.probe(SteeringMode.EBPF) is None
    assert {mode: refusal(mode, system) for mode in SteeringMode} == {
        SteeringMode.EBPF: found.probes[0],
        SteeringMode.CBPF: found.probes[0],
        SteeringMode.HASH: found.probes[0],
        SteeringMode.SINGLE: None,
    }


def write_proc(proc: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (proc / name).parent.mkdir(parents=True, exist_ok=True)
        (proc / name).write_text(text)
    return proc


def test_a_host_is_read_from_proc(tmp_path: Path) -> None:
    files = {
        "self/status": "Name:\tcat\nCapEff:\t000000c000000000\nNoNewPrivs:\t0\nSeccomp:\t2\n",
        "self/uid_map": "         0     100000      65536\n",
        "sys/kernel/cap_last_cap": "40\n",
    }
    found = read_host(write_proc(tmp_path, files))
    assert found.capabilities == 1 << 38 | 1 << 39
    assert (found.last_capability, found.seccomp, found.user_namespace) == (40, 2, True)


@pytest.mark.parametrize(
    ("id_map", "inside"), [("         0          0 4294967295\n", False), ("0 1000 1\n", True)], ids=["initial", "new"]
)
def test_a_kernel_without_namespace_links_tells_by_its_id_map(tmp_path: Path, id_map: str, inside: bool) -> None:
    assert read_host(write_proc(tmp_path, {"self/uid_map": id_map})).user_namespace is inside


def test_a_hidden_proc_leaves_facts_unknown(tmp_path: Path) -> None:
    found = read_host(tmp_path)
    assert (found.capabilities, found.last_capability, found.seccomp, found.user_namespace) == (None,) * 4


@pytest.mark.parametrize(
    ("content", "ok", "warning", "detail"),
    [("1\n", True, False, "is 1"), ("0\n", True, True, "interpreted"), (None, None, False, "cannot be read")],
    ids=["on", "off", "hidden"],
)
def test_an_interpreted_program_is_a_warning(
    tmp_path: Path, content: str | None, ok: bool | None, warning: bool, detail: str
) -> None:
    proc = write_proc(tmp_path, {} if content is None else {"sys/net/core/bpf_jit_enable": content})
    probe = probe_jit(proc)
    assert (probe.ok, probe.warning) == (ok, warning)
    assert detail in probe.detail


DEBIAN = "#1 SMP PREEMPT_DYNAMIC Debian {} (2026-06-20)"


@pytest.mark.parametrize(
    ("release", "build", "says"),
    [
        ("5.10.0-32-cloud-amd64", DEBIAN.format("5.10.223-1"), "Linux 5.10.223 lacks"),
        ("5.10.0-45-cloud-amd64", DEBIAN.format("5.10.259-1"), None),
        ("6.1.0-47-amd64", DEBIAN.format("6.1.175-1"), "Linux 6.1.175 lacks"),
        ("6.1.0-50-amd64", DEBIAN.format("6.1.176-1"), None),
        ("6.12.94+deb13-amd64", DEBIAN.format("6.12.94-1"), None),
        ("6.12.93", "#1 SMP", "Linux 6.12.93 may lack"),
        ("5.15.0-91-generic", "#101-Ubuntu SMP", "Linux 5.15.0 may lack"),
        ("6.18.44", "#1 SMP", "Linux 6.18.44 may lack"),
        ("7.2.0", "#1 SMP", None),
        ("8.0.0-rc1", "#1 SMP", None),
        ("nonsense", "", "Linux nonsense may lack"),
    ],
)
def test_a_kernel_that_classic_programs_can_crash_is_a_warning(release: str, build: str, says: str | None) -> None:
    probe = explain_classic_fix(release, build)
    if says is None:
        assert probe is None
    else:
        assert probe is not None
        assert (probe.ok, probe.warning) == (True, True)
        assert probe.detail.startswith(f"{says} the fix for CVE-2026-52910")
        assert probe.remedy == "kernel: 5.10.259, 6.1.176, 6.12.94, or 7.2 and later"


def test_a_group_too_large_to_lock_names_the_limit() -> None:
    host = dataclasses.replace(PLAIN, capabilities=CAP_BPF, kernel=(5, 10), memlock=65536)
    probe = explain_group(SteeringMode.EBPF, KernelError(errno.EPERM, "bpf(BPF_MAP_CREATE)"), host)
    assert probe.ok is False
    assert "Operation not permitted, RLIMIT_MEMLOCK of 65536 bytes is too small" in probe.detail
    assert "LimitMEMLOCK=infinity" in probe.remedy


def test_another_refusal_of_a_group_is_told_as_it_is() -> None:
    error = KernelError(errno.E2BIG, "bpf(BPF_PROG_LOAD)", "what the verifier said")
    probe = explain_group(SteeringMode.EBPF, error, PLAIN)
    assert (probe.name, probe.ok, probe.detail) == ("eBPF steering", False, str(error))
