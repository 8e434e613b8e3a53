"""Whether this host can steer, and if not: which call was refused, why, and what would change that.

Trying decides, never a version number: every mode is tried on a socket of its own that is never bound, and bpf(2) in
a child process, because a seccomp filter may kill who calls it. Versions, capabilities and limits only explain a
refusal. No traffic is sent and nothing stays open.
"""

import errno
import os
import platform
import re
import shlex
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import _kernel
from .abi import CID_LENGTH_DEFAULT, KEY_LENGTH
from .classic import steering_program
from .errors import KernelError
from .modes import SteeringMode

if sys.platform != "win32":
    import resource

_PROC = Path("/proc")

# Numbers of capabilities (include/uapi/linux/capability.h).
_CAP_SYS_ADMIN = 21
_CAP_BPF = 39

_SECCOMP_FILTER = 2  # "Seccomp:" of /proc/PID/status
_INITIAL_USER_NAMESPACE = "user:[4026531837]"  # USER_NS_INIT_INO (include/uapi/linux/nsfs.h)
_WHOLE_ID_RANGE = ["0", "0", "4294967295"]
_ENOTSUPP = 524  # kernel-internal, but the JIT compiler lets it out

_DENIALS = (errno.EPERM, errno.EACCES)
_SHORTAGES = {
    errno.EMFILE: "this process has no descriptor left",
    errno.ENFILE: "this host has no descriptor left",
    errno.ENOMEM: "the kernel or the control group has no memory left",
    errno.EAGAIN: "this user or control group may start no more processes, or the kernel was interrupted",
}

SMALL_DATAGRAM_BYTES = 832
"""Bytes of a receive buffer that a datagram of up to 197 bytes takes (measured, Linux 6.18; 198 bytes take 1,280)."""

RECEIVE_BUFFER_WISH = 4 << 20
"""Bytes that net.core.rmem_max should allow: some 10,000 small datagrams fit then, 0.1 s of 100,000 a second."""

_EBPF, _CBPF, _HASH = "eBPF steering", "classic BPF steering", "shared port"
_NAMES = {SteeringMode.EBPF: _EBPF, SteeringMode.CBPF: _CBPF, SteeringMode.HASH: _HASH}


@dataclass(frozen=True)
class Probe:
    """The answer to one question about this host.

    ``ok`` is ``None`` when it could not be told. ``detail`` is one line; ``remedy`` has one way out per line, to be
    pasted behind its label. ``warning`` marks what works, but should be better.
    """

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""
    warning: bool = False


@dataclass(frozen=True)
class Capabilities:
    """What ``detect()`` found: all probes, and the first mode that works."""

    probes: tuple[Probe, ...]
    best_mode: SteeringMode

    def probe(self, mode: SteeringMode) -> Probe | None:
        """Return the probe of a mode; ``None`` when there is none, as for ``single`` and outside Linux."""
        return next((probe for probe in self.probes if probe.name == _NAMES.get(mode)), None)


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


def detect(system: str = sys.platform) -> Capabilities:
    """Try every mode on this host, or on a ``sys.platform`` that is not Linux say why there is none."""
    if system != "linux":
        return Capabilities((_explain_system(system),), SteeringMode.SINGLE)
    modes = {SteeringMode.EBPF: probe_ebpf(), SteeringMode.CBPF: probe_cbpf(), SteeringMode.HASH: probe_reuseport()}
    best = next((mode for mode, probe in modes.items() if probe.ok), SteeringMode.SINGLE)
    probes = (probe_kernel(), *reversed(modes.values()), probe_receive_buffer(), probe_jit())
    return Capabilities(probes, best)


def refusal(mode: SteeringMode, system: str = sys.platform) -> Probe | None:
    """Return why a mode does not work here, or cannot be tried; ``None`` when it works."""
    if mode is SteeringMode.SINGLE:
        return None
    if system != "linux":
        return _explain_system(system)
    probes = {SteeringMode.EBPF: probe_ebpf, SteeringMode.CBPF: probe_cbpf, SteeringMode.HASH: probe_reuseport}
    probe = probes[mode]()
    return None if probe.ok else probe


def probe_ebpf() -> Probe:
    """Make the maps and load the program, first in a child process."""
    try:
        answers = _kernel.probe_bpf()
    except KernelError as error:
        cause = _SHORTAGES.get(error.errno or 0, "the child process ended without an answer")
        return Probe(_EBPF, None, f"{error}, {cause}; bpf(2) is tried in a child process")
    failure = None
    if answers["program"] and not (answers["signal"] or answers["array"] or answers["socket_array"]):
        failure = _load_again()
        answers = {**answers, "program": failure.errno or 0 if failure else 0}
    return explain_bpf(answers, read_host(), failure)


def probe_cbpf() -> Probe:
    """Attach a steering program to a socket that is never bound."""
    program = steering_program(bytes(KEY_LENGTH), CID_LENGTH_DEFAULT, listeners=1, slots=1, drop_invalid=False)
    try:
        with _open_socket() as sock:
            _kernel.attach_classic(sock.fileno(), program)
    except KernelError as error:
        return explain_socket(_CBPF, error.errno or 0, error.call)
    return Probe(_CBPF, True, "a steering program attaches to a socket, no capability needed")


