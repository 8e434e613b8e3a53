"""Runs Python source in a child process under another identity, and returns what it prints.

The child starts as the caller, imports what the source needs, gives up what it is told to, and runs the source then.
So the source may run as a user who cannot read the interpreter's own files: whatever it imports must be named in
``imports`` or come from the standard library's modules that are loaded here.
"""

import ctypes
import encodings.idna  # noqa: F401  the socket module loads it when a host name is resolved
import errno
import importlib
import json
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

NOBODY = 65534

Seccomp = Literal["eperm", "enosys", "kill"]

# include/uapi/linux/capability.h
CAPABILITIES = {
    "CAP_DAC_OVERRIDE": 1,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}

# include/uapi/linux/prctl.h, capability.h, sched.h
_PR_SET_DUMPABLE, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 4, 8, 22, 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE = 38, 47, 2
_CAPABILITY_VERSION = 0x20080522
_CLONE_NEWUSER = 0x10000000

# include/uapi/linux/seccomp.h, audit.h, filter.h; system calls by machine: AUDIT_ARCH, number of capset, of bpf
_SECCOMP_MODE_FILTER = 2
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_VERDICTS: dict[str, int] = {"eperm": _ERRNO | errno.EPERM, "enosys": _ERRNO | errno.ENOSYS, "kill": _KILL_PROCESS}
_LOAD_WORD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET = 0, 4
_MACHINES = {"x86_64": (0xC000003E, 126, 321), "aarch64": (0xC00000B7, 91, 280)}

_CANNOT_BECOME = 77
_TIMEOUT = 60


class CannotBecome(Exception):
    """This host or user does not let a child take the identity; the text says which step was refused."""


class ChildFailed(AssertionError):
    """The child did not end with status 0 and a line of JSON; the text has its standard error."""


def run_as(
    source: str,
    *,
    uid: int | None = None,
    capabilities: Collection[str] | None = None,
    seccomp: Seccomp | None = None,
    user_namespace: bool = False,
    memlock: int | None = None,
    imports: Collection[str] = ("quicsteer",),
) -> Any:
    """Run ``source`` in a child process and return the JSON value of the last line that it prints.

    ``uid`` is also the gid, without further groups. ``capabilities`` are all that is left, in every set, so programs
    that the source starts have them too; by default root keeps all and another user has none. ``seccomp`` is what
    bpf(2) meets from then on. ``user_namespace`` makes the child root of a new user namespace, last of all but
    seccomp. ``memlock`` is RLIMIT_MEMLOCK in bytes. ``imports`` are modules that the source may import, with their
    submodules named one by one.

    Raises: CannotBecome, ChildFailed.
    """
    if user_namespace and capabilities is not None:
        raise ValueError("the root of a new user namespace has all capabilities")
    order = {
        "source": textwrap.dedent(source),
        "uid": uid,
        "capabilities": None if capabilities is None else [CAPABILITIES[name] for name in capabilities],
        "seccomp": seccomp,
        "user_namespace": user_namespace,
        "memlock": memlock,
        "imports": list(imports),
    }
    child = subprocess.run(
        [sys.executable, str(Path(__file__))],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        cwd="/",
        timeout=_TIMEOUT,
        check=False,
    )
    if child.returncode == _CANNOT_BECOME:
        raise CannotBecome(child.stderr.strip())
    lines = child.stdout.splitlines()
    if child.returncode != 0 or not lines:
        ending = signal.Signals(-child.returncode).name if child.returncode < 0 else f"status {child.returncode}"
        raise ChildFailed(f"the child ended with {ending}\n{child.stdout}{child.stderr}")
    return json.loads(lines[-1])


def become(
    *,
    uid: int | None = None,
    capabilities: Collection[int] | None = None,
    seccomp: Seccomp | None = None,
    user_namespace: bool = False,
    memlock: int | None = None,
) -> None:
    """Give up, in this process and for good, what ``run_as`` describes; capabilities as numbers.

    Raises: OSError, whose ``filename`` is the step that was refused.
    """
    if memlock is not None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
    if uid is not None or capabilities is not None:
        _drop(uid, capabilities if capabilities is not None else () if uid else None)
    if user_namespace:
        _enter_user_namespace()
    if seccomp is not None:
        _filter_bpf(_VERDICTS[seccomp])


def _drop(uid: int | None, capabilities: Collection[int] | None) -> None:
    if capabilities is not None:
        for number in range(64):
            if number not in capabilities and _call("prctl", _PR_CAPBSET_READ, number, may_fail=True) == 1:
                _call("prctl", _PR_CAPBSET_DROP, number)
    if uid is not None:
        _call("prctl", _PR_SET_KEEPCAPS, 1)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    if capabilities is not None:
        _set_capabilities(capabilities)
    # A server that is started as another user owns its /proc entries; a process that changed its user does not.
    _call("prctl", _PR_SET_DUMPABLE, 1)


def _set_capabilities(capabilities: Collection[int]) -> None:
    mask = sum(1 << number for number in capabilities)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    # struct cap_user_data twice: effective, permitted and inheritable, low words first
    _call("syscall", _machine()[1], header, struct.pack("=6I", low, low, low, high, high, high), step="capset")
    for number in capabilities:
        _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0)


def _enter_user_namespace() -> None:
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", _CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _filter_bpf(verdict: int) -> None:
    """Answer bpf(2) with a verdict, in this process and its children, and let everything else through."""
    architecture, _, bpf = _machine()
    instructions = (
        (_LOAD_WORD, 0, 0, _ARCHITECTURE_OFFSET),
        (_JUMP_EQUAL, 0, 3, architecture),
        (_LOAD_WORD, 0, 0, _NUMBER_OFFSET),
        (_JUMP_EQUAL, 0, 1, bpf),
        (_RETURN, 0, 0, verdict),
        (_RETURN, 0, 0, _ALLOW),
    )
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in instructions))
    program = struct.pack("@HP", len(instructions), ctypes.addressof(packed))
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0)


def _machine() -> tuple[int, int, int]:
    if platform.machine() not in _MACHINES:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), f"no system call numbers for {platform.machine()}")
    return _MACHINES[platform.machine()]


def _call(function: str, *arguments: int | bytes, may_fail: bool = False, step: str = "") -> int:
    words = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    result: int = getattr(ctypes.CDLL(None, use_errno=True), function)(*words)
    if result < 0 and not may_fail:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), step or f"{function}{arguments}")
    return result


def _child() -> None:
    order = json.load(sys.stdin)
    for name in order.pop("imports"):
        importlib.import_module(name)
    source = compile(order.pop("source"), "<run_as>", "exec")
    try:
        become(**order)
    except (OSError, ValueError) as error:  # setrlimit raises ValueError for a refusal
        print(f"cannot become {order}: {error}", file=sys.stderr)
        sys.exit(_CANNOT_BECOME)
    exec(source, {"__name__": "__main__"})


if __name__ == "__main__":
    _child()
