"""Datagrams that a server on the open Internet must expect, well-formed and otherwise."""

import random
from collections.abc import Iterator, Sequence

from quicsteer import _kernel
from quicsteer.abi import CID_LENGTH_MAX, LONG_DCID_OFFSET, SEAL_LENGTH
from quicsteer.decision import Rules

VERSIONS = {
    "negotiation": 0x00000000,
    "1": 0x00000001,
    "2": 0x6B3343CF,  # RFC 9369
    "draft 29": 0xFF00001D,
    "greased": 0x1A2A3A4A,  # RFC 9000, 15
    "SCONE": 0x6F7DC0FD,  # draft-ietf-scone-protocol
    "highest": 0xFFFFFFFF,
}

UDP_PAYLOAD_MAX = 65507
"""Most bytes of a datagram over IPv4."""

SIZES = (1200, 1472, 1473, 8972, 9000, 16_384, 30_000, UDP_PAYLOAD_MAX)
"""An Initial, around one Ethernet packet, jumbo frames, many fragments, and the largest one."""

_RETRY, _INITIAL, _HANDSHAKE, _SHORT = 0xF0, 0xC0, 0xE0, 0x40
_RETRY_TAG_LENGTH = 16
_RESET_LENGTHS = (5, 21, 22, 38, 43, 1199)  # RFC 9000, 10.3: at least 21, and smaller than what it answers


def issue(rules: Rules, slot: int, source: random.Random) -> bytes:
    """Return a connection ID of the group for a slot."""
    return _kernel.seal(rules.key, source.randbytes(rules.cid_length - SEAL_LENGTH), slot)


def long_header(first: int, version: int, dcid: bytes, rest: bytes = b"", length: int | None = None) -> bytes:
    """Return the start of a packet with a long header; ``length`` may lie about the DCID (RFC 8999, 5.1)."""
    said = len(dcid) if length is None else length
    return bytes([first]) + version.to_bytes(4, "big") + bytes([said]) + dcid + rest


def short_header(dcid: bytes, rest: bytes = b"", first: int = _SHORT) -> bytes:
    return bytes([first]) + dcid + rest


def hostile_set(rules: Rules, seed: int = 1) -> list[bytes]:
    """Return some 10,000 datagrams of every kind for a group; the same ones for the same rules and seed."""
    source = random.Random(seed)
    ours = [issue(rules, slot, source) for slot in range(rules.slots)]
    kinds = (_dcid_lengths, _cuts, _first_bytes, _forged, _other_packets, _coalesced, _sizes)
    datagrams = [datagram for kind in kinds for datagram in kind(ours, rules, source)]
    source.shuffle(datagrams)
    return datagrams


