"""What processes of the store's tests do, importable where they are spawned."""

from multiprocessing import Queue

from quicsteer.store import SharedStore


def take_all(store: SharedStore, count: int, found: "Queue[list[int]]") -> None:
    """Take what can be taken of so many entries."""
    found.put([number for number in range(count) if store.take(b"%d" % number)])
