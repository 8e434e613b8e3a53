"""The DCID of a datagram, read by what RFC 8999 guarantees for every QUIC version and nothing else.

Neither the packet type, nor the fixed bit (RFC 9287), nor the version is looked at.
"""

from typing import NamedTuple

from .abi import (
    CID_LENGTH_MIN,
    LONG_DCID_LENGTH_OFFSET,
    LONG_DCID_OFFSET,
    LONG_HEADER_BIT,
    SHORT_DCID_OFFSET,
)


class Header(NamedTuple):
    """The version-independent part of a datagram's first packet."""

    long: bool
    dcid: bytes


def read_header(datagram: bytes, cid_length: int) -> Header | None:
    """Return the header form and the DCID of a datagram, or ``None`` when it has no DCID to route by.

    ``cid_length`` is the length of the connection IDs that the group issues (8 to 20 bytes): a short header does not
    tell its own (RFC 8999, 5.2). A long header with a DCID of under 8 bytes counts as having none (RFC 9000, 7.2).
    """
    if not datagram:
        return None
    if datagram[0] & LONG_HEADER_BIT:
        if len(datagram) < LONG_DCID_OFFSET:
            return None
        length = datagram[LONG_DCID_LENGTH_OFFSET]
        if length < CID_LENGTH_MIN or len(datagram) < LONG_DCID_OFFSET + length:
            return None
        return Header(True, datagram[LONG_DCID_OFFSET : LONG_DCID_OFFSET + length])
    if len(datagram) < SHORT_DCID_OFFSET + cid_length:
        return None
    return Header(False, datagram[SHORT_DCID_OFFSET : SHORT_DCID_OFFSET + cid_length])