def probe_reuseport() -> Probe:
    """Let a socket share its port."""
    try:
        _open_socket().close()
    except KernelError as error:
        return explain_socket(_HASH, error.errno or 0, error.call)
    return Probe(_HASH, True, "sockets can share an address (SO_REUSEPORT)")


def probe_receive_buffer() -> Probe:
    """Ask for the largest receive buffer: containers hide the sysctl, but never the answer."""
    try:
        with _open_socket() as sock:
            default = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 30)
            largest = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    except OSError as error:
        return Probe("receive buffer", None, f"SO_RCVBUF cannot be tried: {error}")
    return explain_receive_buffer(default, largest)


def probe_kernel() -> Probe:
    """Name the kernel. Only the other probes know what it can do: distributions carry features back."""
    host = read_host()
    name = f"Linux {host.kernel[0]}.{host.kernel[1]}"
    return Probe(name, True, "classic steering needs 4.6, eBPF 5.8 with CAP_BPF", warning=host.kernel < (4, 6))


def probe_jit(proc: Path = _PROC) -> Probe:
    """Tell whether BPF programs are compiled; only the initial network namespace shows it."""
    try:
        enabled = int((proc / "sys/net/core/bpf_jit_enable").read_text())
    except OSError as error:
        return Probe("BPF compiler", None, f"net.core.bpf_jit_enable cannot be read: {error.strerror}")
    if enabled:
        return Probe("BPF compiler", True, f"net.core.bpf_jit_enable is {enabled}")
    detail = "net.core.bpf_jit_enable is 0: programs are interpreted, steering works but takes longer"
    return Probe("BPF compiler", True, detail, "sysctl -w net.core.bpf_jit_enable=1", warning=True)


def read_host(proc: Path = _PROC) -> Host:
    """Read what explains a refusal."""
    status = dict(re.findall(r"^(\w+):\s*(\S+)", _read(proc / "self/status"), re.MULTILINE))
    last = _read(proc / "sys/kernel/cap_last_cap")
    release = platform.release()
    version = re.match(r"(\d+)\.(\d+)", release)
    return Host(
        capabilities=int(status["CapEff"], 16) if "CapEff" in status else None,
        last_capability=int(last) if last else None,
        seccomp=int(status["Seccomp"]) if "Seccomp" in status else None,
        user_namespace=_in_user_namespace(proc),
        kernel=(int(version[1]), int(version[2])) if version else (0, 0),
        release=release,
        memlock=_soft_memlock(),
        interpreter=os.path.realpath(sys.executable),
    )


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
        return Probe(_EBPF, True, "the program loads, with its maps")
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
    return _refused(_EBPF, number, call, cause)


def _refused(name: str, number: int, call: str, cause: _Cause) -> Probe:
    detail = f"{call}: {os.strerror(number)}, {cause.text}"
    return Probe(name, False if cause.certain else None, detail, cause.remedy)


def _explain_signal(number: int, host: Host) -> Probe:
    if number == signal.SIGSYS:
        return Probe(_EBPF, False, "bpf(2): a seccomp filter kills the caller (SIGSYS)", _seccomp_remedy(host))
    return Probe(_EBPF, None, f"bpf(2): the child process that tried it was ended by signal {number}")


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
    if number in _SHORTAGES:
        return _Cause(_SHORTAGES[number], "shell: ulimit -n 65536" if number == errno.EMFILE else "", certain=False)
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


def explain_socket(name: str, number: int, call: str) -> Probe:
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
    return _refused(name, number, call, cause)


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


def _explain_system(system: str) -> Probe:
    return Probe("operating system", False, f"{system} has no programs that steer datagrams, Linux 4.6 and later has")


def _load_again() -> KernelError | None:
    """Load in this process, which the child proved to be harmless, to learn the call and the verifier's words."""
    try:
        descriptors = _kernel.load_program(bytes(KEY_LENGTH), CID_LENGTH_DEFAULT, 1, 1, False)
    except KernelError as error:
        return error
    for descriptor in descriptors:
        os.close(descriptor)
    return None


def _open_socket() -> socket.socket:
    """Return an unbound UDP socket that may share its port, of IPv4 where there is IPv4."""
    try:
        sock = _udp_socket()
    except OSError as error:
        raise KernelError(error.errno or 0, "socket") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError as error:
        sock.close()
        raise KernelError(error.errno or 0, "setsockopt(SO_REUSEPORT)") from error
    return sock


def _udp_socket() -> socket.socket:
    try:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _in_user_namespace(proc: Path) -> bool | None:
    try:
        return os.readlink(proc / "self/ns/user") != _INITIAL_USER_NAMESPACE
    except OSError:
        id_map = _read(proc / "self/uid_map")
        return id_map.split() != _WHOLE_ID_RANGE if id_map else None


def _soft_memlock() -> int | None:
    if sys.platform == "win32":
        return None
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if soft == resource.RLIM_INFINITY else soft
