"""What ``quicsteer check`` finds: which modes this host allows, whether they really steer, and who has an address."""

import errno
import os
import platform
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import _kernel, advice, ports
from .addresses import Address, BindAddress, format_address, resolve
from .capability import detect
from .counters import HostStats, read_host, read_udp_memory
from .modes import SteeringMode
from .proof import name_proof, prove
from .triage import Probe, explain_classic_fix
from .version import package_version

WORKS, DOES_NOT_WORK, CANNOT_TELL = 0, 1, 2

_HOLDERS_SHOWN = 8
_WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Report:
    """What was found.

    ``mode`` is the first mode that the host allows and no proof refutes, ``kernel`` the release of the kernel.
    """

    version: str
    kernel: str
    mode: SteeringMode
    probes: tuple[Probe, ...]

    def probe(self, mode: SteeringMode) -> Probe | None:
        """Return the probe of a mode; ``None`` when there is none, as for ``single`` and outside Linux."""
        return next((probe for probe in self.probes if probe.mode is mode), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain types for JSON. Keys are added in later releases, never changed.

        ``version`` of quicsteer, ``kernel``, ``mode``, and ``probes``: a list of ``name``, ``mode`` (the mode that
        was tried, or null), ``ok`` (true, false, or null when it could not be told), ``warning`` (true: works, but
        should be better), ``detail`` (one line) and ``remedy`` (one way out per line, may be empty).
        """
        return {
            "version": self.version,
            "kernel": self.kernel,
            "mode": str(self.mode),
            "probes": [
                {
                    "name": probe.name,
                    "mode": str(probe.mode) if probe.mode else None,
                    "ok": probe.ok,
                    "warning": probe.warning,
                    "detail": probe.detail,
                    "remedy": probe.remedy,
                }
                for probe in self.probes
            ],
        }


def run_checks(bind: Address | Iterable[Address] | None = None, system: str = sys.platform) -> Report:
    """Try this host, and prove each mode that steers with datagrams over loopback.

    ``bind`` is what ``SteeringGroup.open`` takes as addresses: each is bound for a moment, and answers nothing then.

    Raises:
        ValueError, TypeError: ``bind`` is no address.
    """
    addresses = resolve(bind) if bind is not None else []
    allowed = detect(system)
    probes = [_prove(probe) for probe in allowed.probes]
    works = {
        after.mode for before, after in zip(allowed.probes, probes, strict=True) if before.ok and after.ok is not False
    }
    mode = next((mode for mode in SteeringMode if mode in works), SteeringMode.SINGLE)
    if mode is SteeringMode.CBPF:
        probes += probe_classic_fix(os.uname())
    probes += [*explain_host(read_host(), read_udp_memory()), *probe_hash_seed(os.environ)]
    probes += [*(probe_address(address) for address in addresses)]
    return Report(package_version(), platform.release(), mode, tuple(probes))


def exit_status(report: Report, required: SteeringMode | None = None) -> int:
    """Return 0 when CID steering, or the required mode, works here; 1 when it does not; 2 when it could not be told.

    An address that cannot be had makes it 1.
    """
    if any(probe.ok is False for probe in report.probes if probe.mode is None):
        return DOES_NOT_WORK
    if required is SteeringMode.SINGLE:
        return WORKS
    wanted = [required] if required else [mode for mode in SteeringMode if mode.steers]
    answers = [probe.ok for probe in map(report.probe, wanted) if probe]
    if True in answers:
        return WORKS
    return CANNOT_TELL if None in answers else DOES_NOT_WORK


def _prove(probe: Probe) -> Probe:
    """Replace the probe of a mode that steers by its proof, if the host allows the mode."""
    if probe.mode is None or not probe.mode.steers:
        return probe
    return prove(probe.mode) if probe.ok else replace(probe, name=name_proof(probe.mode))


def explain_host(host: HostStats | None, memory: tuple[int, int, int] | None) -> list[Probe]:
    """Say what UDP lost on this host since boot, with advice where memory is short; nothing without /proc."""
    if host is None or memory is None:
        return []
    pages, pressure, most = memory
    warnings = [sentence for sentence in (advice.udp_memory(*memory), advice.memory_errors(host)) if sentence]
    detail = (
        f"since boot {advice.count(host.rcvbuf_errors, 'datagram')} found no room in a receive buffer and "
        f"{host.mem_errors:,} no memory; {pages} of {most} pages in use"
    )
    remedy = f"sysctl -w net.ipv4.udp_mem='{pressure} {2 * pressure} {2 * most}'" if warnings else ""
    return [Probe("UDP on this host", True, " ".join([detail, *warnings]), remedy, warning=bool(warnings))]


def probe_classic_fix(kernel: os.uname_result) -> list[Probe]:
    """Warn when the kernel can be crashed by whoever replaces the classic program of a live group."""
    probe = explain_classic_fix(kernel.release, kernel.version)
    return [probe] if probe else []


def probe_hash_seed(environment: Mapping[str, str]) -> list[Probe]:
    """Warn when Python's hashes are the same in every process: then a client can make its connection IDs collide."""
    seed = environment.get("PYTHONHASHSEED", "")
    if not seed.isdecimal():
        return []
    detail = f"PYTHONHASHSEED is {seed}: who knows it can slow down a server's tables of connection IDs"
    return [Probe("hash seed", True, detail, "shell: unset PYTHONHASHSEED", warning=True)]


def probe_address(address: BindAddress) -> Probe:
    """Bind an address for a moment, as a group claims it, and name who is on the port."""
    name, port = f"address {address}", address.sockaddr[1]
    try:
        _claim(address)
    except OSError as error:
        return _explain_bind(name, port, error)
    others = describe(ports.holders(port), port) if port else ""
    return Probe(name, True, f"free; on the port, with traffic of its own: {others}" if others else "free")


def _claim(address: BindAddress) -> None:
    """Bind a silent socket that shares with nobody, and close it: fails as the claim of a group does."""
    with socket.socket(address.family, socket.SOCK_DGRAM, socket.IPPROTO_UDP) as sock:
        if address.v6only is not None:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address.v6only)
        if sys.platform == "linux":
            _kernel.close_filter(sock.fileno())
        sock.bind(address.sockaddr)


