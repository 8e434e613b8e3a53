"""Runs a scenario in network namespaces of its own: a server's and a client's, with loopback and a pair of veths.

The scenario runs in a forked child, so that what the package reads of /proc/net is the namespace's. In it this process
stands in the server's namespace; only sockets are made in the client's, and stay there.
"""

import ctypes
import os
import pickle
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_LINK = "qs0"
_HOSTS = {socket.AF_INET: ("192.0.2.1", "192.0.2.2"), socket.AF_INET6: ("2001:db8::1", "2001:db8::2")}
_PREFIXES = {socket.AF_INET: 24, socket.AF_INET6: 64}

SERVER_HOSTS = {family: hosts[0] for family, hosts in _HOSTS.items()}
"""The server's addresses on the veth."""

ICMP_ERRORS = ("OutDestUnreachs", "OutTimeExcds", "OutParmProbs", "Icmp6OutDestUnreachs", "Icmp6OutParmProblems")
"""Counters of /proc/net/snmp and snmp6 for answers that a server of UDP should never send."""


def _call(function: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


class Network:
    """The two namespaces, seen from the server's."""

    def __init__(self, mtu: int = 1500) -> None:
        self._server = self._new()
        self._client = self._new()
        _ip("link", "set", "lo", "up")
        _ip("link", "add", _LINK, "mtu", str(mtu), "type", "veth", "peer", "name", "far", "mtu", str(mtu))
        _ip("link", "set", "far", "netns", f"/proc/{os.getpid()}/fd/{self._server}")
        self._configure(_LINK, 1)
        _call("setns", self._server, _CLONE_NEWNET)
        _ip("link", "set", "lo", "up")
        _ip("link", "set", "far", "name", _LINK)
        self._configure(_LINK, 0)

    @staticmethod
    def _new() -> int:
        _call("unshare", _CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    @staticmethod
    def _configure(link: str, end: int) -> None:
        _ip("link", "set", link, "up")
        for family, hosts in _HOSTS.items():
            options = ["nodad"] if family == socket.AF_INET6 else []
            _ip("address", "add", f"{hosts[end]}/{_PREFIXES[family]}", "dev", link, *options)

    @contextmanager
    def client(self, address: Any) -> Iterator[socket.socket]:
        """Yield a socket in the client's namespace that is connected to an address of the server."""
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        _call("setns", self._client, _CLONE_NEWNET)
        try:
            sock = socket.socket(family, socket.SOCK_DGRAM)
        finally:
            _call("setns", self._server, _CLONE_NEWNET)
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            sock.connect(address)
            yield sock


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def read_counters() -> dict[str, int]:
    """Return the counters of IP, ICMP and UDP of this network namespace by name."""
    counters: dict[str, int] = {}
    lines = [line.split() for line in Path("/proc/self/net/snmp").read_text().splitlines()]
    for names, values in zip(lines[::2], lines[1::2], strict=True):
        counters |= {f"{names[0]}{name}": int(value) for name, value in zip(names[1:], values[1:], strict=True)}
        counters |= {name: int(value) for name, value in zip(names[1:], values[1:], strict=True) if names[0] == "Icmp:"}
    for line in Path("/proc/self/net/snmp6").read_text().splitlines():
        name, value = line.split()
        counters[name] = int(value)
    return counters


def isolated(scenario: Callable[..., Any], *arguments: Any) -> Any:
    """Run a scenario in a forked child, in which it may enter other namespaces, and return what it returns.

    Raises: AssertionError with the child's traceback when it fails.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        _run_child(scenario, arguments, theirs)
    os.close(theirs)
    with os.fdopen(ours, "rb") as answers:
        answer = answers.read()
    status = os.waitpid(child, 0)[1]
    assert answer, f"the child ended with {os.waitstatus_to_exitcode(status)}"
    worked, result = pickle.loads(answer)
    if not worked:
        pytest.fail(result, pytrace=False)
    return result


def _run_child(scenario: Callable[..., Any], arguments: tuple[Any, ...], report: int) -> NoReturn:
    try:
        answer: tuple[bool, Any] = True, scenario(*arguments)
    except BaseException:  # noqa: BLE001  # the parent raises it
        answer = False, traceback.format_exc()
    with os.fdopen(report, "wb") as file:
        pickle.dump(answer, file)
    os._exit(0)
