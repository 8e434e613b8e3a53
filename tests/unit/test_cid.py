"""Connection IDs: what they say to us, what they hide, that none comes twice."""

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quicsteer import ConnectionIds, _kernel
from quicsteer.cid import GroupKeys, Identity, _permute, generation_start

KEYS = GroupKeys.from_key(bytes(range(16)))


def make(slot: int = 3, slots: int = 8, length: int = 8, start: int = 0, keys: GroupKeys = KEYS) -> ConnectionIds:
    return ConnectionIds(keys, Identity(slot, slots, length, start))


@pytest.mark.parametrize("length", range(8, 21))
def test_an_issued_id_names_its_slot_to_every_worker(length: int) -> None:
    others = make(slot=0, length=length)
    for slot in range(8):
        cid = make(slot=slot, length=length).issue()
        assert len(cid) == length
        assert others.slot_of(cid) == slot


@pytest.mark.parametrize("length", range(8, 21))
def test_no_id_comes_twice(length: int) -> None:
    ids = make(length=length)
    assert len({ids.issue() for _ in range(20_000)}) == 20_000


@given(st.binary(min_size=16, max_size=16), st.integers(0, 65535), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_the_order_of_short_bodies_is_a_permutation(key: bytes, slot: int, number: int) -> None:
    """A Feistel network is one to one: the inverse finds the number again."""
    left, right = divmod(_permute(key, slot, number), 1 << 16)
    for stage in reversed(range(4)):
        message = stage.to_bytes(2, "big") + slot.to_bytes(4, "big") + left.to_bytes(2, "big")
        left, right = right ^ (_kernel.siphash24(key, message) & 0xFFFF), left
    assert left << 16 | right == number


def test_neighbouring_bodies_share_nothing_to_see() -> None:
    ids = make()
    bodies = [int.from_bytes(ids.issue()[:4], "big") for _ in range(2000)]
    changed = [(a ^ b).bit_count() for a, b in itertools.pairwise(bodies)]
    assert 15.5 < sum(changed) / len(changed) < 16.5
    for bit in range(32):
        assert 850 < sum(body >> bit & 1 for body in bodies) < 1150


def test_seals_of_one_slot_share_nothing_to_see() -> None:
    ids = make(slot=0)
    seals = [int.from_bytes(ids.issue()[-4:], "big") for _ in range(2000)]
    for bit in range(32):
        assert 850 < sum(seal >> bit & 1 for seal in seals) < 1150


def test_generations_start_far_apart() -> None:
    starts = sorted(generation_start(12345, generation) for generation in range(1000))
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert min(gaps) > 1_000_000


def test_a_forked_child_issues_other_ids() -> None:
    ids = make()
    ids.issue()
    end, report = os.pipe()
    if os.fork() == 0:
        os.write(report, b"".join(ids.issue() for _ in range(500)))
        os._exit(0)
    os.wait()
    theirs = os.read(end, 8 * 500)
    os.close(end)
    os.close(report)
    assert not {theirs[i : i + 8] for i in range(0, len(theirs), 8)} & {ids.issue() for _ in range(500)}


def test_foreign_values_are_not_ours() -> None:
    ids = make()
    assert ids.slot_of(b"") is None
    assert ids.slot_of(bytes(7)) is None
    assert ids.slot_of(ids.issue() + b"\0") is None
    assert make(keys=GroupKeys.from_key(bytes(16))).slot_of(ids.issue()) is None
    assert make(slot=7, slots=8).slot_of(make(slot=9, slots=10).issue()) is None


def test_reset_tokens_are_the_same_in_every_worker_and_differ_by_id() -> None:
    cid = make().issue()
    assert make(slot=1).reset_token(cid) == make(slot=2).reset_token(cid)
    assert len(make().reset_token(cid)) == 16
    assert make().reset_token(cid) != make().reset_token(make(start=1).issue())
    assert make(keys=GroupKeys.from_key(bytes(16))).reset_token(cid) != make().reset_token(cid)


def test_a_factory_call_issues_only_the_right_length() -> None:
    ids = make(length=16)
    assert ids.slot_of(ids(16)) == 3
    with pytest.raises(ValueError, match="asked for a connection ID of 8 bytes, this group issues 16"):
        ids(8)


def test_the_secrets_of_a_group_differ_from_each_other() -> None:
    secrets = [KEYS.steering, KEYS.reset, KEYS.permutation, KEYS.token_secret]
    assert len(set(secrets)) == 4
    assert GroupKeys.from_key(bytes(range(16))).reset == KEYS.reset


@pytest.mark.parametrize("length", [0, 3, 17, 100])
def test_the_extension_reads_no_byte_past_an_id(length: int) -> None:
    with pytest.raises(ValueError, match="8 to 20 bytes"):
        _kernel.open_seal(bytes(16), bytes(length + 4))
    with pytest.raises(ValueError, match="8 to 20 bytes"):
        _kernel.seal(bytes(16), bytes(length), 0)
    with pytest.raises(ValueError, match="key has 5 bytes"):
        _kernel.siphash24(b"short", bytes(8))
