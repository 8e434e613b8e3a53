"""The rules by which servers steer: what a user would pick instead of quicsteer, each on a group of its own.

A rule says three things: which socket of a group a datagram reaches, which connection IDs a server issues, and where a
client's own DCID goes. The programs of other servers are written anew from what they publish; ``Rule.simpler`` says
what a program here leaves out. Programs are attached once, to a group that has none.
"""

import contextlib
import ctypes
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from quicsteer import SteeringGroup, SteeringMode
from quicsteer.abi import CID_LENGTH_DEFAULT, KEY_LENGTH
from quicsteer.decision import Rules, decide

from ._aes import decryption_keys, inverse_substitutions, inverse_tables
from ._capabilities import without as without_capabilities
from ._libbpf import PEERS, Program

KEY = bytes(range(KEY_LENGTH))
RECEIVE_BUFFER = 4 << 20

_LONG_HEADER = b"\xc3\x00\x00\x00\x01"
_AES_KEY = bytes(range(16))
_SO_COOKIE = 57  # include/uapi/asm-generic/socket.h
_SO_ATTACH_REUSEPORT_CBPF = 51
_SO_RCVBUFFORCE = 33
_FNV_OFFSET, _FNV_PRIME = 14695981039346656037, 1099511628211


class Place(NamedTuple):
    """Where a group is, and the addresses that its clients will have."""

    host: str
    sources: Sequence[tuple[str, int]] = ()


LOOPBACK = Place("127.0.0.1")


@dataclass(frozen=True)
class Steered:
    """A group under a rule.

    ``issue`` makes a connection ID of a worker; of the client's DCID if one is given and the rule makes use of it.
    ``initial`` says which worker a client's DCID reaches, or ``None`` when that depends on more.
    ``swallowed`` reads how many datagrams the group's sink has taken so far.
    """

    port: int
    sockets: tuple[socket.socket, ...]
    issue: Callable[[int, bytes | None], bytes]
    initial: Callable[[bytes], int | None] = lambda _: None
    swallowed: Callable[[], int] = int


@dataclass(frozen=True)
class Rule:
    """A way to steer. ``steers`` tells whether a connection ID names a worker.

    ``read`` returns what anybody can read of the worker in a connection ID, by the published rule and the number of
    workers alone. ``forge`` makes of a connection ID that somebody has seen another one that keeps what the published
    rule reads.
    """

    name: str
    cid_length: int
    open: Callable[[contextlib.ExitStack, Place, int], Steered]
    steers: bool = True
    simpler: str = ""
    read: Callable[[bytes, int], int | bytes | None] = lambda _cid, _workers: None
    forge: Callable[[bytes], bytes] = lambda cid: secrets.token_bytes(len(cid))

    def __str__(self) -> str:
        return self.name


def random_cid(length: int) -> Callable[[int, bytes | None], bytes]:
    """Return a way to issue connection IDs that say nothing."""
    return lambda _worker, _dcid: secrets.token_bytes(length)


def keep_first(length: int) -> Callable[[bytes], bytes]:
    """Return a way to forge connection IDs that keeps their first bytes."""
    return lambda cid: cid[:length] + secrets.token_bytes(len(cid) - length)


def open_sockets(stack: contextlib.ExitStack, host: str, count: int, port: int = 0) -> tuple[socket.socket, ...]:
    """Open sockets that share an address with SO_REUSEPORT."""
    sockets: list[socket.socket] = []
    for _ in range(count):
        sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        set_buffer(sock)
        sock.bind((host, port))
        port = sock.getsockname()[1]
        sockets.append(sock)
    return tuple(sockets)


def set_buffer(sock: socket.socket) -> None:
    """Give a socket room, beyond the host's limit where this process may."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, RECEIVE_BUFFER)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)


def attach_classic(sock: socket.socket, program: Sequence[tuple[int, int, int, int]]) -> None:
    """Attach a classic program (code, jump if true, jump if false, operand) to a socket whose group has none."""
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    value = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, value)


# Classic BPF (include/uapi/linux/bpf_common.h), and places that the kernel answers for (linux/filter.h).
_LOAD_WORD, _LOAD_BYTE, _LOAD_LENGTH, _MODULO, _RETURN_A, _RETURN = 0x20, 0x30, 0x80, 0x94, 0x16, 0x06
_IF_AT_LEAST, _IF_ANY = 0x35, 0x45
_CPU = 0xFFFFF000 + 36
_NOBODY = 0xFFFFFFFF
"""An index beyond every group: the kernel's hash chooses."""


