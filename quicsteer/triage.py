"""What a refusal means: from the kernel's answers and the facts of a host to a cause and a way out. No I/O."""

import errno
import os
import re
import shlex
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .errors import KernelError
from .modes import SteeringMode

# Numbers of capabilities (include/uapi/linux/capability.h).
_CAP_SYS_ADMIN = 21
_CAP_BPF = 39

_SECCOMP_FILTER = 2  # "Seccomp:" of /proc/PID/status
_ENOTSUPP = 524  # kernel-internal, but the JIT compiler lets it out

_DENIALS = (errno.EPERM, errno.EACCES)
SHORTAGES = {
    errno.EMFILE: "this process has no descriptor left",
    errno.ENFILE: "this host has no descriptor left",
    errno.ENOMEM: "the kernel or the control group has no memory left",
    errno.EAGAIN: "this user or control group may start no more processes, or the kernel was interrupted",
}
"""Errors that say nothing about a mode: the same call may succeed later."""

SMALL_DATAGRAM_BYTES = 832
"""Bytes of a receive buffer that a datagram of up to 197 bytes takes (measured, Linux 6.18; 198 bytes take 1,280)."""

RECEIVE_BUFFER_WISH = 4 << 20
"""Bytes that net.core.rmem_max should allow: some 10,000 small datagrams fit then, 0.1 s of 100,000 a second."""

_CLASSIC_FIXES = {(5, 10): 259, (6, 1): 176, (6, 12): 94}
"""First releases of long-lived kernels that free classic programs of groups safely (CVE-2026-52910)."""

_CLASSIC_FIX_EVERYWHERE = (7, 2)
_RELEASE = re.compile(r"(\d+)\.(\d+)\.(\d+)")
_DEBIAN_RELEASE = re.compile(r"Debian (\d+)\.(\d+)\.(\d+)")

_NAMES = {
    SteeringMode.EBPF: "eBPF steering",
    SteeringMode.CBPF: "classic BPF steering",
    SteeringMode.HASH: "shared port",
}


