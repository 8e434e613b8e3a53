"""eBPF programs from source: compiled with clang when they are first needed, brought into the kernel by libbpf."""

import atexit
import ctypes
import functools
import os
import platform
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

PEERS = '#include "peers.bpf.c"'
"""The source of the programs of other servers."""

_HERE = Path(__file__).parent
_CLANGS = ("clang-19", "clang")
_FLAGS = ("-O2", "-g", "-Wall", "-target", "bpf", "-mcpu=v3", "-x", "c")
_INCLUDES = (_HERE, _HERE.parent / "bpf", _HERE.parent / "csrc", Path(f"/usr/include/{platform.machine()}-linux-gnu"))
_SO_ATTACH_REUSEPORT_EBPF = 52  # include/uapi/asm-generic/socket.h


class ProgramUnavailable(Exception):
    """A program cannot be built or loaded here."""


class Program:
    """A program of a source, loaded, with maps of its own. ``close`` gives up what this process holds of it.

    ``sizes`` are entries of maps, where the source says other ones; ``constants`` is what ``.rodata`` holds.

    Raises: ProgramUnavailable
    """

    def __init__(self, source: str, name: str, sizes: Mapping[str, int] = {}, constants: bytes = b"") -> None:
        library = _library()
        path = os.fsencode(_compile(source))
        self._object = library.bpf_object__open_file(path, None)
        if not self._object:
            raise ProgramUnavailable(f"libbpf cannot open what clang made of {source}")
        for each, entries in sizes.items():
            library.bpf_map__set_max_entries(self._find_map(each), entries)
        if constants:
            library.bpf_map__set_initial_value(self._find_map(".rodata"), constants, len(constants))
        program = None
        each = library.bpf_object__next_program(self._object, None)
        while each:
            chosen = library.bpf_program__name(each) == name.encode()
            library.bpf_program__set_autoload(each, chosen)
            program = each if chosen else program
            each = library.bpf_object__next_program(self._object, each)
        status = library.bpf_object__load(self._object)
        if status:
            self.close()
            raise ProgramUnavailable(f"loading the program {name}: {os.strerror(-status)}")
        self._program = library.bpf_program__fd(program)

    def attach(self, sock: socket.socket) -> None:
        """Make this the program of a socket's group, which must have none."""
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_EBPF, self._program)

    def put(self, name: str, key: bytes, value: bytes) -> None:
        """Write an entry of a map."""
        library = _library()
        number = library.bpf_map__fd(self._find_map(name))
        if library.bpf_map_update_elem(number, key, value, 0):
            error = ctypes.get_errno()
            raise OSError(error, f"writing the map {name}: {os.strerror(error)}")

    def _find_map(self, name: str) -> int:
        found: int = _library().bpf_object__find_map_by_name(self._object, name.encode())
        return found

    def close(self) -> None:
        """Unload, as far as no group uses it."""
        if self._object:
            _library().bpf_object__close(self._object)
            self._object = None


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise ProgramUnavailable(f"{error}: install libbpf1") from error
    pointers = ("bpf_object__open_file", "bpf_object__next_program", "bpf_object__find_map_by_name")
    for name in pointers:
        getattr(library, name).restype = ctypes.c_void_p
    library.bpf_program__name.restype = ctypes.c_char_p
    pointer = ctypes.c_void_p
    library.bpf_object__open_file.argtypes = [ctypes.c_char_p, pointer]
    library.bpf_object__next_program.argtypes = [pointer, pointer]
    library.bpf_program__name.argtypes = [pointer]
    library.bpf_program__set_autoload.argtypes = [pointer, ctypes.c_bool]
    library.bpf_object__load.argtypes = [pointer]
    library.bpf_program__fd.argtypes = [pointer]
    library.bpf_object__close.argtypes = [pointer]
    library.bpf_object__find_map_by_name.argtypes = [pointer, ctypes.c_char_p]
    library.bpf_map__fd.argtypes = [pointer]
    library.bpf_map__set_max_entries.argtypes = [pointer, ctypes.c_uint32]
    library.bpf_map__set_initial_value.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t]
    library.bpf_map_update_elem.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64]
    library.libbpf_set_print(None)
    return library


@functools.cache
def _compile(source: str) -> Path:
    directory = tempfile.TemporaryDirectory(prefix="quicsteer-bpf-")
    atexit.register(directory.cleanup)
    output = Path(directory.name, "program.o")
    includes = [f"-I{path}" for path in _INCLUDES]
    for clang in _CLANGS:
        try:
            subprocess.run([clang, *_FLAGS, *includes, "-c", "-", "-o", output], input=source, text=True, check=True)
        except FileNotFoundError:
            continue
        except subprocess.CalledProcessError as error:
            raise ProgramUnavailable(f"{clang} cannot compile {source!r}: install libbpf-dev") from error
        return output
    raise ProgramUnavailable("no clang: install clang-19 and libbpf-dev")
