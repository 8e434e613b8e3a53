__test__: dict[str, str]  # Cython makes it

def siphash24(key: bytes, message: bytes) -> int:
    """Return SipHash-2-4 of 8 bytes under a key of 16 bytes."""

def seal(key: bytes, body: bytes, slot: int) -> bytes:
    """Return the connection ID of a body of 4 to 16 bytes: body and seal."""

def open_seal(key: bytes, cid: bytes) -> int | None:
    """Return the slot that a connection ID of 8 to 20 bytes names, or ``None`` when its seal is not one of ours."""

def close_filter(fd: int) -> None:
    """Let a socket swallow and count every datagram from now on (SO_ATTACH_FILTER)."""

def open_filter(fd: int) -> None:
    """Take the filter of ``close_filter`` off (SO_DETACH_FILTER)."""

def attach_classic(fd: int, program: bytes) -> None:
    """Attach a classic program (packed struct sock_filter) to a reuseport group (SO_ATTACH_REUSEPORT_CBPF)."""

def attach_program(fd: int, program: int) -> None:
    """Attach a loaded program to a reuseport group (SO_ATTACH_REUSEPORT_EBPF)."""

def read_meminfo(fd: int) -> tuple[int, int, int]:
    """Return queued bytes, receive buffer in bytes, and datagrams dropped modulo 2^32 (SO_MEMINFO)."""

def load_program(
    key: bytes, cid_length: int, listeners: int, slots: int, drop_invalid: bool
) -> tuple[int, int, int, int]:
    """Load the steering program; return the descriptors of program, socket map, dispatch table and counters."""

def set_socket(sockets: int, slot: int, fd: int) -> None:
    """Put a bound socket into the socket map."""

def set_listener(table: int, index: int, slot: int) -> None:
    """Write one entry of the dispatch table."""

def read_counters(counters: int, slot: int) -> tuple[int, ...]:
    """Return a slot's datagrams by outcome, in the order of ``abi.Outcome``."""

def make_counts(entries: int) -> int:
    """Make an array of 64-bit counts; return its descriptor."""

def load_tracing(instructions: bytes) -> int:
    """Load a program for raw tracepoints (packed struct bpf_insn); return its descriptor."""

def open_tracepoint(program: int, name: bytes) -> int:
    """Let a program run at a raw tracepoint; return the descriptor, whose end ends it."""

def read_count(counts: int, key: int) -> int:
    """Return one count of an array of ``make_counts``."""

def probe_bpf() -> dict[str, int]:
    """Try bpf(2) in a child process; return the errno of each step and the signal that ended the child, or 0."""

def spawn(
    path: bytes,
    arguments: list[bytes],
    environment: list[bytes],
    descriptors: tuple[int, ...],
    uid: int | None = None,
    gid: int | None = None,
    ignored: tuple[int, ...] = (),
) -> int:
    """Start a program with ``descriptors`` as 3, 4, ...; an entry ``LISTEN_PID=`` gets its pid. Returns the pid."""