@dataclass(frozen=True)
class Probe:
    """The answer to one question about this host.

    ``ok`` is ``None`` when it could not be told. ``detail`` is one line; ``remedy`` has one way out per line, to be
    pasted behind its label. ``warning`` marks what works, but should be better. ``mode`` is the mode that was tried.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""
    warning: bool = False
    mode: SteeringMode | None = None


@dataclass(frozen=True)
class Host:
    """What explains a refusal; ``None`` stands for "cannot be told", as where /proc is hidden.

    ``capabilities`` is the effective set as a bit mask, ``last_capability`` the highest number that the kernel knows,
    ``seccomp`` the mode (0 none, 2 filter), ``memlock`` the soft RLIMIT_MEMLOCK in bytes (``None``: unlimited),
    ``interpreter`` the file that a file capability would be put on.
    """

    capabilities: int | None
    last_capability: int | None
    seccomp: int | None
    user_namespace: bool | None
    kernel: tuple[int, int]
    release: str
    memlock: int | None
    interpreter: str

    @property
    def wanted(self) -> str:
        """The least capability for eBPF steering. A kernel says whether it has CAP_BPF; otherwise 5.8 and later do."""
        known = self.kernel >= (5, 8) if self.last_capability is None else self.last_capability >= _CAP_BPF
        return "CAP_BPF" if known else "CAP_SYS_ADMIN"

    @property
    def container_flag(self) -> str:
        """The flag that gives a container the least capability, for docker and podman alike."""
        return f"--cap-add {self.wanted.removeprefix('CAP_')}"

    @property
    def capable(self) -> bool | None:
        """Whether this process has a capability that bpf(2) accepts, in its own user namespace."""
        if self.capabilities is None:
            return None
        return bool(self.capabilities & (1 << _CAP_BPF | 1 << _CAP_SYS_ADMIN))


class _Cause(NamedTuple):
    text: str
    remedy: str = ""
    certain: bool = True  # whether the same call would be refused again


def mode_probe(mode: SteeringMode, ok: bool | None, detail: str, remedy: str = "") -> Probe:
    """Return the answer to whether a mode works here."""
    return Probe(_NAMES[mode], ok, detail, remedy, mode=mode)


def explain_bpf(answers: Mapping[str, int], host: Host, failure: KernelError | None = None) -> Probe:
    """Return what the answers of ``_kernel.probe_bpf()`` mean on a host.

    Each answer is an errno; unknown commands are answered EFAULT and EINVAL by a kernel that lets the call through.
    ``failure`` is the refusal of ``_kernel.load_program()``, if that was asked too: it names the call, and its detail
    is what the verifier said.
    """
    call, number = "bpf(BPF_MAP_CREATE)", answers["array"] or answers["socket_array"]
    if answers["signal"]:
        return _explain_signal(answers["signal"], host)
    if not number and not answers["program"]:
        return mode_probe(SteeringMode.EBPF, True, "the program loads, with its maps")
    if answers["bad_pointer"] != errno.EFAULT:
        number = answers["bad_pointer"]
        cause = _explain_closed(number, host)
    elif answers["bad_command"] in _DENIALS:
        number = answers["bad_command"]
        cause = _security_module("bpf(2)")
    elif number:
        cause = _explain_map(number, host, "an array" if answers["array"] else "a REUSEPORT_SOCKARRAY")
    else:
        call, number = failure.call if failure else "bpf(BPF_PROG_LOAD)", answers["program"]
        cause = _explain_program(number, host, failure)
    return _refused(SteeringMode.EBPF, number, call, cause)


def explain_group(mode: SteeringMode, error: KernelError, host: Host) -> Probe:
    """Return what it means that the maps or the program of a whole group are refused."""
    if error.errno == errno.EPERM and error.call.startswith("bpf("):
        return _refused(mode, errno.EPERM, error.call, _explain_denial(host))
    return mode_probe(mode, False, str(error))


def _refused(mode: SteeringMode, number: int, call: str, cause: _Cause) -> Probe:
    detail = f"{call}: {os.strerror(number)}, {cause.text}"
    return mode_probe(mode, False if cause.certain else None, detail, cause.remedy)


def _explain_signal(number: int, host: Host) -> Probe:
    if number == signal.SIGSYS:
        return mode_probe(
            SteeringMode.EBPF, False, "bpf(2): a seccomp filter kills the caller (SIGSYS)", _seccomp_remedy(host)
        )
    return mode_probe(SteeringMode.EBPF, None, f"bpf(2): the child process that tried it was ended by signal {number}")


def _explain_closed(number: int, host: Host) -> _Cause:
    """Explain a call that is refused whatever its command: it never reached the kernel's own checks of it.

    Kernels before 5.19 close bpf(2) like that to everybody without capability, later ones only map and program.
    """
    if number == errno.ENOSYS:
        if host.seccomp == 0:
            return _Cause("this kernel is built without bpf(2)", "kernel: CONFIG_BPF_SYSCALL=y")
        doubt = " (or the kernel has no bpf(2))" if host.seccomp is None else ""
        return _Cause(f"a seccomp filter hides bpf(2){doubt}", _seccomp_remedy(host))
    reaches_kernel = host.kernel >= (5, 19) or (host.capable and host.user_namespace is False)
    if host.seccomp == _SECCOMP_FILTER and reaches_kernel:
        return _Cause("a seccomp filter refuses bpf(2)", _seccomp_remedy(host))
    if host.seccomp is None:
        text = f"{host.wanted} is missing or a seccomp filter refuses bpf(2) (/proc does not tell)"
        return _Cause(text, _seccomp_remedy(host))
    cause = _explain_denial(host)
    return cause._replace(text=f"{cause.text}; a seccomp filter is active too") if host.seccomp else cause


def _explain_map(number: int, host: Host, kind: str) -> _Cause:
    if number == errno.EPERM:
        return _explain_denial(host)
    if number == errno.EACCES:
        return _security_module("bpf(2)")
    if number in (errno.EINVAL, errno.E2BIG):
        return _too_old(host, f"it cannot make {kind} map as Linux 4.19 can")
    return _explain_other(number)


def _explain_program(number: int, host: Host, failure: KernelError | None) -> _Cause:
    log = failure.detail.splitlines() if failure else []
    reason = next((line for line in reversed(log) if not line.startswith("processed ")), "")
    if number == errno.EPERM:
        return _explain_denial(host)
    if number == errno.EINVAL and not reason and host.kernel < (5, 5):
        return _too_old(host, "frozen maps need 5.2, maps shared as memory 5.5")
    if number == errno.EACCES and failure and not reason:
        return _security_module("bpf(2)")
    causes = {
        errno.EACCES: _Cause(f"the verifier refuses the program: {reason}".rstrip(": ")),
        errno.EINVAL: _Cause(f"the verifier refuses the program: {reason}".rstrip(": ")),
        errno.E2BIG: _too_old(host, "the program is too long for its verifier"),
        _ENOTSUPP: _Cause("the JIT compiler cannot compile the program"),
    }
    return causes.get(number) or _explain_other(number)


def _explain_denial(host: Host) -> _Cause:
    """Explain EPERM from a call that got through."""
    if host.capable is None:
        text = f"{host.wanted} is missing or valid only inside a user namespace (/proc does not tell)"
        return _Cause(text, _capability_remedy(host))
    if not host.capable:
        return _Cause(f"{host.wanted} is missing", _capability_remedy(host))
    if host.user_namespace:
        text = "capabilities are valid only inside this user namespace"
        container = f"container: --userns=host {host.container_flag} (from an engine that root runs)"
        return _Cause(text, f"systemd unit: PrivateUsers=no\n{container}")
    if host.kernel < (5, 11) and host.memlock is not None:
        text = f"RLIMIT_MEMLOCK of {host.memlock} bytes is too small (it counts for maps before Linux 5.11)"
        remedy = "systemd unit: LimitMEMLOCK=infinity\nshell: ulimit -l unlimited\ncontainer: --ulimit memlock=-1"
        return _Cause(text, remedy)
    return _security_module(host.wanted)


def _explain_other(number: int) -> _Cause:
    if number in SHORTAGES:
        return _Cause(SHORTAGES[number], "shell: ulimit -n 65536" if number == errno.EMFILE else "", certain=False)
    return _Cause("no known cause")


def _too_old(host: Host, why: str) -> _Cause:
    return _Cause(f"the kernel is too old (Linux {host.release}): {why}", "kernel: Linux 5.8 or later")


def _security_module(what: str) -> _Cause:
    remedy = (
        "which: cat /sys/kernel/security/lsm; journalctl -k --grep denied\n"
        "SELinux rule: allow DOMAIN self:bpf { map_create map_read map_write prog_load prog_run };\n"
        "AppArmor rule: capability bpf,"
    )
    return _Cause(f"a security module (LSM) denies {what}", remedy)


def _seccomp_remedy(host: Host) -> str:
    lines = [
        "systemd unit: SystemCallFilter=bpf",
        f"container: {host.container_flag} --security-opt seccomp=PROFILE.json (which must allow bpf)",
    ]
    return "\n".join(lines if host.capable else [f"systemd unit: AmbientCapabilities={host.wanted}", *lines])


def _capability_remedy(host: Host) -> str:
    lines = [
        f"systemd unit: AmbientCapabilities={host.wanted}",
        f"container: {host.container_flag} (for its root user; and its seccomp profile must allow bpf)",
    ]
    if host.wanted != "CAP_BPF":  # a file with CAP_SYS_ADMIN would make every user root
        return "\n".join([*lines, "kernel: Linux 5.8 or later, where CAP_BPF is enough"])
    caveat = (
        "every script that anybody runs with it gets CAP_BPF; the dynamic loader then ignores LD_LIBRARY_PATH, and "
        "other processes of the same user cannot trace it or read its /proc entries"
    )
    return "\n".join([*lines, f"file: setcap cap_bpf+ep {shlex.quote(host.interpreter)} # {caveat}"])


def explain_socket(mode: SteeringMode, number: int, call: str) -> Probe:
    """Return what a refused call on a fresh socket means."""
    old = _Cause("the kernel is too old for it, or refuses the program", "kernel: Linux 4.6 or later")
    forbidden = _Cause("a seccomp filter or a program of the control group forbids it")
    causes = {
        errno.ENOMEM: _Cause("net.core.optmem_max is too small for it", "sysctl -w net.core.optmem_max=131072"),
        _ENOTSUPP: _Cause("the JIT compiler has no room left", "sysctl -w net.core.bpf_jit_limit=1073741824"),
        errno.ENOPROTOOPT: old,
        errno.EINVAL: old,
        errno.EPERM: forbidden,
        errno.EACCES: forbidden,
        errno.ENOSYS: forbidden,
        errno.EAFNOSUPPORT: _Cause("neither IPv4 nor IPv6 is available"),
    }
    cause = causes.get(number) or _explain_other(number)
    return _refused(mode, number, call, cause)


def explain_receive_buffer(default: int, largest: int) -> Probe:
    """Return how long a burst fits the receive buffers that the kernel gives, in bytes as SO_RCVBUF reads.

    A buffer that is asked for is twice as large as asked: net.core.rmem_max limits what can be asked for.
    """
    limit = largest // 2
    detail = (
        f"net.core.rmem_max is {limit}: a burst of {largest // SMALL_DATAGRAM_BYTES} small datagrams fills the largest "
        f"buffer, {default // SMALL_DATAGRAM_BYTES} fill the default one"
    )
    if limit >= RECEIVE_BUFFER_WISH:
        return Probe("receive buffer", True, detail)
    return Probe("receive buffer", True, detail, "sysctl -w net.core.rmem_max=8388608", warning=True)


def explain_classic_fix(release: str, build: str) -> Probe | None:
    """Return a warning where any local user may crash the kernel with classic programs, or ``None`` where not.

    ``release`` and ``build`` are as uname(2) has them: Debian names the upstream release in the latter only.
    """
    found = _DEBIAN_RELEASE.search(build) or _RELEASE.match(release)
    major, minor, patch = map(int, found.groups()) if found else (0, 0, 0)
    fixed = _CLASSIC_FIXES.get((major, minor))
    if (major, minor) >= _CLASSIC_FIX_EVERYWHERE or (fixed is not None and patch >= fixed):
        return None
    name = f"{major}.{minor}.{patch}" if found else release
    certain = "lacks" if fixed is not None and _DEBIAN_RELEASE.search(build) else "may lack"
    detail = (
        f"Linux {name} {certain} the fix for CVE-2026-52910: who replaces the classic program of a group that gets "
        "datagrams can crash the host, without privileges. quicsteer never replaces one"
    )
    known = ", ".join(f"{major}.{minor}.{patch}" for (major, minor), patch in _CLASSIC_FIXES.items())
    remedy = f"kernel: {known}, or {'.'.join(map(str, _CLASSIC_FIX_EVERYWHERE))} and later"
    return Probe("kernel fix", True, detail, remedy, warning=True)


def explain_system(system: str) -> Probe:
    return Probe("operating system", False, f"{system} has no programs that steer datagrams, Linux 4.6 and later has")
