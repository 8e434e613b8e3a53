"""Connection IDs that name their slot to whoever has the key, and nothing to anybody else.

A connection ID is ``body || seal``. The seal is the last four bytes: the slot and a check bound to it, masked by a
keyed hash of the body (``csrc/decide.h``). No two connection IDs of a connection have anything in common that an
observer without the key could see (RFC 9000, 5.1 and 9.5).
"""

import hashlib
import itertools
import os
from dataclasses import dataclass
from typing import NamedTuple

from . import _kernel
from .abi import KEY_LENGTH, MESSAGE_LENGTH, RESET_TOKEN_LENGTH, SEAL_LENGTH

_COUNTER_LENGTH = 4
_GENERATION_STRIDE = 0x9E3779B1
"""How far apart two generations of a slot count: 2^32 over the golden ratio, so that no two ranges meet early."""


@dataclass(frozen=True, repr=False)
class GroupKeys:
    """The secrets of a group. All workers share them; nobody else may have them.

    ``steering`` keys the seal (16 bytes), ``reset`` the stateless reset tokens, ``permutation`` the bodies of short
    connection IDs, and ``token_secret`` (32 bytes) is for the address validation tokens of the QUIC stack.
    """

    steering: bytes
    reset: bytes
    permutation: bytes
    token_secret: bytes

    @classmethod
    def from_key(cls, key: bytes) -> "GroupKeys":
        """Derive all secrets from the group's key of 16 bytes."""

        def derive(purpose: bytes, length: int) -> bytes:
            return hashlib.blake2b(key=key, person=b"quicsteer", salt=purpose, digest_size=length).digest()

        return cls(key, derive(b"reset", 32), derive(b"body", KEY_LENGTH), derive(b"token", 32))


class Identity(NamedTuple):
    """What the connection IDs of one worker say: its slot, out of ``slots``; and where its counter of bodies starts."""

    slot: int
    slots: int
    length: int
    start: int


class ConnectionIds:
    """Issues and reads the connection IDs of one worker.

    Safe to use from several threads. A forked child counts on from a place of its own.
    """

    def __init__(self, keys: GroupKeys, identity: Identity) -> None:
        self._keys = keys
        self._slot, self._slots, self._length, start = identity
        self._counter = itertools.count(start)
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<ConnectionIds slot={self._slot} length={self._length}>"

    @property
    def length(self) -> int:
        """Bytes of every connection ID of the group: 8 to 20."""
        return self._length

    @property
    def slot(self) -> int:
        """The slot that issued connection IDs name."""
        return self._slot

    def issue(self) -> bytes:
        """Return a new connection ID, for a first Source Connection ID, NEW_CONNECTION_ID or Retry."""
        return _kernel.seal(self._keys.steering, self._new_body(self._length - SEAL_LENGTH), self._slot)

    def __call__(self, length: int) -> bytes:
        """Issue a connection ID of ``length`` bytes, for stacks that take a factory.

        Raises:
            ValueError: ``length`` is not the group's.
        """
        if length != self._length:
            raise ValueError(f"asked for a connection ID of {length} bytes, this group issues {self._length}")
        return self.issue()

    def slot_of(self, cid: bytes) -> int | None:
        """Return the slot that a connection ID names, or ``None`` when this group did not issue it.

        A value that somebody made up names a slot with a probability of (number of slots) / 2^32.
        """
        if len(cid) != self._length:
            return None
        slot = _kernel.open_seal(self._keys.steering, bytes(cid))
        return slot if slot is not None and slot < self._slots else None

    def reset_token(self, cid: bytes) -> bytes:
        """Return the stateless reset token of a connection ID: 16 bytes, the same in every worker (RFC 9000, 10.3.2).

        A worker may send it only for connection IDs that name its own slot and that it does not know: anything else
        lets an attacker end connections (RFC 9000, 21.11).
        """
        return hashlib.blake2b(bytes(cid), key=self._keys.reset, digest_size=RESET_TOKEN_LENGTH).digest()

    def _new_body(self, length: int) -> bytes:
        if length >= MESSAGE_LENGTH:
            return os.urandom(length)
        if os.getpid() != self._pid:
            self._counter = itertools.count(int.from_bytes(os.urandom(_COUNTER_LENGTH), "big"))
            self._pid = os.getpid()
        number = _permute(self._keys.permutation, self._slot, next(self._counter) & 0xFFFFFFFF)
        return number.to_bytes(_COUNTER_LENGTH, "big") + os.urandom(length - _COUNTER_LENGTH)


def generation_start(first: int, generation: int) -> int:
    """Return where the counter of a slot's ``generation``-th worker starts, when the first one started at ``first``."""
    return (first + generation * _GENERATION_STRIDE) & 0xFFFFFFFF


def _permute(key: bytes, slot: int, number: int) -> int:
    """Map a 32-bit number to another one, one to one, in an order that needs the key: a Feistel network."""
    left, right = number >> 16, number & 0xFFFF
    for stage in range(4):
        message = stage.to_bytes(2, "big") + slot.to_bytes(4, "big") + right.to_bytes(2, "big")
        left, right = right, left ^ (_kernel.siphash24(key, message) & 0xFFFF)
    return left << 16 | right
