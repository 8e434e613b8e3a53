"""Whether this host can steer, and if not: which call was refused, why, and what would change that.

Trying decides, never a version number: every mode is tried on a socket of its own that is never bound, and bpf(2) in
a child process, because a seccomp filter may kill who calls it. Versions, capabilities and limits only explain a
refusal (``triage``). No traffic is sent and nothing stays open.
"""

import errno
import os
import platform
import re
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from . import _kernel
from .abi import CID_LENGTH_DEFAULT, KEY_LENGTH
from .classic import steering_program
from .errors import KernelError
from .modes import SteeringMode
from .triage import (
    SHORTAGES,
    Host,
    Probe,
    explain_bpf,
    explain_group,
    explain_receive_buffer,
    explain_socket,
    explain_system,
    mode_probe,
)

if sys.platform != "win32":
    import resource

__all__ = [
    "Capabilities",
    "Probe",
    "detect",
    "explain_refusal",
    "probe_cbpf",
    "probe_ebpf",
    "probe_jit",
    "probe_kernel",
    "probe_receive_buffer",
    "probe_reuseport",
    "read_host",
    "refusal",
]

_PROC = Path("/proc")
_INITIAL_USER_NAMESPACE = "user:[4026531837]"  # USER_NS_INIT_INO (include/uapi/linux/nsfs.h)
_WHOLE_ID_RANGE = ["0", "0", "4294967295"]


@dataclass(frozen=True)
class Capabilities:
    """What ``detect()`` found: all probes, and the first mode that works."""

    probes: tuple[Probe, ...]
    best_mode: SteeringMode

    def probe(self, mode: SteeringMode) -> Probe | None:
        """Return the probe of a mode; ``None`` when there is none, as for ``single`` and outside Linux."""
        return next((probe for probe in self.probes if probe.mode is mode), None)


def detect(system: str = sys.platform) -> Capabilities:
    """Try every mode on this host, or on a ``sys.platform`` that is not Linux say why there is none."""
    if system != "linux":
        return Capabilities((explain_system(system),), SteeringMode.SINGLE)
    modes = {SteeringMode.EBPF: probe_ebpf(), SteeringMode.CBPF: probe_cbpf(), SteeringMode.HASH: probe_reuseport()}
    best = next((mode for mode, probe in modes.items() if probe.ok), SteeringMode.SINGLE)
    probes = (probe_kernel(), *reversed(modes.values()), probe_jit(), probe_receive_buffer())
    return Capabilities(probes, best)


def refusal(mode: SteeringMode, system: str = sys.platform) -> Probe | None:
    """Return why a mode does not work here, or cannot be tried; ``None`` when it works."""
    if mode is SteeringMode.SINGLE:
        return None
    if system != "linux":
        return explain_system(system)
    probes = {SteeringMode.EBPF: probe_ebpf, SteeringMode.CBPF: probe_cbpf, SteeringMode.HASH: probe_reuseport}
    probe = probes[mode]()
    return None if probe.ok else probe


def explain_refusal(mode: SteeringMode, error: KernelError) -> Probe:
    """Return what it means that a group's program was refused, though the smaller one of a probe was not."""
    return explain_group(mode, error, read_host())


def probe_ebpf() -> Probe:
    """Make the maps and load the program, first in a child process."""
    try:
        answers = _kernel.probe_bpf()
    except KernelError as error:
        cause = SHORTAGES.get(error.errno or 0, "the child process ended without an answer")
        return mode_probe(SteeringMode.EBPF, None, f"{error}, {cause}; bpf(2) is tried in a child process")
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
        return explain_socket(SteeringMode.CBPF, error.errno or 0, error.call)
    return mode_probe(SteeringMode.CBPF, True, "a steering program attaches to a socket, no capability needed")


def probe_reuseport() -> Probe:
    """Let a socket share its port."""
    try:
        _open_socket().close()
    except KernelError as error:
        return explain_socket(SteeringMode.HASH, error.errno or 0, error.call)
    return mode_probe(SteeringMode.HASH, True, "sockets can share an address (SO_REUSEPORT)")


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
