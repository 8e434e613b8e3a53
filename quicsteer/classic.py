"""The steering decision as a classic BPF program, for hosts where bpf(2) is not allowed.

Attaching a classic program to a reuseport group needs no privilege (Linux 4.6). The program is generated for one
group: its key, connection ID length, number of slots. It sees the UDP payload at offset 0 and returns the index of a
socket in the order in which the sockets joined the group.

What the kernel makes of a classic program (net/core/filter.c, net/core/sock_reuseport.c):

* a load past the end of the datagram returns 0, which is socket 0: lengths are checked first;
* scratch memory must be written on every path before it is read, and a return counts as falling through: all words
  are written at the start;
* conditional jumps reach 255 instructions;
* an index that is no socket means the kernel's own hash over all sockets: it is never returned.
"""

import struct
from dataclasses import dataclass

from .abi import (
    CID_LENGTH_MIN,
    LONG_DCID_LENGTH_OFFSET,
    LONG_DCID_OFFSET,
    LONG_HEADER_BIT,
    MESSAGE_LENGTH,
    SEAL_LENGTH,
    SHORT_DCID_OFFSET,
    TABLE_SIZE,
)

# Instruction classes, sizes, modes and operations (include/uapi/linux/bpf_common.h, filter.h).
_LD, _LDX, _ST, _STX, _ALU, _JMP, _RET, _MISC = range(8)
_W, _H, _B = 0x00, 0x08, 0x10
_IMM, _ABS, _IND, _MEM, _LEN = 0x00, 0x20, 0x40, 0x60, 0x80
_ADD, _MUL, _OR, _AND, _LSH, _RSH, _MOD, _XOR = 0x00, 0x20, 0x40, 0x50, 0x60, 0x70, 0x90, 0xA0
_JA, _JEQ, _JGT, _JGE, _JSET = 0x00, 0x10, 0x20, 0x30, 0x40
_K, _X, _A = 0x00, 0x08, 0x10
_TAX = 0x00
_PACKET_HASH = 0xFFFFF000 + 32  # SKF_AD_OFF + SKF_AD_RXHASH: the kernel's hash of the packet, skb->hash

INSTRUCTIONS_MAX = 4096
"""Longest program that the kernel takes (BPF_MAXINSNS)."""

_SCRATCH_WORDS = 16
_CONDITIONAL_REACH = 255


@dataclass
class _Instruction:
    code: int
    k: int = 0
    if_true: str | None = None
    if_false: str | None = None


class Assembler:
    """Collects instructions; labels are resolved at the end, and every jump goes forward."""

    def __init__(self) -> None:
        self._instructions: list[_Instruction] = []
        self._labels: dict[str, int] = {}

    def emit(self, code: int, k: int = 0) -> None:
        self._instructions.append(_Instruction(code, k & 0xFFFFFFFF))

    def jump(self, label: str) -> None:
        self._instructions.append(_Instruction(_JMP | _JA, 0, label))

    def jump_if(self, test: int, k: int, if_true: str | None, if_false: str | None = None) -> None:
        """Compare A with ``k`` (or with X) and jump; ``None`` means the next instruction."""
        self._instructions.append(_Instruction(_JMP | test, k, if_true, if_false))

    def label(self, name: str) -> None:
        self._labels[name] = len(self._instructions)

    def assemble(self) -> bytes:
        """Return the program as packed ``struct sock_filter``."""
        if len(self._instructions) > INSTRUCTIONS_MAX:
            raise ValueError(f"{len(self._instructions)} instructions, the kernel takes {INSTRUCTIONS_MAX}")
        return b"".join(self._pack(index, entry) for index, entry in enumerate(self._instructions))

    def _pack(self, index: int, entry: _Instruction) -> bytes:
        def distance(label: str | None) -> int:
            return self._labels[label] - index - 1 if label else 0

        if entry.code == _JMP | _JA:
            return struct.pack("=HBBI", entry.code, 0, 0, distance(entry.if_true))
        jumps = distance(entry.if_true), distance(entry.if_false)
        if max(jumps) > _CONDITIONAL_REACH or min(jumps) < 0:
            raise ValueError(f"instruction {index} cannot jump by {jumps}")
        return struct.pack("=HBBI", entry.code, *jumps, entry.k)