def _dcid_lengths(ours: Sequence[bytes], rules: Rules, source: random.Random) -> Iterator[bytes]:
    """Every length of a DCID in every version: followed by a payload, by nothing, and cut off."""
    for length in range(256):
        for version in VERSIONS.values():
            dcid = source.randbytes(length)
            yield long_header(_INITIAL, version, dcid, source.randbytes(30))
            yield long_header(_INITIAL, version, dcid)
            for missing in {1, length // 2, length} - {0}:
                yield long_header(_INITIAL, version, dcid[: length - missing], length=length)


def _cuts(ours: Sequence[bytes], rules: Rules, source: random.Random) -> Iterator[bytes]:
    """Datagrams that end at any byte of a header."""
    for whole in (short_header(ours[-1]), long_header(_INITIAL, 1, ours[-1]), bytes(30), b"\xff" * 300):
        for end in range(len(whole)):
            yield whole[:end]


def _first_bytes(ours: Sequence[bytes], rules: Rules, source: random.Random) -> Iterator[bytes]:
    """Every first byte, greased and reserved bits among them (RFC 9287), on connection IDs of ours and of others."""
    for first in range(256):
        for dcid in (source.choice(ours), source.randbytes(rules.cid_length)):
            rest = source.randbytes(24)
            yield short_header(dcid, rest, first) if first < 0x80 else long_header(first, 1, dcid, rest)


def _forged(ours: Sequence[bytes], rules: Rules, source: random.Random) -> Iterator[bytes]:
    """Connection IDs of ours for every slot, some with a changed bit, and ones that name slots beyond the last."""
    beyond = [issue(rules, slot, source) for slot in (rules.slots, rules.slots + 1, 40_000, 65_535)]
    for cid in (*ours, *beyond):
        yield short_header(cid, source.randbytes(20))
        for version in VERSIONS.values():
            yield long_header(_INITIAL, version, cid, source.randbytes(20))
            yield long_header(_INITIAL, version, cid + b"\0")
            yield long_header(_INITIAL, version, cid[:-1], source.randbytes(20))
    for cid in ours[:4]:
        for bit in range(8 * rules.cid_length):
            changed = (int.from_bytes(cid, "big") ^ 1 << bit).to_bytes(rules.cid_length, "big")
            yield short_header(changed, source.randbytes(20))


def _other_packets(ours: Sequence[bytes], rules: Rules, source: random.Random) -> Iterator[bytes]:
    """Packets that only servers send, and those that make no sense (RFC 9000, 10.3, 17.2.1, 17.2.5)."""
    for dcid in (*ours[-3:], source.randbytes(8), source.randbytes(20), b""):
        scid = bytes([rules.cid_length]) + source.choice(ours)
        yield long_header(_RETRY, 1, dcid, scid + source.randbytes(40 + _RETRY_TAG_LENGTH))
        yield long_header(0x80, 0, dcid, scid + b"\0\0\0\1\x6b\x33\x43\xcf")
        yield long_header(_INITIAL, VERSIONS["SCONE"], dcid, scid)
    for length in _RESET_LENGTHS:
        yield short_header(source.randbytes(length - 1))
    yield from (b"", b"\0", b"\x80", bytes(1200), b"\xff" * 1200, b"GET / HTTP/1.1\r\n\r\n")


def _coalesced(ours: Sequence[bytes], rules: Rules, source: random.Random) -> Iterator[bytes]:
    """Several packets in one datagram (RFC 9000, 12.2): the first one decides, whatever follows."""
    for cid in ours:
        other = source.choice(ours)
        first = long_header(_INITIAL, 1, cid, source.randbytes(50))
        for next_dcid in (cid, other, source.randbytes(20)):
            yield first + long_header(_HANDSHAKE, 1, next_dcid, source.randbytes(50)) + short_header(next_dcid)
            yield long_header(_INITIAL, VERSIONS["SCONE"], cid, b"\0") + long_header(_INITIAL, 1, next_dcid)


def _sizes(ours: Sequence[bytes], rules: Rules, source: random.Random) -> Iterator[bytes]:
    """Datagrams that lie in pages or come in fragments."""
    for size in SIZES:
        for cid in (ours[0], ours[-1], source.randbytes(rules.cid_length)):
            yield short_header(cid).ljust(size, source.randbytes(1))
            yield long_header(_INITIAL, 1, cid).ljust(size, source.randbytes(1))


def arbitrary(rules: Rules, source: random.Random) -> bytes:
    """Return random bytes, half of them arranged so that the decision goes deeper."""
    size = source.choice((source.randrange(40), source.randrange(300)))
    data = bytearray(source.randbytes(size))
    offset = LONG_DCID_OFFSET if data and data[0] >= 0x80 else 1
    if source.random() < 0.5 and size > LONG_DCID_OFFSET:
        data[LONG_DCID_OFFSET - 1] = source.choice((rules.cid_length, source.randrange(CID_LENGTH_MAX + 2)))
    if source.random() < 0.4 and size >= offset + rules.cid_length:
        data[offset : offset + rules.cid_length] = issue(rules, source.randrange(rules.slots + 2), source)
    return bytes(data)
