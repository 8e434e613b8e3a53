"""Two network namespaces with a pair of veths between them, for a measurement in a child process."""

import contextlib
import ctypes
import os
import subprocess
import traceback
from collections.abc import Callable

from .lanes import Path, make_clients
from .report import Report, from_json

_CLONE_NEWNET = 0x40000000  # include/uapi/linux/sched.h
_LINK = "bench"
_SERVER, _CLIENT = "10.0.0.1", "10.0.0.2"
_MACS = {_SERVER: "02:00:00:00:00:01", _CLIENT: "02:00:00:00:00:02"}
_FLOWS = "10.1.0.0/16"
_FIRST_FLOW = "10.1.0.1"


def over_veth(benchmark: Callable[[Path], Report]) -> Report:
    """Run a benchmark in a child that stands in the server's namespace, with clients in the other one.

    Raises: PermissionError when this process may not make namespaces; RuntimeError when the child fails.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.close(ours)
        _run_child(benchmark, theirs)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    kind, _, text = answer.partition("\n")
    if kind == "refused":
        raise PermissionError(text)
    if kind != "report":
        raise RuntimeError(text or "the child ended without an answer")
    return from_json(text)


def _run_child(benchmark: Callable[[Path], Report], pipe: int) -> None:
    try:
        with contextlib.ExitStack() as stack:
            answer = "report\n" + benchmark(_connect(stack)).to_json()
    except PermissionError as error:
        answer = f"refused\n{error}"
    except BaseException:  # noqa: BLE001  # the parent raises it
        answer = "error\n" + traceback.format_exc()
    with os.fdopen(pipe, "w") as file:
        file.write(answer)
    os._exit(0)


def _connect(stack: contextlib.ExitStack) -> Path:
    """Make both namespaces, and the client's sockets in one of them; end in the other."""
    server, client = _new_namespace(), _new_namespace()
    _ip("link", "add", _LINK, "address", _MACS[_CLIENT], "type", "veth", "peer", "name", "far")
    _ip("link", "set", "far", "address", _MACS[_SERVER])
    _ip("link", "set", "far", "netns", f"/proc/{os.getpid()}/fd/{server}")
    _configure(_LINK, _CLIENT, _SERVER)
    _ip("route", "add", "local", _FLOWS, "dev", "lo")
    clients = make_clients(stack)
    _call("setns", server, _CLONE_NEWNET)
    _configure("far", _SERVER, _CLIENT)
    _ip("route", "add", _FLOWS, "via", _CLIENT)
    os.close(client)
    return Path(clients, _FIRST_FLOW, _SERVER)


def _new_namespace() -> int:
    _call("unshare", _CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _configure(link: str, own: str, other: str) -> None:
    _ip("link", "set", "lo", "up")
    _ip("address", "add", f"{own}/24", "dev", link)
    _ip("link", "set", link, "up")
    _ip("neighbour", "replace", other, "lladdr", _MACS[other], "dev", link)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _call(function: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
