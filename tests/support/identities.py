"""The identities that servers run with, the mode that each gets, and the reason that is told when there are better."""

from typing import Any

from privileges import NOBODY

from quicsteer.capability import read_host

MEMLOCK_COUNTS = read_host().kernel < (5, 11)

IDENTITIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "root": ({}, "ebpf", "loads"),
    "nobody": ({"uid": NOBODY}, "cbpf", "CAP_BPF is missing"),
    "root of a container": ({"capabilities": ["CAP_NET_BIND_SERVICE"]}, "cbpf", "CAP_BPF is missing"),
    "nobody with CAP_BPF": ({"uid": NOBODY, "capabilities": ["CAP_BPF"]}, "ebpf", "loads"),
    "nobody with CAP_BPF and CAP_PERFMON": (
        {"uid": NOBODY, "capabilities": ["CAP_BPF", "CAP_PERFMON"]},
        "ebpf",
        "loads",
    ),
    "nobody with CAP_SYS_ADMIN": ({"uid": NOBODY, "capabilities": ["CAP_SYS_ADMIN"]}, "ebpf", "loads"),
    "nobody with CAP_NET_ADMIN": ({"uid": NOBODY, "capabilities": ["CAP_NET_ADMIN"]}, "cbpf", "CAP_BPF is missing"),
    "root in a user namespace": ({"user_namespace": True}, "cbpf", "only inside this user namespace"),
    "nobody as root in a user namespace": (
        {"uid": NOBODY, "user_namespace": True},
        "cbpf",
        "only inside this user namespace",
    ),
    "seccomp, EPERM": ({"seccomp": "eperm"}, "cbpf", "Operation not permitted, a seccomp filter refuses"),
    "seccomp, ENOSYS": ({"seccomp": "enosys"}, "cbpf", "Function not implemented, a seccomp filter hides"),
    "seccomp, kill": ({"seccomp": "kill"}, "cbpf", "a seccomp filter kills"),
    "nobody under seccomp": ({"uid": NOBODY, "seccomp": "kill"}, "cbpf", "a seccomp filter kills"),
    "no memory to lock": (
        {"memlock": 0},
        "cbpf" if MEMLOCK_COUNTS else "ebpf",
        "RLIMIT_MEMLOCK of 0 bytes" if MEMLOCK_COUNTS else "loads",
    ),
}