def _explain_bind(name: str, port: int, error: OSError) -> Probe:
    if error.errno == errno.EADDRINUSE:
        return _explain_taken(name, port, ports.holders(port))
    remedies = {
        errno.EACCES: "systemd unit: AmbientCapabilities=CAP_NET_BIND_SERVICE\n"
        f"sysctl -w net.ipv4.ip_unprivileged_port_start={port}",
        errno.EADDRNOTAVAIL: "shell: ip address",
    }
    known = error.errno in (errno.EACCES, errno.EPERM, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
    return Probe(name, False if known else None, f"bind: {error.strerror}", remedies.get(error.errno or 0, ""))


def _explain_taken(name: str, port: int, holders: list[ports.Holder]) -> Probe:
    if not holders:
        return Probe(name, False, "taken; who has it cannot be seen from here")
    detail = f"taken; on the port: {describe(holders, port)}"
    hosts = {holder.host for holder in holders}
    if hosts.intersection(_WILDCARDS) and hosts.difference(_WILDCARDS):
        detail += "; datagrams to an address that has a socket of its own go there, not to the wildcard"
    return Probe(name, False, detail, f"shell: ss -ulpn 'sport = :{port}'")


def describe(holders: Iterable[ports.Holder], port: int) -> str:
    """Return who has which address: each process and address once, and how many sockets it has there."""
    counts = Counter(f"{holder} on {format_address((holder.host, port))}" for holder in holders)
    texts = [f"{text} ({count} sockets)" if count > 1 else text for text, count in counts.items()]
    more = [f"{len(texts) - _HOLDERS_SHOWN} more"] if len(texts) > _HOLDERS_SHOWN else []
    return ", ".join(texts[:_HOLDERS_SHOWN] + more)
