"""What QUIC servers did, as figures: connections, how they ended, and streams that were reset, by error code.

Clients choose the codes that they send, of 2^62, so a counter keeps each code that RFC 9000 names and a number of
others; the rest are counted together.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, TypeVar

OTHER_CODES = -1
"""Stands for all codes beyond ``CODES_MAX``."""

CODES_MAX = 32
"""Codes without a name that are told apart, for each sender and kind."""

_ROWS_MAX = 2048
_COUNT_MAX = 2**63 - 1
_SENDERS = ("server", "client", "nobody")
_LAYERS = {False: "transport", True: "application"}
_FRAMES = ("RESET_STREAM", "STOP_SENDING")

_TRANSPORT_ERRORS = {
    0x00: "NO_ERROR",
    0x01: "INTERNAL_ERROR",
    0x02: "CONNECTION_REFUSED",
    0x03: "FLOW_CONTROL_ERROR",
    0x04: "STREAM_LIMIT_ERROR",
    0x05: "STREAM_STATE_ERROR",
    0x06: "FINAL_SIZE_ERROR",
    0x07: "FRAME_ENCODING_ERROR",
    0x08: "TRANSPORT_PARAMETER_ERROR",
    0x09: "CONNECTION_ID_LIMIT_ERROR",
    0x0A: "PROTOCOL_VIOLATION",
    0x0B: "INVALID_TOKEN",
    0x0C: "APPLICATION_ERROR",
    0x0D: "CRYPTO_BUFFER_EXCEEDED",
    0x0E: "KEY_UPDATE_ERROR",
    0x0F: "AEAD_LIMIT_REACHED",
    0x10: "NO_VIABLE_PATH",
    0x11: "VERSION_NEGOTIATION_ERROR",  # RFC 9368, 10.2
}

_ALERTS = {  # RFC 8446, 6.2
    10: "unexpected_message",
    20: "bad_record_mac",
    22: "record_overflow",
    40: "handshake_failure",
    42: "bad_certificate",
    43: "unsupported_certificate",
    44: "certificate_revoked",
    45: "certificate_expired",
    46: "certificate_unknown",
    47: "illegal_parameter",
    48: "unknown_ca",
    49: "access_denied",
    50: "decode_error",
    51: "decrypt_error",
    70: "protocol_version",
    71: "insufficient_security",
    80: "internal_error",
    86: "inappropriate_fallback",
    90: "user_canceled",
    109: "missing_extension",
    110: "unsupported_extension",
    112: "unrecognized_name",
    113: "bad_certificate_status_response",
    115: "unknown_psk_identity",
    116: "certificate_required",
    120: "no_application_protocol",
}

_CRYPTO_ERRORS = range(0x100, 0x200)


class ConnectionEnd(NamedTuple):
    """How a connection ended.

    ``sender`` of the CONNECTION_CLOSE is ``"server"``, ``"client"``, or ``"nobody"`` after an idle timeout.
    ``application`` tells application error codes from those of RFC 9000, 20.1.
    """

    sender: str
    application: bool
    code: int


class StreamReset(NamedTuple):
    """A stream that was given up: who sent ``frame``, ``"RESET_STREAM"`` or ``"STOP_SENDING"``, and its code.

    A STOP_SENDING asks the other side for a RESET_STREAM, which it answers by itself.
    """

    sender: str
    frame: str
    code: int


_Key = TypeVar("_Key", ConnectionEnd, StreamReset)


def name_transport_error(code: int) -> str | None:
    """Return the name that RFC 9000, 20.1 gives an error code; ``None`` when it has none."""
    if code in _CRYPTO_ERRORS:
        alert = code - _CRYPTO_ERRORS.start
        return f"CRYPTO_ERROR({_ALERTS.get(alert, alert)})"
    return _TRANSPORT_ERRORS.get(code)


def count_end(counter: Counter[ConnectionEnd], end: ConnectionEnd, more: int = 1) -> None:
    """Count the end of a connection."""
    named = not end.application and name_transport_error(end.code) is not None
    _count(counter, end, named, more)


def count_reset(counter: Counter[StreamReset], reset: StreamReset, more: int = 1) -> None:
    """Count a stream that was reset."""
    _count(counter, reset, False, more)


def _count(counter: Counter[_Key], key: _Key, named: bool, more: int) -> None:
    if key not in counter and not named and key.code != OTHER_CODES:
        alike = sum(other[:2] == key[:2] for other in counter)
        if alike >= CODES_MAX:
            key = key._replace(code=OTHER_CODES)
    counter[key] += more


@dataclass(frozen=True)
class QuicStats:
    """What one server, or several together, did since they started.

    ``connections`` and ``handshakes`` are open now, ``opened`` were ever opened. ``retries``: clients that were asked
    to prove their address, ``invalid_tokens``: that failed to. ``stateless_resets`` told clients that their connection
    is gone; ``unanswered_resets`` were forbidden by a rate limit or a short datagram. ``unsent`` datagrams were not
    taken by the kernel. ``ends`` and ``stream_resets`` are counted by error code.
    """

    connections: int = 0
    handshakes: int = 0
    opened: int = 0
    retries: int = 0
    invalid_tokens: int = 0
    stateless_resets: int = 0
    unanswered_resets: int = 0
    unsent: int = 0
    ends: Mapping[ConnectionEnd, int] = field(default_factory=dict)
    stream_resets: Mapping[StreamReset, int] = field(default_factory=dict)

    def __add__(self, other: "QuicStats") -> "QuicStats":
        ends, resets = Counter(self.ends), Counter(self.stream_resets)
        for end, count in other.ends.items():
            count_end(ends, end, count)
        for reset, count in other.stream_resets.items():
            count_reset(resets, reset, count)
        numbers = {name: getattr(self, name) + getattr(other, name) for name in _NUMBERS}
        return QuicStats(**numbers, ends=ends, stream_resets=resets)

    def past(self) -> "QuicStats":
        """Return what stays of the figures when the server is gone: it has no open connection any more."""
        return replace(self, connections=0, handshakes=0)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain types for JSON, as docs/stats.md describes them."""
        return {
            **{name: getattr(self, name) for name in _NUMBERS},
            "ends": [
                {
                    "sender": end.sender,
                    "layer": _LAYERS[end.application],
                    "code": None if end.code == OTHER_CODES else end.code,
                    "name": None if end.application else name_transport_error(end.code),
                    "count": count,
                }
                for end, count in sorted(self.ends.items())
            ],
            "stream_resets": [
                {
                    "sender": reset.sender,
                    "frame": reset.frame,
                    "code": None if reset.code == OTHER_CODES else reset.code,
                    "count": count,
                }
                for reset, count in sorted(self.stream_resets.items())
            ],
        }

    @classmethod
    def from_dict(cls, plain: Any) -> "QuicStats":
        """Return the figures that ``to_dict()`` made plain. They may come from a worker, which is not to be trusted.

        Raises:
            ValueError: they are no figures.
        """
        if not isinstance(plain, dict):
            raise ValueError("figures are a JSON object")
        ends: Counter[ConnectionEnd] = Counter()
        for row in _rows(plain.get("ends", [])):
            sender, layer = _one_of(row, "sender", _SENDERS), _one_of(row, "layer", tuple(_LAYERS.values()))
            end = ConnectionEnd(sender, layer == _LAYERS[True], _code(row))
            count_end(ends, end, _number(row, "count"))
        resets: Counter[StreamReset] = Counter()
        for row in _rows(plain.get("stream_resets", [])):
            reset = StreamReset(_one_of(row, "sender", _SENDERS), _one_of(row, "frame", _FRAMES), _code(row))
            count_reset(resets, reset, _number(row, "count"))
        numbers = {name: _number(plain, name) for name in _NUMBERS}
        return cls(**numbers, ends=ends, stream_resets=resets)


_NUMBERS = [field.name for field in fields(QuicStats) if field.type is int]


def total(figures: Iterable[QuicStats]) -> QuicStats:
    """Return what several servers did together."""
    return sum(figures, QuicStats())


def _rows(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or len(rows) > _ROWS_MAX or not all(isinstance(row, dict) for row in rows):
        raise ValueError("codes are a list of JSON objects")
    return rows


def _one_of(row: Mapping[str, Any], name: str, values: tuple[str, ...]) -> str:
    value = row.get(name)
    if value not in values:
        raise ValueError(f"{name} is {value!r:.40}, it must be one of {', '.join(values)}")
    return str(value)


def _code(row: Mapping[str, Any]) -> int:
    return OTHER_CODES if row.get("code") is None else _number(row, "code")


def _number(row: Mapping[str, Any], name: str) -> int:
    value = row.get(name, 0)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _COUNT_MAX:
        raise ValueError(f"{name} is {value!r:.40}, it must be a count")
    return value
