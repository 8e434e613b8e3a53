"""The C decision, compiled natively by cffi: the very header that the eBPF program is made of."""

import functools
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from cffi import FFI

from quicsteer.abi import Outcome
from quicsteer.decision import Decision, Rules

ROOT = Path(__file__).parents[2]
HEAD_LENGTH = 26
NO_SLOT = 0xFFFFFFFF

DECLARATIONS = """
struct qs_config {
    uint64_t key0, key1;
    uint32_t cid_length, listeners, slots, drop_invalid;
};
struct qs_decision { uint32_t outcome, slot; uint64_t hash; };
struct qs_decision decide(const struct qs_config *config, const uint8_t *head, uint32_t length);
uint32_t table_index(uint64_t hash);
uint64_t siphash24(uint64_t key0, uint64_t key1, uint64_t message);
uint32_t seal(uint32_t slot, uint64_t hash);
uint32_t open_seal(uint32_t seal, uint64_t hash);
"""

SOURCE = """
#include "decide.h"
static struct qs_decision decide(const struct qs_config *config, const uint8_t *head, uint32_t length)
{
    return qs_decide(config, head, length);
}
static uint32_t table_index(uint64_t hash) { return qs_table_index(hash); }
static uint64_t siphash24(uint64_t key0, uint64_t key1, uint64_t message) { return qs_siphash24(key0, key1, message); }
static uint32_t seal(uint32_t slot, uint64_t hash) { return qs_seal(slot, hash); }
static uint32_t open_seal(uint32_t seal, uint64_t hash) { return qs_open_seal(seal, hash); }
"""


@functools.cache
def library() -> Any:
    """Compile the header and return it as (ffi, lib)."""
    builder = FFI()
    builder.cdef(DECLARATIONS)
    builder.set_source(
        "_decide",
        SOURCE,
        include_dirs=[str(ROOT / "csrc"), str(ROOT / "bpf")],
        extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"],
    )
    directory = tempfile.mkdtemp(prefix="quicsteer-native-")
    spec = importlib.util.spec_from_file_location("_decide", builder.compile(tmpdir=directory))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ffi, module.lib


def decide(datagram: bytes, rules: Rules, padding: bytes = b"") -> Decision:
    """Decide in C as the eBPF program does; ``padding`` is what lies behind the datagram in memory."""
    ffi, lib = library()
    config = ffi.new(
        "struct qs_config *",
        (
            int.from_bytes(rules.key[:8], "little"),
            int.from_bytes(rules.key[8:], "little"),
            rules.cid_length,
            rules.listeners,
            rules.slots,
            rules.drop_invalid,
        ),
    )
    head = ffi.new("uint8_t[]", (datagram + padding)[:HEAD_LENGTH].ljust(HEAD_LENGTH, b"\xaa"))
    decision = lib.decide(config, head, len(datagram))
    outcome = Outcome(decision.outcome)
    if outcome is Outcome.ROUTED:
        return Decision(outcome, decision.slot)
    if outcome is not Outcome.DISPATCHED and rules.drop_invalid:
        return Decision(outcome, rules.slots)
    if outcome is Outcome.MALFORMED:
        return Decision(outcome, None)
    return Decision(outcome, lib.table_index(decision.hash) % rules.listeners)