@dataclass(frozen=True)
class _Word64:
    """A 64-bit variable as the numbers of two 32-bit scratch words."""

    high: int
    low: int

    def swapped(self) -> "_Word64":
        """The same words rotated by 32 bits, for free."""
        return _Word64(self.low, self.high)


class _SipHash:
    """SipHash-2-4 of 8 bytes on scratch words 0 to 8; the message lies in words 9 (high) and 10 (low)."""

    MESSAGE = _Word64(9, 10)

    def __init__(self, assembler: Assembler, key: bytes) -> None:
        self._asm = assembler
        self._v = [_Word64(0, 1), _Word64(2, 3), _Word64(4, 5), _Word64(6, 7)]
        self._spare = 8
        k0, k1 = struct.unpack("<QQ", key)
        self._initial = (
            k0 ^ 0x736F6D6570736575,
            k1 ^ 0x646F72616E646F6D,
            k0 ^ 0x6C7967656E657261,
            k1 ^ 0x7465646279746573,
        )

    def run(self) -> _Word64:
        """Emit the hash; return where its high and low word are."""
        for variable, value in zip(self._v, self._initial, strict=True):
            for word, half in ((variable.high, value >> 32), (variable.low, value & 0xFFFFFFFF)):
                self._asm.emit(_LD | _IMM, half)
                self._asm.emit(_ST, word)
        self._xor(3, self.MESSAGE)
        self._rounds(2)
        self._xor(0, self.MESSAGE)
        self._xor_constant(self._v[3].high, MESSAGE_LENGTH << 24)
        self._rounds(2)
        self._xor_constant(self._v[0].high, MESSAGE_LENGTH << 24)
        self._xor_constant(self._v[2].low, 0xFF)
        self._rounds(4)
        for other in self._v[1:]:
            self._xor(0, other)
        return self._v[0]

    def _rounds(self, count: int) -> None:
        for _ in range(count):
            self._add(0, 1)
            self._rotate_xor(1, 13, 0)
            self._v[0] = self._v[0].swapped()
            self._add(2, 3)
            self._rotate_xor(3, 16, 2)
            self._add(0, 3)
            self._rotate_xor(3, 21, 0)
            self._add(2, 1)
            self._rotate_xor(1, 17, 2)
            self._v[2] = self._v[2].swapped()

    def _add(self, to: int, what: int) -> None:
        """v[to] += v[what].

        The carry is the top bit of the mean of the low words, (a & b) + ((a ^ b) >> 1): a jump on it would be
        mispredicted half of the time.
        """
        asm, a, b, low = self._asm, self._v[to], self._v[what], self._spare
        asm.emit(_LD | _MEM, a.low)
        asm.emit(_LDX | _MEM, b.low)
        asm.emit(_ALU | _ADD | _X)
        asm.emit(_ST, low)
        asm.emit(_LD | _MEM, a.low)
        asm.emit(_ALU | _AND | _X)
        asm.emit(_ST, _BOTH)
        asm.emit(_LD | _MEM, a.low)
        asm.emit(_ALU | _XOR | _X)
        asm.emit(_ALU | _RSH | _K, 1)
        asm.emit(_LDX | _MEM, _BOTH)
        asm.emit(_ALU | _ADD | _X)
        asm.emit(_ALU | _RSH | _K, 31)
        asm.emit(_LDX | _MEM, b.high)
        asm.emit(_ALU | _ADD | _X)
        asm.emit(_LDX | _MEM, a.high)
        asm.emit(_ALU | _ADD | _X)
        asm.emit(_ST, a.high)
        self._v[to] = _Word64(a.high, low)
        self._spare = a.low

    def _rotate_xor(self, which: int, bits: int, other: int) -> None:
        """v[which] = rotate(v[which], bits) ^ v[other], for bits under 32."""
        v, o = self._v[which], self._v[other]
        self._rotated_half(v.high, v.low, bits, o.high, self._spare)
        self._rotated_half(v.low, v.high, bits, o.low, v.low)
        self._v[which] = _Word64(self._spare, v.low)
        self._spare = v.high

    def _rotated_half(self, upper: int, lower: int, bits: int, other: int, to: int) -> None:
        asm = self._asm
        asm.emit(_LD | _MEM, upper)
        asm.emit(_ALU | _LSH | _K, bits)
        asm.emit(_MISC | _TAX)
        asm.emit(_LD | _MEM, lower)
        asm.emit(_ALU | _RSH | _K, 32 - bits)
        asm.emit(_ALU | _OR | _X)
        asm.emit(_LDX | _MEM, other)
        asm.emit(_ALU | _XOR | _X)
        asm.emit(_ST, to)

    def _xor(self, to: int, what: _Word64) -> None:
        for target, source in ((self._v[to].high, what.high), (self._v[to].low, what.low)):
            self._asm.emit(_LD | _MEM, target)
            self._asm.emit(_LDX | _MEM, source)
            self._asm.emit(_ALU | _XOR | _X)
            self._asm.emit(_ST, target)

    def _xor_constant(self, word: int, value: int) -> None:
        self._asm.emit(_LD | _MEM, word)
        self._asm.emit(_ALU | _XOR | _K, value)
        self._asm.emit(_ST, word)


