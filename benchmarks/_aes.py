"""What an AES-128 decryption by tables needs (FIPS 197, 5.3.5: the equivalent inverse cipher).

Only ``peers.bpf.c`` decrypts with this; to encrypt, and for everything that guards something, there is a library.
"""

import functools
from collections.abc import Sequence

_POLYNOMIAL = 0x11B
_INVERSE_MIX = (14, 9, 13, 11)
_ROUNDS, _KEY_WORDS = 10, 4


def _multiply(a: int, b: int) -> int:
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = a << 1 ^ (_POLYNOMIAL if a & 0x80 else 0)
        b >>= 1
    return product


@functools.cache
def substitutions() -> bytes:
    """Return the S-box (FIPS 197, 5.1.1)."""
    box = []
    for value in range(256):
        inverse = next((other for other in range(256) if _multiply(value, other) == 1), 0)
        turned = inverse
        for bits in range(1, 5):
            turned ^= (inverse << bits | inverse >> (8 - bits)) & 255
        box.append(turned ^ 0x63)
    return bytes(box)


@functools.cache
def inverse_substitutions() -> bytes:
    """Return the inverse S-box."""
    box = substitutions()
    return bytes(box.index(value) for value in range(256))


@functools.cache
def inverse_tables() -> tuple[tuple[int, ...], ...]:
    """Return, for each byte of a column, what it becomes under the inverse S-box and InvMixColumns."""
    tables = []
    for place in range(4):
        factors = [_INVERSE_MIX[(row - place) % 4] for row in range(4)]
        tables.append(
            tuple(_to_word([_multiply(value, factor) for factor in factors]) for value in inverse_substitutions())
        )
    return tuple(tables)


def decryption_keys(key: bytes) -> list[int]:
    """Return the words of the round keys, in the order in which a decryption uses them."""
    box = substitutions()
    words = [int.from_bytes(key[4 * i : 4 * i + 4]) for i in range(_KEY_WORDS)]
    constant = 1
    for i in range(_KEY_WORDS, 4 * (_ROUNDS + 1)):
        word = words[-1]
        if i % _KEY_WORDS == 0:
            word = int.from_bytes(bytes(box[byte] for byte in (word << 8 | word >> 24).to_bytes(5)[1:]))
            word ^= constant << 24
            constant = _multiply(constant, 2)
        words.append(words[i - _KEY_WORDS] ^ word)
    rounds = [words[4 * i : 4 * i + 4] for i in range(_ROUNDS + 1)][::-1]
    return [*rounds[0], *(_unmix(word) for middle in rounds[1:-1] for word in middle), *rounds[-1]]


def _unmix(word: int) -> int:
    tables, box = inverse_tables(), substitutions()
    mixed = 0
    for place, byte in enumerate(word.to_bytes(4)):
        mixed ^= tables[place][box[byte]]
    return mixed


def _to_word(values: Sequence[int]) -> int:
    return int.from_bytes(bytes(values))
