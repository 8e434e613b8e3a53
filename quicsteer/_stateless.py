"""What a QUIC server answers without a connection: Retry tokens and stateless resets. No I/O, and no QUIC stack."""

import hashlib
import hmac
import os
from typing import Any

from .abi import CID_LENGTH_MAX, RESET_TOKEN_LENGTH

RETRY_LIFETIME = 30.0
"""Seconds that a client has to come back with a Retry token (RFC 9000, 8.1.4)."""

RETRY_ROTATION = 3600.0
"""Seconds after which tokens are made under another key. A token says when it was made, and is checked under the key of
that time for its whole lifetime."""

RESET_LENGTH_MIN = 21
"""Shortest datagram that can be a stateless reset (RFC 9000, 10.3)."""

RESET_LENGTH_MAX = CID_LENGTH_MAX + 22
"""Long enough to pass for a packet, whatever the length of connection IDs (RFC 9000, 10.3)."""

_TIME_LENGTH = 8
_CLOCK_STEP = 0.001  # a token says its time in milliseconds
_MAC_LENGTH = 16
_SHORT_HEADER = 0x40  # header form 0, fixed bit 1 (RFC 9000, 17.3.1)


class RetryTokens:
    """Makes and checks the tokens of Retry packets, the same in every worker that has the secret.

    A token is bound to the client's address and to the connection ID that the Retry gave it (RFC 9000, 8.1.4 and
    17.2.5.2), and says when it was made and which DCID the client chose first. Times are in seconds of the monotonic
    clock, which all processes of a host share. The keys follow from the secret and the time, so workers rotate them
    together without a word: those of one generation, of the next, and those that replace a crashed one.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._keys: dict[int, bytes] = {}

    def create(self, address: tuple[Any, ...], original_dcid: bytes, retry_scid: bytes, now: float) -> bytes:
        """Return a token for a client at ``address``."""
        content = int(now * 1000).to_bytes(_TIME_LENGTH, "big") + original_dcid
        return content + self._mac(content, address, retry_scid, self._key(now))

    def validate(self, token: bytes, address: tuple[Any, ...], dcid: bytes, now: float) -> bytes | None:
        """Return the DCID that the client chose first, or ``None`` when the token is not good for this datagram."""
        content, mac = token[:-_MAC_LENGTH], token[-_MAC_LENGTH:]
        made = int.from_bytes(content[:_TIME_LENGTH], "big") / 1000
        if len(content) < _TIME_LENGTH or not -_CLOCK_STEP <= now - made <= RETRY_LIFETIME:
            return None
        if not hmac.compare_digest(mac, self._mac(content, address, dcid, self._key(made))):
            return None
        return content[_TIME_LENGTH:]

    def _key(self, now: float) -> bytes:
        """Return the key of a time."""
        period = int(now // RETRY_ROTATION)
        key = self._keys.get(period)
        if key is None:
            key = hashlib.blake2b(period.to_bytes(8, "big"), key=self._secret, person=b"retry key").digest()
            self._keys = {known: old for known, old in self._keys.items() if known >= period - 1}
            self._keys[period] = key
        return key

    @staticmethod
    def _mac(content: bytes, address: tuple[Any, ...], retry_scid: bytes, key: bytes) -> bytes:
        host, port = address[:2]
        mac = hashlib.blake2b(key=key, person=b"retry token", digest_size=_MAC_LENGTH)
        for part in (content, retry_scid, f"{host} {port}".encode()):
            mac.update(len(part).to_bytes(2, "big") + part)
        return mac.digest()


def stateless_reset(trigger_length: int, token: bytes) -> bytes | None:
    """Return a stateless reset in answer to a datagram of ``trigger_length`` bytes, ``None`` when that is too short.

    It is shorter than what it answers, so that two endpoints cannot go on resetting each other (RFC 9000, 10.3.3).
    """
    length = min(trigger_length - 1, RESET_LENGTH_MAX)
    if length < RESET_LENGTH_MIN:
        return None
    noise = bytearray(os.urandom(length - RESET_TOKEN_LENGTH))
    noise[0] = noise[0] & (_SHORT_HEADER - 1) | _SHORT_HEADER
    return bytes(noise) + token


class RateLimit:
    """Lets ``rate`` events a second pass, and as many at once (RFC 9000, 10.3.3 asks for a limit on resets)."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._left = rate
        self._last = 0.0

    def allow(self, now: float) -> bool:
        """Tell whether an event at ``now``, in seconds, may pass."""
        self._left = min(self._rate, self._left + (now - self._last) * self._rate)
        self._last = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
