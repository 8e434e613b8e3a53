"""The shared store: bounded, expiring, each entry once, across processes and over their death."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from taking import take_all

from quicsteer import store as module
from quicsteer.store import BUCKETS, VALUE_MAX, WAYS, SharedStore, create_store


@pytest.fixture
def store() -> Iterator[SharedStore]:
    made = create_store()
    assert made is not None
    yield made
    made.close()


def test_what_was_put_can_be_taken_once(store: SharedStore) -> None:
    assert store.put(b"key", b"value", 60)
    assert store.take(b"other") is None
    assert store.take(b"key") == b"value"
    assert store.take(b"key") is None


def test_values_of_any_length_up_to_the_longest_are_kept(store: SharedStore) -> None:
    for length in (0, 1, VALUE_MAX):
        assert store.put(b"key", b"x" * length, 60)
        assert store.take(b"key") == b"x" * length
    assert not store.put(b"key", b"x" * (VALUE_MAX + 1), 60)
    assert store.take(b"key") is None


def test_an_entry_expires(store: SharedStore) -> None:
    store.put(b"key", b"value", -0.001)
    assert store.take(b"key") is None


def test_the_same_key_again_takes_the_place_of_the_first(store: SharedStore) -> None:
    store.put(b"key", b"one", 60)
    store.put(b"key", b"two", 60)
    assert store.take(b"key") == b"two"
    assert store.take(b"key") is None


def test_the_store_is_bounded_and_the_entry_that_expires_first_makes_room(
    store: SharedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BUCKETS", 1)
    for number in range(WAYS + 2):
        store.put(b"%d" % number, b"value", 60 + number)
    assert [store.take(b"%d" % number) for number in range(WAYS + 2)] == [None, None] + [b"value"] * WAYS
    assert os.fstat(store.descriptor).st_size == module._SIZE
    assert BUCKETS * WAYS == 8192


def test_no_value_is_left_behind_in_memory(store: SharedStore) -> None:
    store.put(b"key", b"a secret value", 60)
    assert b"a secret value" in store._memory[:]
    store.take(b"key")
    assert not any(store._memory[:])


def test_memory_cannot_be_taken_away(store: SharedStore) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(store.descriptor, 0)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_of_several_processes_one_gets_an_entry(store: SharedStore, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    found: multiprocessing.Queue[list[int]] = context.Queue()
    for number in range(2000):
        store.put(b"%d" % number, b"value", 60)
    processes = [context.Process(target=take_all, args=(store, 2000, found)) for _ in range(3)]
    for process in processes:
        process.start()
    taken = sorted(number for _ in processes for number in found.get(timeout=60))
    for process in processes:
        process.join()
    assert taken == list(range(2000))


def test_of_several_threads_one_gets_an_entry(store: SharedStore) -> None:
    found: list[list[int]] = []
    for number in range(2000):
        store.put(b"%d" % number, b"value", 60)

    def take(view: SharedStore) -> None:
        found.append([number for number in range(2000) if view.take(b"%d" % number)])
        view.close()

    threads = [threading.Thread(target=take, args=(store.duplicate(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(number for each in found for number in each) == list(range(2000))


def test_a_process_that_dies_with_the_lock_blocks_nobody(store: SharedStore) -> None:
    store.put(b"key", b"value", 60)
    waiting, holds = os.pipe()
    pid = os.fork()
    if not pid:
        with store._locked(module._place(b"key")[1]):
            os.write(holds, b".")
            signal.pause()
    os.read(waiting, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(waiting)
    os.close(holds)
    assert store.take(b"key") == b"value"


def test_it_is_never_pickled_into_a_file(store: SharedStore) -> None:
    """Only a descriptor travels, by the resource sharer of multiprocessing."""
    store.put(b"key", b"a secret value", 60)
    assert b"secret" not in pickle.dumps(store)
