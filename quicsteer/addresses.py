"""From what users write for a listening address to what bind(2) takes."""

import socket
from collections.abc import Iterable
from typing import Any, NamedTuple

Address = str | tuple[str, int]

_PORT_MAX = 65535
_WILDCARD4, _WILDCARD6 = "0.0.0.0", "::"


class BindAddress(NamedTuple):
    """A numeric address to bind; ``v6only`` is ``None`` for IPv4."""

    family: int
    sockaddr: Any
    v6only: bool | None

    def __str__(self) -> str:
        return format_address(self.sockaddr)


def format_address(sockaddr: Any) -> str:
    """Return ``host:port``, with brackets around an IPv6 host."""
    host, port = sockaddr[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def resolve(addresses: Address | Iterable[Address]) -> list[BindAddress]:
    """Return the numeric addresses to bind.

    An address is ``"host:port"``, ``"[v6]:port"`` or ``(host, port)``; port 0 takes a free one. ``[::]`` and an empty
    host serve IPv4 too, unless the IPv4 wildcard is listed beside it. A name stands for all its addresses.

    Raises:
        ValueError: an address that cannot be read or resolved, or that is listed twice.
        TypeError: something that is no address.
    """
    if isinstance(addresses, str) or _is_pair(addresses) or not isinstance(addresses, Iterable):
        listed: list[Any] = [addresses]
    else:
        listed = list(addresses)
    if not listed:
        raise ValueError("addresses is empty: name at least one, such as '0.0.0.0:443'")
    pairs = [pair for address in listed for pair in _lookup(*_split(address))]
    result = []
    for family, sockaddr in pairs:
        v6only = None
        if family == socket.AF_INET6:
            beside = (_WILDCARD4, sockaddr[1])
            v6only = sockaddr[0] != _WILDCARD6 or (sockaddr[1] != 0 and (socket.AF_INET, beside) in pairs)
        bind = BindAddress(family, sockaddr, v6only)
        if bind in result and sockaddr[1] != 0:
            raise ValueError(f"address {bind} is listed twice")
        result.append(bind)
    return result


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def _split(address: Any) -> tuple[str, int]:
    """Return host and port of one address."""
    if isinstance(address, str):
        host, colon, port_text = address.rpartition(":")
        if not colon or not port_text.isascii() or not port_text.isdigit():
            raise ValueError(f"address {address!r} is not 'host:port'")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"address {address!r}: write the IPv6 host in brackets, as in '[{host}]:{port_text}'")
        port = int(port_text)
    elif _is_pair(address):
        host, port = address
    else:
        raise TypeError(f"address {address!r} is neither 'host:port' nor a (host, port) tuple")
    if isinstance(port, bool) or not 0 <= port <= _PORT_MAX:
        raise ValueError(f"address {address!r}: port {port} is not 0 to {_PORT_MAX}")
    return host, port


def _lookup(host: str, port: int) -> list[tuple[int, Any]]:
    if not host:
        host = _WILDCARD6 if socket.has_dualstack_ipv6() else _WILDCARD4
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, proto=socket.IPPROTO_UDP)
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"host {host!r} does not resolve: {error}") from error
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))
