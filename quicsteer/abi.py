"""The numbers that Python, C and the eBPF program share.

Each is written here once. ``bpf/build.py`` renders them into ``bpf/abi.h``, and ``--check`` fails when that file is
stale. Names follow RFC 8999 and RFC 9000.
"""

import enum

CID_LENGTH_MIN = 8
"""Shortest connection ID that a group issues; also the shortest DCID that an Initial may carry (RFC 9000, 7.2)."""

CID_LENGTH_MAX = 20
"""Longest connection ID of QUIC version 1 and 2 (RFC 9000, 17.2)."""

CID_LENGTH_DEFAULT = 8
"""Length of a group's connection IDs unless told otherwise: what aioquic and hypercorn use."""

SEAL_LENGTH = 4
"""Bytes at the end of a connection ID that name its slot, masked by a keyed hash."""

KEY_LENGTH = 16
"""Bytes of the group's secret SipHash key."""

MESSAGE_LENGTH = 8
"""Bytes of a connection ID that are hashed."""

RESET_TOKEN_LENGTH = 16
"""Bytes of a stateless reset token (RFC 9000, 10.3)."""

LONG_HEADER_BIT = 0x80
"""First bit of a datagram: set in long headers (RFC 8999, 5.1)."""

LONG_DCID_LENGTH_OFFSET = 5
"""Where a long header holds the length of its DCID: behind first byte and version (RFC 8999, 5.1)."""

LONG_DCID_OFFSET = 6
"""Where the DCID of a long header starts (RFC 8999, 5.1)."""

SHORT_DCID_OFFSET = 1
"""Where the DCID of a short header starts (RFC 8999, 5.2)."""

HEAD_LENGTH = LONG_DCID_OFFSET + CID_LENGTH_MAX
"""Bytes at the start of a datagram that the decision may read."""

TABLE_SIZE = 1024
"""Entries of the dispatch table: a power of two."""

SLOTS_MAX = 65535
"""Most slots of one address; the index after the last one is the sink, and both fit 16 bits of a seal."""


class Outcome(enum.IntEnum):
    """What the steering program decided for one datagram; each datagram has exactly one outcome."""

    ROUTED = 0
    """The DCID is one that the group issued; the datagram went to the slot that it names."""

    DISPATCHED = 1
    """A long header with a DCID that the client chose; a keyed hash of it picked a listener slot."""

    UNROUTABLE = 2
    """A short header whose DCID the group did not issue: a listener slot, or the sink with ``drop_invalid``."""

    MALFORMED = 3
    """No usable DCID: a listener slot, or the sink with ``drop_invalid``."""
