"""The decision: one table through the Python model, the C header and the classic program; then arbitrary bytes."""

import classic_machine
import native
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steer import Vector, VectorGroup, load_decisions, load_seals

from quicsteer import _kernel
from quicsteer.abi import CID_LENGTH_MAX, CID_LENGTH_MIN, TABLE_SIZE, Outcome
from quicsteer.classic import INSTRUCTIONS_MAX, steering_program
from quicsteer.decision import Decision, Rules, decide, open_seal, seal_hash, seal_word, siphash24

GROUPS = load_decisions()
VECTORS = [(group, vector) for group in GROUPS for vector in group.vectors]


def rules_of(group: VectorGroup, drop_invalid: bool = False) -> Rules:
    return Rules(group.key, group.cid_length, group.listeners, group.slots, drop_invalid)


def decide_classic(datagram: bytes, rules: Rules, packet_hash: int = 0) -> int:
    program = steering_program(rules.key, rules.cid_length, rules.listeners, rules.slots, rules.drop_invalid)
    return classic_machine.run(program, datagram, packet_hash).value


def expected(vector: Vector, rules: Rules) -> Decision:
    if rules.drop_invalid and vector.outcome in (Outcome.UNROUTABLE, Outcome.MALFORMED):
        return Decision(vector.outcome, rules.slots)
    return Decision(vector.outcome, vector.slot)


@pytest.mark.parametrize("drop_invalid", [False, True])
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group.cid_length}-{group.listeners}-{group.slots}")
def test_the_model_the_header_and_the_classic_program_decide_as_the_table(
    group: VectorGroup, drop_invalid: bool
) -> None:
    rules = rules_of(group, drop_invalid)
    program = steering_program(rules.key, rules.cid_length, rules.listeners, rules.slots, drop_invalid)
    for vector in group.vectors:
        want = expected(vector, rules)
        assert decide(vector.datagram, rules) == want, vector.name
        assert native.decide(vector.datagram, rules) == want, vector.name
        slot = classic_machine.run(program, vector.datagram).value
        assert slot == want.slot or (want.slot is None and slot < rules.listeners), vector.name


def test_the_seal_vectors_hold_everywhere() -> None:
    table = load_seals()
    for row in table["vectors"]:
        key, cid, body, slot = (bytes.fromhex(row["key"]), bytes.fromhex(row["cid"]), row["body"], row["slot"])
        assert open_seal(cid, seal_hash(key, cid)) == slot
        assert _kernel.open_seal(key, cid) == slot
        assert _kernel.seal(key, bytes.fromhex(body), slot) == cid
        hashed = seal_hash(key, cid)
        assert (seal_word(slot, hashed) ^ hashed & 0xFFFFFFFF).to_bytes(4, "big") == cid[-4:]


def test_siphash_is_the_one_of_the_paper() -> None:
    row = load_seals()["siphash"]
    key, message = bytes.fromhex(row["key"]), bytes.fromhex(row["message"])
    assert siphash24(key, message) == _kernel.siphash24(key, message) == int(row["hash"], 16)


