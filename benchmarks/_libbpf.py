"""Loading ``peers.bpf.c``: compiled with clang when it is first needed, brought into the kernel by libbpf."""

import atexit
import ctypes
import functools
import os
import platform
import socket
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("peers.bpf.c")
_CLANGS = ("clang-19", "clang")
_FLAGS = ("-O2", "-g", "-Wall", "-target", "bpf")
_SO_ATTACH_REUSEPORT_EBPF = 52  # include/uapi/asm-generic/socket.h


class PeersUnavailable(Exception):
    """The programs of other servers cannot be built or loaded here."""


class PeerProgram:
    """One of the programs, loaded, with maps of its own. ``close`` gives up what this process holds of it.

    Raises: PeersUnavailable
    """

    def __init__(self, name: str) -> None:
        library = _library()
        path = os.fsencode(_compile())
        self._object = library.bpf_object__open_file(path, None)
        if not self._object:
            raise PeersUnavailable(f"libbpf cannot open what clang made of {_SOURCE.name}")
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
            raise PeersUnavailable(f"loading the program {name} of {_SOURCE.name}: {os.strerror(-status)}")
        self._program = library.bpf_program__fd(program)

    def attach(self, sock: socket.socket) -> None:
        """Make this the program of a socket's group, which must have none."""
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_EBPF, self._program)

    def put(self, name: str, key: bytes, value: bytes) -> None:
        """Write an entry of a map."""
        library = _library()
        number = library.bpf_object__find_map_fd_by_name(self._object, name.encode())
        if library.bpf_map_update_elem(number, key, value, 0):
            error = ctypes.get_errno()
            raise OSError(error, f"writing the map {name}: {os.strerror(error)}")

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
        raise PeersUnavailable(f"{error}: install libbpf1") from error
    pointers = ("bpf_object__open_file", "bpf_object__next_program")
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
    library.bpf_object__find_map_fd_by_name.argtypes = [pointer, ctypes.c_char_p]
    library.bpf_map_update_elem.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint64]
    library.libbpf_set_print(None)
    return library


@functools.cache
def _compile() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="quicsteer-peers-")
    output = Path(directory.name, "peers.o")
    include = f"-I/usr/include/{platform.machine()}-linux-gnu"
    for clang in _CLANGS:
        try:
            subprocess.run([clang, *_FLAGS, include, "-c", _SOURCE, "-o", output], check=True)
        except FileNotFoundError:
            continue
        except subprocess.CalledProcessError as error:
            raise PeersUnavailable(f"{clang} cannot compile {_SOURCE.name}: install libbpf-dev") from error
        atexit.register(directory.cleanup)
        return output
    raise PeersUnavailable("no clang: install clang-19 and libbpf-dev")
