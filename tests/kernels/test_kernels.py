"""The promises on other kernels than this host's, and what differs between them (docs/kernels.md)."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from debian_kernels import UNFIXED, Kernel
from machine import PATIENCE, Run, run

LOCKS_MEMORY_BEFORE = (5, 11)
BPF_CLOSED_TO_USERS_BEFORE = (5, 19)
CONNECT_LEAVES_SINCE = (6, 18)
"""Between 6.12.117 and 6.18.44, where it was measured."""

REPLACE_SECONDS = os.environ.get("QUICSTEER_REPLACE_SECONDS")
EPERM, EFAULT, EINVAL = 1, 14, 22

pytestmark = pytest.mark.timeout(2 * PATIENCE)


def require(found: Run, name: str) -> Any:
    """What a scenario found, unless it failed."""
    assert name in found.findings, found.console[-3000:]
    finding = found.findings[name]
    if isinstance(finding, dict) and "error" in finding:
        pytest.fail(f"{name}: {finding['error']}", pytrace=False)
    return finding


def test_every_promise_holds(kernel: Kernel, guest: Path) -> None:
    found = run(kernel, guest)
    print(f"Linux {kernel}, started {found.boots} times: {json.dumps(found.findings.get('facts'))}")
    assert require(found, "vectors") == {"ebpf": 2584, "cbpf": 2584}
    hostile = require(found, "hostile")
    assert hostile["ebpf"] == hostile["cbpf"] > 1000
    assert require(found, "claim") == 28
    assert set(require(found, "drops")) == {"ebpf", "cbpf"}
    assert found.whole
    check_fallback(kernel, require(found, "fallback"))
    check_report(kernel, require(found, "check"), "ebpf")
    check_report(kernel, require(found, "check as nobody"), "cbpf")
    check_facts(kernel, require(found, "facts"))
    assert "Call Trace" not in found.console


def check_fallback(kernel: Kernel, found: Any) -> None:
    mode, text = found["nobody"]
    assert mode == "cbpf"
    assert "CAP_BPF is missing" in text
    for size in (0, 8192):
        mode, text = found[f"{size} bytes to lock"]
        if kernel.release < LOCKS_MEMORY_BEFORE:
            assert mode == "cbpf"
            assert f"RLIMIT_MEMLOCK of {size} bytes is too small" in text
            assert "LimitMEMLOCK=infinity" in text
        else:
            assert (mode, text) == ("ebpf", None)


def check_report(kernel: Kernel, report: Any, mode: str) -> None:
    assert (report["status"], report["mode"]) == (0, mode)
    probes = {probe["name"]: probe for probe in report["probes"]}
    assert probes["classic BPF steers"]["detail"].startswith("800 of 800 datagrams reached")
    if mode == "ebpf":
        assert probes["eBPF steers"]["detail"].startswith("800 of 800 datagrams reached")
    assert "kernel fix" not in probes


def check_facts(kernel: Kernel, facts: Any) -> None:
    answers = facts["bpf answers to nobody"]
    closed = kernel.release < BPF_CLOSED_TO_USERS_BEFORE
    assert (answers["bad_pointer"], answers["bad_command"]) == ((EPERM, EPERM) if closed else (EFAULT, EINVAL))
    assert (answers["array"], answers["program"]) == (EPERM, EPERM)
    assert set(facts["bpf answers to root"].values()) == {0, EFAULT, EINVAL}
    assert facts["a worker can replace the program"] is True
    connected = facts["datagrams of others reach a connected member"]
    assert connected is (kernel.release < CONNECT_LEAVES_SINCE)


def test_a_kernel_without_ipv6_serves_ipv4(all_kernels: list[Kernel], guest: Path) -> None:
    newest = max(all_kernels)
    found = run(newest, guest, "ipv6.disable=1", "quicsteer.only=1")
    error, wildcard, bound = require(found, "without IPv6")
    assert error == "socket([::1]:0): Address family not supported by protocol"
    assert wildcard[0] == "ebpf"
    assert bound[0] == "0.0.0.0"
    assert require(found, "vectors") == {"ebpf": 2584, "cbpf": 2584}


@pytest.mark.skipif(not REPLACE_SECONDS, reason="QUICSTEER_REPLACE_SECONDS says how long to try to crash kernels")
def test_replacing_a_classic_program_crashes_only_kernels_without_the_fix(
    all_kernels: list[Kernel], guest: Path
) -> None:
    """CVE-2026-52910, in emulated machines and nowhere else. A kernel without the fix may survive a try."""
    for kernel in all_kernels:
        found = run(kernel, guest, f"quicsteer.replace={REPLACE_SECONDS}")
        print(f"Linux {kernel}: {found.findings.get('replaced', 'crashed')} replacements")
        if str(kernel) != UNFIXED:
            assert found.whole, found.console[-3000:]
