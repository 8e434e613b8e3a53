"""The mode that a group gets under each identity and on each kind of host, that it steers, and what is said of it."""

from collections.abc import Callable
from typing import Any

import pytest
from identities import IDENTITIES
from privileges import NOBODY

RunAs = Callable[..., Any]

IMPORTS = ("quicsteer",)

OPEN = """
    import json, socket, sys, warnings
    from quicsteer import QuicSteerError, SteeringGroup, SteeringUnavailable

    def open_group(address="127.0.0.1:0", **options):
        '''Open a group, see whether its connection IDs reach their worker, and return what was said.'''
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with SteeringGroup.open(address, 2, **options) as group:
                host, port = group.addresses[0]
                host = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(host, host)
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                arrived = []
                with socket.socket(family, socket.SOCK_DGRAM) as client:
                    for worker in group.workers:
                        sock = worker.socket
                        for _ in range(8):
                            client.sendto(b"@" + worker.connection_ids.issue(), (host, port))
                        sock.settimeout(1)
                        for _ in range(8):
                            try:
                                arrived.append(len(sock.recv(100)) == 9)
                            except TimeoutError:
                                break
                        sock.setblocking(False)
                return {
                    "mode": group.mode,
                    "fallback": group.stats().fallback,
                    "arrived": len(arrived),
                    "warnings": [[each.category.__name__, str(each.message)] for each in caught],
                }

    def refusal(**options):
        try:
            SteeringGroup.open("127.0.0.1:0", 2, **options).close()
        except SteeringUnavailable as error:
            return str(error)
"""

NAMESPACE = """
    import ctypes, subprocess
    from pathlib import Path

    CLONE_NEWNS, CLONE_NEWNET, MS_REC, MS_PRIVATE = 0x20000, 0x40000000, 0x4000, 0x40000
    libc = ctypes.CDLL(None, use_errno=True)

    def enter_network(**settings):
        '''Enter a new network namespace; returns whether it has these settings of its own.'''
        assert libc.unshare(CLONE_NEWNET) == 0
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for name, value in settings.items():
            path = Path("/proc/sys/net") / name.replace("__", "/")
            if not path.exists():
                return False
            path.write_text(value)
        return True
"""


def run(run_as: RunAs, source: str, *parts: str, **identity: Any) -> Any:
    text = "".join(part.replace("\n    ", "\n") for part in (*parts, source))
    return run_as(text, imports=(*IMPORTS, "privileges"), **identity)


@pytest.mark.parametrize(("identity", "mode", "reason"), IDENTITIES.values(), ids=IDENTITIES)
def test_a_group_opens_in_the_best_mode_and_says_why_not_a_better_one(
    run_as: RunAs, identity: dict[str, Any], mode: str, reason: str
) -> None:
    source = """
    print(json.dumps([open_group(), open_group(split=False, mode="cbpf"), refusal(mode="ebpf")]))
    """
    auto, classic, refused = run(run_as, source, OPEN, **identity)
    assert (auto["mode"], auto["arrived"]) == (mode, 16)
    assert (classic["mode"], classic["arrived"], classic["warnings"]) == ("cbpf", 16, [])
    if mode == "ebpf":
        assert (auto["fallback"], auto["warnings"], refused) == (None, [], None)
    else:
        assert auto["fallback"].startswith("quicsteer runs in mode 'cbpf'. eBPF steering: ")
        assert reason in auto["fallback"]
        assert " To change this: " in auto["fallback"]
        assert auto["warnings"] == [["SteeringFallbackWarning", auto["fallback"]]]
        assert refused.startswith("mode 'ebpf' is not available: ")
        assert reason in refused


def test_without_either_program_the_kernels_hash_is_left_and_both_reasons_are_told(run_as: RunAs) -> None:
    source = """
    from privileges import become
    own = enter_network(core__optmem_max="4096")
    become(uid=65534)
    print(json.dumps(open_group() if own else None))
    """
    found = run(run_as, source, OPEN, NAMESPACE)
    if found is None:
        pytest.skip("optmem_max belongs to the whole host before Linux 6.8")
    assert found["mode"] == "hash"
    text = found["fallback"]
    assert text.startswith("quicsteer runs in mode 'hash'. eBPF steering: ")
    assert "CAP_BPF is missing; classic BPF steering: setsockopt(SO_ATTACH_REUSEPORT_CBPF): Cannot allocate" in text
    assert "Connections break when a client's address changes." in text
    assert "sysctl -w net.core.optmem_max=131072" in text
    assert found["warnings"] == [["SteeringFallbackWarning", text]]


@pytest.mark.parametrize("uid", [None, NOBODY], ids=["root", "nobody"])
def test_without_ipv6_wildcards_serve_ipv4_and_a_specific_address_is_refused(run_as: RunAs, uid: int | None) -> None:
    source = f"""
    from privileges import become
    enter_network(ipv6__conf__all__disable_ipv6="1")
    become(uid={uid})
    try:
        open_group("[::1]:0")
        refused = None
    except QuicSteerError as error:
        refused = str(error)
    found = [open_group(address) for address in (":0", "[::]:0", "127.0.0.1:0")]
    print(json.dumps([refused, [[each["mode"], each["arrived"]] for each in found]]))
    """
    refused, found = run(run_as, source, OPEN, NAMESPACE)
    assert refused == "bind([::1]:0): Cannot assign requested address"
    assert found == [["cbpf" if uid else "ebpf", 16]] * 3


@pytest.mark.parametrize("mode", ["ebpf", "cbpf", "hash"])
def test_a_receive_buffer_beyond_the_limit_needs_a_capability_or_is_warned_about(run_as: RunAs, mode: str) -> None:
    source = f"""
    from privileges import become
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 30)
        limit = probe.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
    asked = limit + 1000
    with_capability = open_group(mode={mode!r}, receive_buffer=asked)
    become(capabilities=[39])
    without = open_group(mode={mode!r}, receive_buffer=asked)
    enough = open_group(mode={mode!r}, receive_buffer=limit)
    print(json.dumps([asked, limit, with_capability["warnings"], without["warnings"], enough["warnings"]]))
    """
    asked, limit, with_capability, without, enough = run(run_as, source, OPEN)
    assert (with_capability, enough) == ([], [])
    text = (
        f"receive_buffer: asked for {asked} bytes, the kernel gave {limit}: "
        f"raise the limit with sysctl -w net.core.rmem_max={asked}"
    )
    assert without == [["ReceiveBufferWarning", text]]


@pytest.mark.parametrize(("capabilities", "mode"), [(None, "ebpf"), ([39], "ebpf"), ([], "cbpf")])
def test_a_hidden_proc_takes_no_mode_away(run_as: RunAs, capabilities: list[int] | None, mode: str) -> None:
    source = f"""
    from privileges import become
    assert libc.unshare(CLONE_NEWNS) == 0
    assert libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
    assert libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
    become(capabilities={capabilities})
    found = open_group()
    with SteeringGroup.open("127.0.0.1:0", 1, mode="single") as held:
        try:
            SteeringGroup.open(held.addresses[0], 1, mode="cbpf")
        except OSError as error:
            taken = str(error)
        host = held.stats().host
    print(json.dumps([found, taken, host]))
    """
    found, taken, host = run(run_as, source, OPEN, NAMESPACE)
    assert (found["mode"], found["arrived"]) == (mode, 16)
    assert ("/proc does not tell" in str(found["fallback"])) is (mode == "cbpf")
    assert taken.endswith("Address already in use: its holder cannot be seen from here")
    assert host is None
