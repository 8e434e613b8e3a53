"""The steering decision in Python: the model that the C header, the eBPF and the classic program are held against.

It is written for reading, shares no code with the others, and does no I/O. ``csrc/decide.h`` has the same rooms.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from .abi import MESSAGE_LENGTH, SEAL_LENGTH, TABLE_SIZE, Outcome
from .invariants import read_header

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Rules:
    """What the decision of one group depends on.

    ``listeners`` is the number of listener slots, ``slots`` the number of all slots without the sink.
    """

    key: bytes = field(repr=False)
    cid_length: int
    listeners: int
    slots: int
    drop_invalid: bool = False


class Decision(NamedTuple):
    """An outcome and the slot that takes the datagram.

    ``slot`` is ``None`` for a malformed datagram that goes to a listener slot: the kernel's packet hash picks it.
    The sink is the slot after the last one.
    """

    outcome: Outcome
    slot: int | None


def decide(datagram: bytes, rules: Rules) -> Decision:
    """Return what the steering program decides for a datagram, with the default dispatch table."""
    header = read_header(datagram, rules.cid_length)
    if header is None:
        return Decision(Outcome.MALFORMED, rules.slots if rules.drop_invalid else None)
    if len(header.dcid) == rules.cid_length:
        hashed = seal_hash(rules.key, header.dcid)
        slot = open_seal(header.dcid, hashed)
        if slot is not None and slot < rules.slots:
            return Decision(Outcome.ROUTED, slot)
    else:
        hashed = siphash24(rules.key, header.dcid[:MESSAGE_LENGTH])
    if not header.long and rules.drop_invalid:
        return Decision(Outcome.UNROUTABLE, rules.slots)
    listener = (hashed >> 32) % TABLE_SIZE % rules.listeners
    return Decision(Outcome.DISPATCHED if header.long else Outcome.UNROUTABLE, listener)


def seal_hash(key: bytes, cid: bytes) -> int:
    """Return the keyed hash of a connection ID of the group's length: of the last 8 bytes of its body."""
    return siphash24(key, cid[:-SEAL_LENGTH][-MESSAGE_LENGTH:].ljust(MESSAGE_LENGTH, b"\0"))


def open_seal(cid: bytes, hashed: int) -> int | None:
    """Return the slot that a connection ID names, or ``None`` when its seal is not one of ours."""
    word = int.from_bytes(cid[-SEAL_LENGTH:], "big") ^ (hashed & _MASK32)
    slot = word & 0xFFFF
    return slot if word == seal_word(slot, hashed) else None


def seal_word(slot: int, hashed: int) -> int:
    """Return what a seal hides: a check bound to the slot in the upper half, the slot in the lower."""
    check = (slot * (hashed >> 32) & _MASK32) >> 16
    return check << 16 | slot


def siphash24(key: bytes, message: bytes) -> int:
    """Return SipHash-2-4 of an 8-byte message under a 16-byte key (Aumasson, Bernstein 2012)."""
    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]
    for word in (int.from_bytes(message, "little"), len(message) << 56):
        v[3] ^= word
        _rounds(v, 2)
        v[0] ^= word
    v[2] ^= 0xFF
    _rounds(v, 4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def _rounds(v: list[int], count: int) -> None:
    for _ in range(count):
        v[0] = (v[0] + v[1]) & _MASK64
        v[1] = _rotate(v[1], 13) ^ v[0]
        v[0] = _rotate(v[0], 32)
        v[2] = (v[2] + v[3]) & _MASK64
        v[3] = _rotate(v[3], 16) ^ v[2]
        v[0] = (v[0] + v[3]) & _MASK64
        v[3] = _rotate(v[3], 21) ^ v[0]
        v[2] = (v[2] + v[1]) & _MASK64
        v[1] = _rotate(v[1], 17) ^ v[2]
        v[2] = _rotate(v[2], 32)


def _rotate(value: int, bits: int) -> int:
    return (value << bits | value >> (64 - bits)) & _MASK64