# Scratch words beyond those of the hash.
_SEAL, _FORM, _CHECKED, _TEMPORARY, _BOTH = 11, 12, 13, 14, 15
_FORM_SHORT, _FORM_LONG, _FORM_FOREIGN = 0, 1, 2  # foreign: a DCID of another length than ours, so a client's


def steering_program(key: bytes, cid_length: int, listeners: int, slots: int, drop_invalid: bool) -> bytes:
    """Return the program of a group as packed ``struct sock_filter``.

    Sockets must join the group in the order of their slots, the sink (index ``slots``) last.
    """
    asm = Assembler()
    asm.emit(_LD | _IMM, 0)
    for word in range(_SCRATCH_WORDS):
        asm.emit(_ST, word)
    _read_head(asm, cid_length)
    asm.label("malformed")
    if drop_invalid:
        asm.emit(_RET | _K, slots)
    else:
        asm.emit(_LD | _W | _ABS, _PACKET_HASH)
        _return_listener(asm, listeners)
    asm.label("hash")
    hashed = _SipHash(asm, key).run()
    _return_slot(asm, hashed, slots)
    asm.label("not ours")
    if drop_invalid:
        asm.emit(_LD | _MEM, _FORM)
        asm.jump_if(_JEQ | _K, _FORM_SHORT, None, "dispatch")
        asm.emit(_RET | _K, slots)
        asm.label("dispatch")
    asm.emit(_LD | _MEM, hashed.high)
    _return_listener(asm, listeners)
    return asm.assemble()


def _read_head(asm: Assembler, cid_length: int) -> None:
    """Leave form, message and seal in scratch words and go to "hash", or go to "malformed"."""
    asm.emit(_LD | _LEN)
    asm.jump_if(_JGE | _K, SHORT_DCID_OFFSET, None, "malformed")
    asm.emit(_LD | _B | _ABS, 0)
    asm.jump_if(_JSET | _K, LONG_HEADER_BIT, "long", None)
    asm.emit(_LD | _LEN)
    asm.jump_if(_JGE | _K, SHORT_DCID_OFFSET + cid_length, None, "malformed")
    _read_cid(asm, SHORT_DCID_OFFSET, cid_length, _FORM_SHORT)
    asm.jump("hash")

    asm.label("long")
    asm.emit(_LD | _LEN)
    asm.jump_if(_JGE | _K, LONG_DCID_OFFSET, None, "malformed")
    asm.emit(_LD | _B | _ABS, LONG_DCID_LENGTH_OFFSET)
    asm.jump_if(_JGE | _K, CID_LENGTH_MIN, None, "malformed")
    asm.emit(_ALU | _ADD | _K, LONG_DCID_OFFSET)
    asm.emit(_MISC | _TAX)
    asm.emit(_LD | _LEN)
    asm.jump_if(_JGE | _X, 0, None, "malformed")
    asm.emit(_LD | _B | _ABS, LONG_DCID_LENGTH_OFFSET)
    asm.jump_if(_JEQ | _K, cid_length, None, "foreign")
    _read_cid(asm, LONG_DCID_OFFSET, cid_length, _FORM_LONG)
    asm.jump("hash")

    asm.label("foreign")
    _read_message(asm, LONG_DCID_OFFSET, MESSAGE_LENGTH)
    _store(asm, _FORM, _FORM_FOREIGN)
    asm.jump("hash")