def attach_envoy(sock: socket.socket, workers: int) -> None:
    """Attach Envoy's rule: the first four bytes of the DCID, modulo the number of workers, in the order of bind."""
    attach_classic(
        sock,
        [
            (_LOAD_LENGTH, 0, 0, 0),
            (_IF_AT_LEAST, 0, 8, 9),
            (_LOAD_BYTE, 0, 0, 0),
            (_IF_ANY, 0, 4, 0x80),
            (_LOAD_LENGTH, 0, 0, 0),
            (_IF_AT_LEAST, 0, 4, 14),
            (_LOAD_WORD, 0, 0, 6),
            (0x05, 0, 0, 1),  # jump
            (_LOAD_WORD, 0, 0, 1),
            (_MODULO, 0, 0, workers),
            (_RETURN_A, 0, 0, 0),
            (_RETURN, 0, 0, _NOBODY),
        ],
    )


def envoy_cid(dcid: bytes) -> bytes:
    """Return the connection ID that follows a DCID: the same first four bytes, then of its hash (FNV-1a)."""
    value = _FNV_OFFSET
    for byte in dcid:
        value = (value ^ byte) * _FNV_PRIME % (1 << 64)
    return dcid[:4] + value.to_bytes(8, "little")[4:]


def envoy_worker(cid: bytes, workers: int) -> int:
    return int.from_bytes(cid[:4]) % workers


