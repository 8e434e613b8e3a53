"""What ``detect()`` finds under the identities that servers run with, on the kernel of this host."""

import os
from collections.abc import Callable
from typing import Any

import pytest
from identities import IDENTITIES
from privileges import NOBODY

RunAs = Callable[..., Any]

IMPORTS = ("quicsteer.capability",)
DETECT = """
    import dataclasses, json
    from quicsteer.capability import detect

    found = detect()
    print(json.dumps({"mode": found.best_mode, "probes": {p.name: dataclasses.asdict(p) for p in found.probes}}))
"""


@pytest.mark.parametrize(("identity", "mode", "reason"), IDENTITIES.values(), ids=IDENTITIES)
def test_the_best_mode_and_the_reason_are_named(
    run_as: RunAs, identity: dict[str, Any], mode: str, reason: str
) -> None:
    found = run_as(DETECT, imports=IMPORTS, **identity)
    steering = found["probes"]["eBPF steering"]
    assert found["mode"] == mode
    assert reason in steering["detail"]
    assert steering["ok"] is (mode == "ebpf")
    assert bool(steering["remedy"]) is (mode != "ebpf")
    assert found["probes"]["classic BPF steering"]["ok"] is True
    assert found["probes"]["shared port"]["ok"] is True


def test_a_program_larger_than_optmem_max_names_the_sysctl(run_as: RunAs) -> None:
    source = """
        import ctypes, json
        from pathlib import Path
        from quicsteer.capability import probe_cbpf

        CLONE_NEWNET = 0x40000000
        optmem_max = Path("/proc/sys/net/core/optmem_max")
        if ctypes.CDLL(None).unshare(CLONE_NEWNET) or not optmem_max.exists():
            print(json.dumps(None))  # Linux before 6.8 has one limit for all network namespaces
        else:
            optmem_max.write_text("4096")
            probe = probe_cbpf()
            print(json.dumps([probe.ok, probe.detail, probe.remedy]))
    """
    found = run_as(source, imports=IMPORTS)
    if found is None:
        pytest.skip("optmem_max belongs to the whole host before Linux 6.8")
    ok, detail, remedy = found
    assert ok is False
    assert detail.startswith("setsockopt(SO_ATTACH_REUSEPORT_CBPF): Cannot allocate memory, net.core.optmem_max")
    assert remedy == "sysctl -w net.core.optmem_max=131072"


def test_a_shortage_of_descriptors_is_no_answer(run_as: RunAs) -> None:
    source = """
        import json, os, resource
        from quicsteer.capability import probe_cbpf, probe_ebpf, probe_reuseport

        free = os.dup(0)
        os.close(free)
        found = {}
        for spare in range(20):
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + spare, 4096))
            found[spare] = [(p.ok, p.detail) for p in (probe_ebpf(), probe_cbpf(), probe_reuseport())]
        print(json.dumps(found))
    """
    found = run_as(source, imports=IMPORTS)
    assert {probe for probes in found.values() for probe, _ in probes} == {None, True}
    assert {probe for probe, _ in found["19"]} == {True}
    assert all("Too many open files" in detail for detail in (d for p in found.values() for ok, d in p if ok is None))


def test_probing_leaves_nothing_behind(run_as: RunAs) -> None:
    source = """
        import json, os
        from quicsteer.capability import detect

        before = os.listdir("/proc/self/fd")
        detect()
        try:
            os.waitpid(-1, os.WNOHANG)
            children = True
        except ChildProcessError:
            children = False
        print(json.dumps([before, os.listdir("/proc/self/fd"), children]))
    """
    before, after, children = run_as(source, imports=IMPORTS)
    assert before == after
    assert not children


def test_a_hidden_proc_costs_the_explanation_but_not_the_answer(run_as: RunAs) -> None:
    source = """
        import ctypes, json
        from privileges import become
        from quicsteer.capability import probe_ebpf, refusal

        CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(CLONE_NEWNS) == 0
        assert libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
        assert libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
        with_capability = probe_ebpf()
        become(capabilities=())
        without = probe_ebpf()
        print(json.dumps([with_capability.ok, without.ok, without.detail, refusal("cbpf") is None]))
    """
    with_capability, without, detail, classic = run_as(source, imports=(*IMPORTS, "privileges"))
    assert (with_capability, without, classic) == (True, False, True)
    assert "CAP_BPF is missing or valid only inside a user namespace (/proc does not tell)" in detail


def test_the_kernel_names_the_identity_that_a_child_was_given(run_as: RunAs) -> None:
    source = """
        import json, os
        from quicsteer.capability import read_host

        host = read_host()
        print(json.dumps([os.getresuid(), os.getgroups(), host.capabilities, host.seccomp, host.user_namespace]))
    """
    found = run_as(source, imports=IMPORTS, uid=NOBODY, capabilities=["CAP_BPF"], seccomp="eperm")
    assert found == [[NOBODY] * 3, [], 1 << 39, 2, False]
    assert run_as(source, imports=IMPORTS)[0] == list(os.getresuid())
