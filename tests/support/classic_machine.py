"""A small classic BPF interpreter (net/core/filter.c), to run the generated program on arbitrary bytes."""

import struct
from typing import NamedTuple

_MASK = 0xFFFFFFFF
_PACKET_HASH = 0xFFFFF000 + 32


class Result(NamedTuple):
    """What the program returned and after how many instructions."""

    value: int
    steps: int


def run(program: bytes, packet: bytes, packet_hash: int = 0) -> Result:
    """Run a program of packed ``struct sock_filter`` on a packet; a load past its end returns 0, as in the kernel."""
    instructions = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    a = x = counter = steps = 0
    memory: dict[int, int] = {}
    while True:
        code, if_true, if_false, k = instructions[counter]
        counter, steps = counter + 1, steps + 1
        kind, operand = code & 0x07, x if code & 0x08 else k
        if kind in (0, 1):  # LD, LDX
            loaded = _load(code, k, packet, memory, packet_hash)
            if loaded is None:
                return Result(0, steps)
            a, x = (loaded, x) if kind == 0 else (a, loaded)
        elif kind == 2:  # ST
            memory[k] = a
        elif kind == 4:  # ALU
            a = _compute(code & 0xF0, a, operand)
        elif kind == 5:  # JMP
            test = code & 0xF0
            if test == 0:
                counter += k
            else:
                holds = {0x10: a == operand, 0x20: a > operand, 0x30: a >= operand, 0x40: bool(a & operand)}[test]
                counter += if_true if holds else if_false
        elif kind == 6:  # RET
            return Result(a if code & 0x18 == 0x10 else k, steps)
        elif kind == 7:  # MISC
            a, x = (x, x) if code & 0xF8 == 0x80 else (a, a)
        else:
            raise AssertionError(f"instruction {code:#x} is not generated")


def _load(code: int, k: int, packet: bytes, memory: dict[int, int], packet_hash: int) -> int | None:
    mode = code & 0xE0
    if mode == 0x00:
        return k
    if mode == 0x60:
        return memory[k]  # a KeyError is a read of scratch memory that was never written
    if mode == 0x80:
        return len(packet)
    assert mode == 0x20, "no indexed loads are generated"
    if k == _PACKET_HASH:
        return packet_hash
    size = {0x00: 4, 0x08: 2, 0x10: 1}[code & 0x18]
    return int.from_bytes(packet[k : k + size], "big") if k + size <= len(packet) else None


def _compute(operation: int, a: int, operand: int) -> int:
    results = {
        0x00: a + operand,
        0x20: a * operand,
        0x40: a | operand,
        0x50: a & operand,
        0x60: a << operand if operand < 32 else 0,
        0x70: a >> operand if operand < 32 else 0,
        0x90: a % operand if operand else 0,
        0xA0: a ^ operand,
    }
    return results[operation] & _MASK