def _issue_envoy(workers: int) -> Callable[[int, bytes | None], bytes]:
    def issue(worker: int, dcid: bytes | None) -> bytes:
        if dcid:
            return envoy_cid(dcid)
        first = secrets.randbelow((1 << 32) // workers) * workers + worker
        return first.to_bytes(4) + secrets.token_bytes(4)

    return issue


def udpgrm_cookie(generation: int, index: int) -> bytes:
    """Return the two bytes that lead to a socket."""
    folded = 0xD ^ (index & 15) ^ index >> 4 ^ (generation & 15) ^ generation >> 4
    return (index << 8 | ((folded & 7) ^ folded >> 3) << 5 | generation).to_bytes(2)


def _open_plain(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
    sockets = open_sockets(stack, place.host, workers)
    return Steered(_port(sockets), sockets, random_cid(8))


def _open_pass(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
    steered = _open_plain(stack, place, workers)
    with contextlib.closing(Program(PEERS, "pass")) as program:
        program.attach(steered.sockets[0])
    return steered


def _open_envoy(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
    sockets = open_sockets(stack, place.host, workers)
    attach_envoy(sockets[0], workers)
    return Steered(_port(sockets), sockets, _issue_envoy(workers), lambda dcid: envoy_worker(dcid, workers))


def _open_msquic(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
    sockets = open_sockets(stack, place.host, workers)
    attach_classic(sockets[0], [(_LOAD_WORD, 0, 0, _CPU), (_MODULO, 0, 0, workers), (_RETURN_A, 0, 0, 0)])
    return Steered(_port(sockets), sockets, random_cid(9))


def _open_nginx(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
    sockets = open_sockets(stack, place.host, workers)
    cookies = [_cookie(sock) for sock in sockets]
    with contextlib.closing(Program(PEERS, "nginx")) as program:
        for sock, cookie in zip(sockets, cookies, strict=True):
            program.put("nginx_sockets", cookie, _descriptor(sock))
        program.attach(sockets[0])

    def issue(worker: int, _dcid: bytes | None) -> bytes:
        return cookies[worker][::-1] + secrets.token_bytes(12)

    return Steered(_port(sockets), sockets, issue)


def _open_udpgrm(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
    sockets = open_sockets(stack, place.host, workers)
    with contextlib.closing(Program(PEERS, "udpgrm")) as program:
        for index, sock in enumerate(sockets):
            program.put("udpgrm_sockets", _cookie(sock), _descriptor(sock))
            program.put("udpgrm_cookies", struct.pack("=I", index), _cookie(sock))
        family = socket.htons(0x0800)
        key, state = struct.pack("=3I", family, 0, socket.IPPROTO_UDP), struct.pack("=2I3Q", 0, workers, 0, 0, 0)
        program.put("udpgrm_groups", key, state)
        program.attach(sockets[0])
    return Steered(_port(sockets), sockets, lambda worker, _: udpgrm_cookie(0, worker) + secrets.token_bytes(14))


def _open_nghttpx(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
    sockets = open_sockets(stack, place.host, workers)
    identifiers = [secrets.token_bytes(8) for _ in sockets]
    with contextlib.closing(Program(PEERS, "nghttpx")) as program:
        tables = [word for table in inverse_tables() for word in table]
        value = struct.pack(f"={44 + 1024}I", *decryption_keys(_AES_KEY), *tables)
        program.put("nghttpx_aes", bytes(4), value + inverse_substitutions() + struct.pack("=I", workers))
        for index, (sock, identifier) in enumerate(zip(sockets, identifiers, strict=True)):
            program.put("nghttpx_workers", identifier[::-1], struct.pack("=I", index))
            program.put("nghttpx_sockets", struct.pack("=I", index), _descriptor(sock))
        program.attach(sockets[0])
    encrypt = Cipher(algorithms.AES(_AES_KEY), modes.ECB()).encryptor()  # the rule says so

    def issue(worker: int, _dcid: bytes | None) -> bytes:
        return secrets.token_bytes(1) + encrypt.update(identifiers[worker] + secrets.token_bytes(8))

    return Steered(_port(sockets), sockets, issue)


def _open_connected(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
    """A socket for each flow, connected to the client's address; the last sockets get what belongs to no flow."""
    listeners = open_sockets(stack, place.host, workers)
    port = _port(listeners)
    sockets = []
    for source in place.sources:
        (sock,) = open_sockets(stack, place.host, 1, port)
        sock.connect(source)
        sockets.append(sock)
    return Steered(port, (*sockets, *listeners), random_cid(8))


def ours(mode: SteeringMode, *, drop_invalid: bool = False, without: tuple[int, ...] = ()) -> Rule:
    """Return this package's rule in a mode. ``without`` are capabilities that are put aside while a group opens.

    Opening raises SteeringUnavailable when the mode does not work here.
    """

    def open_group(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
        with without_capabilities(*without):
            group = SteeringGroup.open(f"{place.host}:0", workers, mode=mode, key=KEY, drop_invalid=drop_invalid)
        stack.enter_context(group)
        sockets = tuple(worker.socket for worker in group.workers)
        for sock in sockets:
            set_buffer(sock)
        return Steered(
            group.addresses[0][1],
            sockets,
            lambda worker, _: group.workers[worker].connection_ids.issue(),
            _dispatch(workers),
            lambda: group.stats().sink or 0,
        )

    return Rule(
        str(mode), CID_LENGTH_DEFAULT, open_group, steers=mode.steers, forge=keep_first(CID_LENGTH_DEFAULT // 2)
    )


def ours_with_table(size: int) -> Rule:
    """Return the rule of the mode ``ebpf`` with a dispatch table of another size, from the package's own source.

    ``size`` is a power of two and at least the number of workers, which is one too: so the table leads to the same
    workers as the package's own.
    """
    source = f'#include "abi.h"\n#undef QS_TABLE_SIZE\n#define QS_TABLE_SIZE {size}\n#include "steer.bpf.c"\n'

    def open_group(stack: contextlib.ExitStack, place: Place, workers: int) -> Steered:
        sockets = open_sockets(stack, place.host, workers)
        constants = KEY + struct.pack("=4I", CID_LENGTH_DEFAULT, workers, workers, False)
        sizes = {"sockets": workers + 1, "counters": workers + 1}
        with contextlib.closing(Program(source, "steer", sizes, constants)) as program:
            for index, sock in enumerate(sockets):
                program.put("sockets", struct.pack("=I", index), _descriptor(sock))
            for index in range(size):
                program.put("table", struct.pack("=I", index), struct.pack("=I", index % workers))
            program.attach(sockets[0])
        return Steered(_port(sockets), sockets, random_cid(CID_LENGTH_DEFAULT), _dispatch(workers))

    return Rule(f"ebpf, table of {size:,}", CID_LENGTH_DEFAULT, open_group)


def _dispatch(workers: int) -> Callable[[bytes], int | None]:
    """Return where this package's rule sends a client's own DCID."""
    rules = Rules(KEY, CID_LENGTH_DEFAULT, workers, workers, False)
    return lambda dcid: decide(_LONG_HEADER + bytes([len(dcid)]) + dcid, rules).slot


def _port(sockets: Sequence[socket.socket]) -> int:
    port: int = sockets[0].getsockname()[1]
    return port


def _cookie(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


def _descriptor(sock: socket.socket) -> bytes:
    return struct.pack("=Q", sock.fileno())


NONE = Rule("none", 8, _open_plain, steers=False)
PASS = Rule("a program that does nothing", 8, _open_pass, steers=False)
EBPF = ours(SteeringMode.EBPF)
CBPF = ours(SteeringMode.CBPF)
ENVOY = Rule("Envoy's rule", 8, _open_envoy, read=envoy_worker, forge=keep_first(4))
NGINX = Rule("nginx's rule", 20, _open_nginx, read=lambda cid, _: cid[:8], forge=keep_first(8))
NGHTTPX = Rule(
    "nghttpx's rule",
    17,
    _open_nghttpx,
    simpler="AES by tables, which is faster than the byte by byte form of the original",
    forge=lambda cid: secrets.token_bytes(1) + cid[1:],
)
UDPGRM = Rule(
    "udpgrm's rule",
    16,
    _open_udpgrm,
    simpler="the filter that finds the cookie is compiled in, where the original interprets it; fewer counters",
    read=lambda cid, _: cid[0],
    forge=keep_first(2),
)
MSQUIC = Rule("msquic's rule", 9, _open_msquic, steers=False)
CONNECTED = Rule("a connected socket per flow", 8, _open_connected, steers=False)

OTHERS = (ENVOY, NGINX, NGHTTPX, UDPGRM, MSQUIC)
"""The rules of other servers."""
