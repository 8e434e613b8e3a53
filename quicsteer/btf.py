"""Reads what the kernel says of its own types (BTF, Documentation/bpf/btf.rst): enums, members, tracepoints."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KERNEL = Path("/sys/kernel/btf/vmlinux")

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
_ENUMERATOR = struct.Struct("=Ii")
_PARAMETER = struct.Struct("=II")

_INT, _POINTER, _ARRAY, _STRUCT, _UNION, _ENUM, _TYPEDEF, _PROTOTYPE = 1, 2, 3, 4, 5, 6, 8, 13
_REFERRING = (_POINTER, 9, 10, 11)  # volatile, const, restrict
_VARIABLE, _SECTION, _DECLARATION_TAG, _ENUM64 = 14, 15, 17, 19
_FIXED = {_INT: 4, _ARRAY: 12, _VARIABLE: 4, _DECLARATION_TAG: 4}
_PER_ITEM = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _PROTOTYPE: 8, _SECTION: 12, _ENUM64: 12}


class _Type(NamedTuple):
    name: str
    kind: int
    items: int
    is_bitfield: bool
    refers: int
    data: int


class Types:
    """The types of a kernel, looked up by name.

    Raises: ValueError when the bytes are no BTF.
    """

    def __init__(self, data: bytes) -> None:
        if len(data) < _HEADER.size:
            raise ValueError("too short for BTF")
        magic, _, _, length, type_offset, type_length, string_offset, _ = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("not BTF of this machine")
        self._data = data
        self._strings = length + string_offset
        self._offsets = [0, *self._walk(length + type_offset, length + type_offset + type_length)]

    def enumerators(self, name: str) -> dict[int, str]:
        """Return the names of an enum's values; empty when there is no such enum."""
        for found in self._named(name, _ENUM):
            pairs = (_ENUMERATOR.unpack_from(self._data, found.data + 8 * item) for item in range(found.items))
            return {value: self._text(text) for text, value in pairs}
        return {}

    def arguments(self, tracepoint: str) -> list[str]:
        """Return the types of a raw tracepoint's arguments, of pointers that of what they point to."""
        for found in self._named(f"btf_trace_{tracepoint}", _TYPEDEF):
            prototype = self._type(self._type(found.refers).refers)
            pairs = (_PARAMETER.unpack_from(self._data, prototype.data + 8 * item) for item in range(prototype.items))
            return [self._resolve(number) for _, number in pairs][1:]  # the first is the tracepoint's own
        return []

    def _resolve(self, number: int) -> str:
        """Return the name of a type, behind pointers and qualifiers; empty for void."""
        while number:
            found = self._type(number)
            if found.name or found.kind not in _REFERRING:
                return found.name
            number = found.refers
        return ""

    def offset(self, structure: str, member: str) -> int | None:
        """Return where a member lies in a structure, in bytes, through unnamed structures and unions."""
        for found in self._named(structure, _STRUCT):
            return self._find(found, member)
        return None

    def _find(self, structure: _Type, member: str) -> int | None:
        for item in range(structure.items):
            text, number, bits = _MEMBER.unpack_from(self._data, structure.data + 12 * item)
            start = int(bits & 0xFFFFFF if structure.is_bitfield else bits) // 8
            if self._text(text) == member:
                return start
            inner = None if self._text(text) else self._find(self._type(number), member)
            if inner is not None:
                return start + inner
        return None

    def _walk(self, start: int, end: int) -> Iterator[int]:
        while start < end:
            yield start
            _, info, _ = _TYPE.unpack_from(self._data, start)
            kind = info >> 24 & 0x1F
            start += 12 + _FIXED.get(kind, 0) + _PER_ITEM.get(kind, 0) * (info & 0xFFFF)

    def _type(self, number: int) -> _Type:
        offset = self._offsets[number]
        name, info, refers = _TYPE.unpack_from(self._data, offset)
        return _Type(self._text(name), info >> 24 & 0x1F, info & 0xFFFF, bool(info >> 31), refers, offset + _TYPE.size)

    def _named(self, name: str, kind: int) -> Iterator[_Type]:
        wanted = self._data.find(b"\0" + name.encode() + b"\0", self._strings)
        text = wanted + 1 - self._strings
        for number in range(1, len(self._offsets)) if wanted >= 0 else ():
            offset = self._offsets[number]
            if _TYPE.unpack_from(self._data, offset)[0] == text and self._type(number).kind == kind:
                yield self._type(number)

    def _text(self, offset: int) -> str:
        start = self._strings + offset
        return self._data[start : self._data.index(b"\0", start)].decode()
