"""Doing something with fewer capabilities, in this thread (capset(2))."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

CAP_SYS_ADMIN, CAP_PERFMON = 21, 38  # include/uapi/linux/capability.h
_VERSION_3 = 0x20080522
_WORD_BITS = 32


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32)]


@contextlib.contextmanager
def without(*capabilities: int) -> Iterator[None]:
    """Take capabilities out of the effective set, and put back those that were there."""
    data = (_Data * 2)()
    _call("capget", data)
    before = [word.effective for word in data]
    for capability in capabilities:
        data[capability // _WORD_BITS].effective &= ~(1 << capability % _WORD_BITS)
    _call("capset", data)
    try:
        yield
    finally:
        for word, effective in zip(data, before, strict=True):
            word.effective = effective
        _call("capset", data)


def _call(name: str, data: "ctypes.Array[_Data]") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(ctypes.byref(_Header(_VERSION_3, 0)), data):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
