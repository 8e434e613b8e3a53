"""A bounded table of small secrets, in memory that all workers of a group share and that lies in no file.

It is for what a client brings back to another worker than the one it got it from, above all TLS session tickets. An
entry can be taken once: whoever comes second with the same ticket gets nothing, in whatever worker, which is what keeps
0-RTT data from being replayed (RFC 8446, 8.1). Entries expire; when a bucket is full the one that expires first makes
room. Who dies while he holds the table leaves it usable: locks end with their process, and an entry counts only once it
is whole.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

from .errors import KernelError

VALUE_MAX = 998
"""Longest value, in bytes."""

BUCKETS = 1024
WAYS = 8
"""Entries of a bucket; the table has ``BUCKETS * WAYS`` entries, and takes memory for those only that were used."""

_EXPIRY = struct.Struct("<d")  # of the monotonic clock, which all processes of a host share; 0 when there is no entry
_REST = struct.Struct("<16sH")  # which key, length of the value
_HEAD = _EXPIRY.size + _REST.size
_ENTRY = _HEAD + VALUE_MAX
_BUCKET = WAYS * _ENTRY
_SIZE = BUCKETS * _BUCKET
_EMPTY = bytes(_ENTRY)

_threads = threading.Lock()  # record locks (fcntl(2)) exclude processes only, and end when any descriptor closes


def _renew_lock() -> None:
    global _threads  # noqa: PLW0603  # a thread of the parent may have held it
    _threads = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


class SharedStore:
    """The table. It owns its descriptor; safe to use from several threads and processes."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._memory.madvise(mmap.MADV_DONTDUMP)

    def put(self, key: bytes, value: bytes, seconds: float) -> bool:
        """Keep a value for so many seconds; returns ``False`` when it is too long to be kept."""
        if len(value) > VALUE_MAX:
            return False
        tag, bucket = _place(key)
        now = time.monotonic()
        with self._locked(bucket):
            start = min(self._entries(bucket), key=lambda entry: self._rank(entry, tag, now))
            self._clear(start)
            body = _REST.pack(tag, len(value)) + value
            self._memory[start + _EXPIRY.size : start + _EXPIRY.size + len(body)] = body
            _EXPIRY.pack_into(self._memory, start, now + seconds)
        return True

    def take(self, key: bytes) -> bytes | None:
        """Return a value and forget it, or ``None`` when there is none, or no more."""
        tag, bucket = _place(key)
        now = time.monotonic()
        with self._locked(bucket):
            for start in self._entries(bucket):
                found, length = _REST.unpack_from(self._memory, start + _EXPIRY.size)
                expiry = self._expiry(start)
                if expiry and found == tag:
                    value = self._memory[start + _HEAD : start + _HEAD + min(length, VALUE_MAX)]
                    self._clear(start)
                    return value if now < expiry else None
        return None

    def duplicate(self) -> "SharedStore":
        """Return the same table on a descriptor of its own."""
        return SharedStore(fcntl.fcntl(self.descriptor, fcntl.F_DUPFD_CLOEXEC, 0))

    def close(self) -> None:
        """Close this process's view of the table. Closing twice does nothing."""
        with _threads:
            if self.descriptor >= 0:
                self._memory.close()
                os.close(self.descriptor)
                self.descriptor = -1

    def __reduce__(self) -> tuple[Any, ...]:
        from multiprocessing.reduction import DupFd

        return _rebuild, (DupFd(self.descriptor),)

    @contextlib.contextmanager
    def _locked(self, bucket: int) -> Iterator[None]:
        with _threads:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX, 1, bucket)
            try:
                yield
            finally:
                fcntl.lockf(self.descriptor, fcntl.LOCK_UN, 1, bucket)

    @staticmethod
    def _entries(bucket: int) -> range:
        return range(bucket * _BUCKET, (bucket + 1) * _BUCKET, _ENTRY)

    def _expiry(self, start: int) -> float:
        return float(_EXPIRY.unpack_from(self._memory, start)[0])

    def _rank(self, start: int, tag: bytes, now: float) -> float:
        """Say how readily an entry makes room: one of the same key first, then what has expired."""
        expiry = self._expiry(start)
        same = expiry and self._memory[start + _EXPIRY.size : start + _EXPIRY.size + len(tag)] == tag
        return -1.0 if same else expiry if expiry > now else 0.0

    def _clear(self, start: int) -> None:
        _EXPIRY.pack_into(self._memory, start, 0.0)
        self._memory[start : start + _ENTRY] = _EMPTY


def create_store() -> SharedStore | None:
    """Return a new, empty table, or ``None`` where there is no memory to share (memfd_create(2) is Linux).

    Create it before the processes that share it.

    Raises:
        KernelError: no descriptor or memory left.
    """
    if not hasattr(os, "memfd_create"):
        return None
    try:
        descriptor = os.memfd_create("quicsteer-store", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise KernelError(error.errno or 0, "memfd_create") from error
    try:
        os.ftruncate(descriptor, _SIZE)
        # No process can take the memory away under the others, which would be killed for touching it.
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return SharedStore(descriptor)
    except OSError as error:
        os.close(descriptor)
        raise KernelError(error.errno or 0, "mmap", "the store of the group") from error


def adopt_store(descriptor: int | None) -> SharedStore | None:
    """Return the table of a group that this process has kept over an execve."""
    if descriptor is None:
        return None
    os.set_inheritable(descriptor, False)
    return SharedStore(descriptor)


def _place(key: bytes) -> tuple[bytes, int]:
    """Return the mark of a key, and its bucket."""
    digest = hashlib.blake2b(key, person=b"quicsteer store", digest_size=20).digest()
    return digest[:16], int.from_bytes(digest[16:], "big") % BUCKETS


def _rebuild(duplicate: Any) -> SharedStore:
    return SharedStore(duplicate.detach())
