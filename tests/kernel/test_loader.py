"""Our loader against libbpf's, by way of bpftool: the same program, the same maps."""

import json
import os
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quicsteer import KernelError, SteeringMode, _kernel

ROOT = Path(__file__).parents[2]
MAPS = {"sockets": "sockets", "table": "table", "counters": "counters", "config": "steer.rodata"}


def bpftool(*arguments: str) -> Any:
    done = subprocess.run(["bpftool", "-j", *arguments], check=True, capture_output=True, text=True)
    return json.loads(done.stdout) if done.stdout.strip() else None


@pytest.fixture
def bpf_filesystem(tmp_path: Path) -> Iterator[Path]:
    """A BPF file system of our own to pin libbpf's copy in."""
    subprocess.run(["mount", "-t", "bpf", "bpf", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def describe(program: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The program's tag, and the attributes of its maps by their name here."""
    maps = {}
    for number in program["map_ids"]:
        shape = bpftool("map", "show", "id", str(number))
        [name] = [ours for ours, theirs in names.items() if theirs == shape["name"]]
        maps[name] = {key: shape[key] for key in ("type", "flags", "bytes_key", "bytes_value", "max_entries", "frozen")}
    return {"tag": program["tag"], "type": program["type"], "maps": maps}


def test_the_loader_makes_what_libbpf_makes(ebpf: SteeringMode, tmp_path: Path, bpf_filesystem: Path) -> None:
    compiled = tmp_path.parent / "steer.o"
    subprocess.run([sys.executable, ROOT / "bpf" / "build.py", "--check", "--object", compiled], check=True)
    bpftool("prog", "load", str(compiled), str(bpf_filesystem / "libbpf"), "type", "sk_reuseport")
    theirs = describe(bpftool("prog", "show", "pinned", str(bpf_filesystem / "libbpf")), MAPS)
    descriptors = _kernel.load_program(bytes(16), cid_length=8, listeners=1, slots=1, drop_invalid=False)
    try:
        number = next(
            line.split()[1]
            for line in Path(f"/proc/self/fdinfo/{descriptors[0]}").read_text().splitlines()
            if line.startswith("prog_id")
        )
        ours = describe(bpftool("prog", "show", "id", number), {name: name for name in MAPS})
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert ours == theirs
    assert set(ours["maps"]) == set(MAPS)


def test_a_refused_map_names_the_call_and_leaves_nothing(ebpf: SteeringMode) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KernelError, match=r"bpf\(BPF_MAP_CREATE\)") as caught:
        _kernel.load_program(bytes(16), cid_length=8, listeners=1, slots=2**32 - 2, drop_invalid=False)
    assert caught.value.call == "bpf(BPF_MAP_CREATE)"
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('int counter; SEC("sk_reuseport") int f(void *md) { counter++; return 1; }', r"section \.bss"),
        ('int counter = 1; SEC("sk_reuseport") int f(void *md) { counter++; return 1; }', r"section \.data"),
        (
            '__attribute__((noinline)) static int g(int x) { asm volatile(""); return x + 1; }'
            'SEC("sk_reuseport") int f(void *md) { return g(1); }',
            r"section \.text|subprogram",
        ),
    ],
)
def test_an_object_that_the_loader_cannot_load_is_refused(source: str, reason: str, tmp_path: Path) -> None:
    build = runpy.run_path(str(ROOT / "bpf" / "build.py"))
    program = tmp_path / "other.c"
    program.write_text(f"#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n{source}\n")
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    flags = ["-O2", "-g", "--target=bpf", f"-I/usr/include/{multiarch}"]
    subprocess.run([build["CLANG"], *flags, "-c", program, "-o", tmp_path / "other.o"], check=True)
    with pytest.raises(build["Unloadable"], match=reason):
        build["read_object"](tmp_path / "other.o")
