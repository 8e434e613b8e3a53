"""What ``SteeringGroup.open`` is asked for, checked; no I/O."""

import secrets
from collections.abc import Iterable
from typing import Any, NamedTuple

from .abi import CID_LENGTH_MAX, CID_LENGTH_MIN, KEY_LENGTH, SLOTS_MAX, TABLE_SIZE
from .cid import GroupKeys
from .counters import Place
from .decision import Rules
from .modes import SteeringMode

AUTO = "auto"

SocketOption = tuple[int, int, int | bytes]


class Layout(NamedTuple):
    """Which slot does what: listeners first, then the banks of established slots.

    In the plain form each slot is listener and established slot of one worker.
    """

    workers: int
    banks: int
    split: bool

    @property
    def slots(self) -> int:
        return self.workers * (1 + self.banks) if self.split else self.workers

    def established(self, index: int, bank: int) -> int:
        return self.workers * (1 + bank) + index if self.split else index

    def bank(self, bank: int) -> range:
        """Return the established slots of a bank."""
        first = self.established(0, bank)
        return range(first, first + self.workers)

    def places(self, steers: bool) -> list[Place]:
        """Return whose slot each one is: without steering there are only sockets that take everything."""
        if not self.split or not steers:
            return [Place(index, "both", None) for index in range(self.workers)]
        listeners = [Place(index, "listener", None) for index in range(self.workers)]
        return listeners + [
            Place(index, "established", bank) for bank in range(self.banks) for index in range(self.workers)
        ]


class Options(NamedTuple):
    """What ``open`` was asked for, checked."""

    layout: Layout
    mode: SteeringMode | None
    cid_length: int
    keys: GroupKeys
    drop_invalid: bool
    receive_buffer: int | None
    socket_options: tuple[SocketOption, ...]

    def dump(self) -> dict[str, Any]:
        """Return the options as plain types; the group's key is among them."""
        return {
            "layout": list(self.layout),
            "cid_length": self.cid_length,
            "key": self.keys.steering.hex(),
            "drop_invalid": self.drop_invalid,
        }

    @classmethod
    def load(cls, saved: dict[str, Any]) -> "Options":
        """Return the options of a group that is open already, from ``dump()``."""
        keys = GroupKeys.from_key(bytes.fromhex(saved["key"]))
        return cls(Layout(*saved["layout"]), None, saved["cid_length"], keys, saved["drop_invalid"], None, ())

    def rules(self) -> Rules:
        return Rules(self.keys.steering, self.cid_length, self.layout.workers, self.layout.slots, self.drop_invalid)


def check_options(
    *,
    workers: int,
    split: bool,
    banks: int,
    mode: str,
    cid_length: int,
    key: bytes | None,
    drop_invalid: bool,
    receive_buffer: int | None,
    socket_options: Iterable[SocketOption],
) -> Options:
    check_range("workers", workers, 1, TABLE_SIZE)
    check_range("banks", banks, 1, SLOTS_MAX)
    if banks > 1 and not split:
        raise ValueError(f"banks is {banks}: only a group with split=True has banks")
    layout = Layout(workers, banks, bool(split))
    if layout.slots > SLOTS_MAX:
        raise ValueError(f"{workers} workers in {banks} banks make {layout.slots} slots, at most {SLOTS_MAX} fit")
    if mode != AUTO and mode not in list(SteeringMode):
        raise ValueError(f"mode is {mode!r}, it must be one of auto, {', '.join(SteeringMode)}")
    named = None if mode == AUTO else SteeringMode(mode)
    if named is SteeringMode.SINGLE and workers > 1:
        raise ValueError(f"mode 'single' has one worker, {workers} were asked for")
    if named is not None and not named.steers and drop_invalid:
        raise ValueError(f"drop_invalid needs a mode that steers, not {mode!r}")
    check_range("cid_length", cid_length, CID_LENGTH_MIN, CID_LENGTH_MAX)
    if key is not None and not isinstance(key, bytes):
        raise TypeError(f"key must be bytes, not {type(key).__name__}")
    if key is not None and len(key) != KEY_LENGTH:
        raise ValueError(f"key has {len(key)} bytes, it must have {KEY_LENGTH}")
    if receive_buffer is not None:
        check_range("receive_buffer", receive_buffer, 1, 2**31 - 1)
    keys = GroupKeys.from_key(secrets.token_bytes(KEY_LENGTH) if key is None else key)
    return Options(
        layout, named, cid_length, keys, bool(drop_invalid), receive_buffer, _check_socket_options(socket_options)
    )


def _check_socket_options(socket_options: Iterable[SocketOption]) -> tuple[SocketOption, ...]:
    options = tuple(socket_options)
    for option in options:
        if not isinstance(option, tuple) or [type(part) for part in option[:2]] != [int, int] or len(option) != 3:
            raise TypeError(f"socket option {option!r} is not a (level, option, value) tuple")
        if not isinstance(option[2], (int, bytes)):
            raise TypeError(f"socket option {option!r}: the value must be an integer or bytes")
    return options


def check_range(name: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, it must be an integer")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, it must be {least} to {most}")


def spread(weights: list[float], size: int) -> list[int]:
    """Return a table of ``size`` indexes in which each index has its share, well mixed.

    Equal weights give ``i mod N``, as a new group's table has it.
    """
    total = sum(weights)
    credit = [0.0] * len(weights)
    table = []
    for _ in range(size):
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        best = max(range(len(weights)), key=lambda index: (credit[index], -index))
        credit[best] -= total
        table.append(best)
    return table