RULES = st.builds(
    lambda key, length, listeners, banks, drop: Rules(key, length, listeners, listeners * (1 + banks), drop),
    st.binary(min_size=16, max_size=16),
    st.integers(CID_LENGTH_MIN, CID_LENGTH_MAX),
    st.integers(1, 300),
    st.integers(0, 3),
    st.booleans(),
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[bytes, Rules]:
    """A group's rules and a datagram: arbitrary bytes, or a header around a connection ID of the group."""
    rules = draw(RULES)
    tail = draw(st.binary(max_size=40))
    if draw(st.booleans()):
        return tail, rules
    cid = _kernel.seal(
        rules.key,
        draw(st.binary(min_size=rules.cid_length - 4, max_size=rules.cid_length - 4)),
        draw(st.integers(0, rules.slots + 2)),
    )
    if draw(st.booleans()):
        return bytes([draw(st.integers(0, 127))]) + cid + tail, rules
    version = draw(st.binary(min_size=4, max_size=4))
    length = draw(st.sampled_from([rules.cid_length, *range(256)]))
    dcid = (cid + tail)[:length] if draw(st.booleans()) else cid
    return bytes([draw(st.integers(128, 255))]) + version + bytes([length]) + dcid + tail, rules


@given(cases(), st.binary(max_size=26))
@settings(max_examples=3000, deadline=None)
def test_the_header_agrees_with_the_model_on_arbitrary_datagrams(case: tuple[bytes, Rules], padding: bytes) -> None:
    datagram, rules = case
    assert native.decide(datagram, rules, padding) == decide(datagram, rules)


@given(cases(), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_the_classic_program_agrees_with_the_model(case: tuple[bytes, Rules], packet_hash: int) -> None:
    datagram, rules = case
    want = decide(datagram, rules).slot
    if want is None:
        want = packet_hash % TABLE_SIZE % rules.listeners
    assert decide_classic(datagram, rules, packet_hash) == want


@given(RULES, st.integers(0, 65535), st.data())
@settings(max_examples=500, deadline=None)
def test_a_connection_id_with_a_changed_bit_is_not_ours(rules: Rules, slot: int, data: st.DataObject) -> None:
    body = data.draw(st.binary(min_size=rules.cid_length - 4, max_size=rules.cid_length - 4))
    cid = _kernel.seal(rules.key, body, slot)
    assert _kernel.open_seal(rules.key, cid) == slot
    bit = data.draw(st.integers(0, 31))
    changed = cid[:-4] + (int.from_bytes(cid[-4:], "big") ^ 1 << bit).to_bytes(4, "big")
    assert _kernel.open_seal(rules.key, changed) != slot


def test_each_body_has_exactly_one_right_seal_per_slot() -> None:
    """Of all words with a given slot one opens: a guess is right with a probability of 1 / 2^16 per slot and slot."""
    key, body = bytes(range(16)), b"body"
    hashed = seal_hash(key, body + bytes(4))
    for slot in (0, 1, 2, 767, 65535):
        opened = [
            check
            for check in range(0, 1 << 16)
            if open_seal(body + ((check << 16 | slot) ^ hashed & 0xFFFFFFFF).to_bytes(4, "big"), hashed) == slot
        ]
        assert len(opened) == 1


def test_chosen_ids_spread_evenly() -> None:
    """Chosen so that a rule without a key (the first four bytes modulo N, as Envoy's) sends all to one worker."""
    rules = Rules(bytes(range(16)), 8, 8, 8)
    counts = [0] * 8
    for number in range(20_000):
        dcid = (number * 8).to_bytes(4, "big") + bytes(4)
        counts[decide(b"\xc0\0\0\0\1\x08" + dcid, rules).slot or 0] += 1
    assert max(counts) < 1.1 * sum(counts) / 8


def test_ids_that_share_the_hashed_bytes_share_a_listener() -> None:
    """A limit of hashing 8 bytes: who varies nothing but the other bytes stays on one listener, an unknown one."""
    rules = Rules(bytes(range(16)), 8, 8, 8)
    ours = {decide(b"\xc0\0\0\0\1\x08" + bytes(4) + bytes([n]) * 4, rules).slot for n in range(100)}
    longer = {decide(b"\xc0\0\0\0\1\x12" + bytes(8) + bytes([n]) * 10, rules).slot for n in range(100)}
    assert (len(ours), len(longer)) == (1, 1)


@pytest.mark.parametrize("length", range(CID_LENGTH_MIN, CID_LENGTH_MAX + 1))
@pytest.mark.parametrize("drop_invalid", [False, True])
def test_every_classic_program_fits_the_kernel(length: int, drop_invalid: bool) -> None:
    program = steering_program(bytes(range(16)), length, 1024, 65535, drop_invalid)
    assert len(program) // 8 <= INSTRUCTIONS_MAX


def test_the_key_is_not_in_the_repr_of_the_rules() -> None:
    assert "key" not in repr(Rules(bytes(16), 8, 1, 1))