def _read_cid(asm: Assembler, offset: int, cid_length: int, form: int) -> None:
    """Take a connection ID of our length apart: the last 8 bytes of its body, and its seal."""
    body = cid_length - SEAL_LENGTH
    used = min(body, MESSAGE_LENGTH)
    _read_message(asm, offset + body - used, used)
    asm.emit(_LD | _W | _ABS, offset + body)
    asm.emit(_ST, _SEAL)
    _store(asm, _FORM, form)


def _read_message(asm: Assembler, offset: int, length: int) -> None:
    """Read 4 to 8 bytes as a little-endian 64-bit integer; missing ones are zero."""
    _read_little_endian(asm, offset, 4, _SipHash.MESSAGE.low)
    _read_little_endian(asm, offset + 4, length - 4, _SipHash.MESSAGE.high)


def _read_little_endian(asm: Assembler, offset: int, length: int, to: int) -> None:
    """Read 0 to 4 bytes; the packet is loaded in network byte order and turned round."""
    if length == 4:
        asm.emit(_LD | _W | _ABS, offset)
    elif length == 3:
        asm.emit(_LD | _H | _ABS, offset)
        asm.emit(_ALU | _LSH | _K, 16)
        asm.emit(_ST, _TEMPORARY)
        asm.emit(_LD | _B | _ABS, offset + 2)
        asm.emit(_ALU | _LSH | _K, 8)
        asm.emit(_LDX | _MEM, _TEMPORARY)
        asm.emit(_ALU | _OR | _X)
    elif length == 2:
        asm.emit(_LD | _H | _ABS, offset)
        asm.emit(_ALU | _LSH | _K, 16)
    elif length == 1:
        asm.emit(_LD | _B | _ABS, offset)
        asm.emit(_ALU | _LSH | _K, 24)
    else:
        asm.emit(_LD | _IMM, 0)
    _swap_bytes(asm)
    asm.emit(_ST, to)


def _swap_bytes(asm: Assembler) -> None:
    """Reverse the bytes of A."""
    asm.emit(_ST, _TEMPORARY)
    asm.emit(_ALU | _LSH | _K, 24)
    asm.emit(_MISC | _TAX)
    for shift, bits, mask in ((_LSH, 8, 0xFF0000), (_RSH, 8, 0xFF00), (_RSH, 24, 0xFF)):
        asm.emit(_LD | _MEM, _TEMPORARY)
        asm.emit(_ALU | shift | _K, bits)
        asm.emit(_ALU | _AND | _K, mask)
        asm.emit(_ALU | _OR | _X)
        asm.emit(_MISC | _TAX)


def _return_slot(asm: Assembler, hashed: _Word64, slots: int) -> None:
    """Return the slot that the seal names, or go to "not ours"."""
    asm.emit(_LD | _MEM, _FORM)
    asm.jump_if(_JEQ | _K, _FORM_FOREIGN, "not ours", None)
    asm.emit(_LD | _MEM, _SEAL)
    asm.emit(_LDX | _MEM, hashed.low)
    asm.emit(_ALU | _XOR | _X)
    asm.emit(_ST, _CHECKED)
    asm.emit(_ALU | _AND | _K, 0xFFFF)
    asm.emit(_ST, _TEMPORARY)
    asm.emit(_LDX | _MEM, hashed.high)
    asm.emit(_ALU | _MUL | _X)
    asm.emit(_ALU | _AND | _K, 0xFFFF0000)
    asm.emit(_LDX | _MEM, _TEMPORARY)
    asm.emit(_ALU | _OR | _X)
    asm.emit(_LDX | _MEM, _CHECKED)
    asm.jump_if(_JEQ | _X, 0, None, "not ours")
    asm.emit(_LD | _MEM, _TEMPORARY)
    asm.jump_if(_JGE | _K, slots, "not ours", None)
    asm.emit(_RET | _A)


def _return_listener(asm: Assembler, listeners: int) -> None:
    """Return the listener slot for the hash in A: what the default dispatch table of the eBPF program holds."""
    asm.emit(_ALU | _AND | _K, TABLE_SIZE - 1)
    asm.emit(_ALU | _MOD | _K, listeners)
    asm.emit(_RET | _A)


def _store(asm: Assembler, word: int, value: int) -> None:
    asm.emit(_LD | _IMM, value)
    asm.emit(_ST, word)
