"""A lock for objects that a forked child goes on with."""

import os
import threading
import weakref


class ForkLock:
    """A re-entrant lock that is free in a forked child, whichever thread of the parent held it.

    Only the thread that forks lives on in the child: a plain lock that another one held would stay locked for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def renew(self) -> None:
        """Forget who holds the lock."""
        self._lock = threading.RLock()


_locks: weakref.WeakSet[ForkLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_locks):
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
