"""A small HTTP server for Prometheus: ``GET /metrics`` and nothing else.

It trusts nobody: requests are short and must come soon, and few connections are served at once. Who may read the
figures is decided by the address that it listens on.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from .addresses import format_address, resolve
from .errors import KernelError, QuicSteerError
from .prometheus import CONTENT_TYPE

REQUEST_MAX = 8192
"""Bytes that a request may have, with its headers."""

REQUEST_TIMEOUT = 5.0
"""Seconds in which a request must come, and its answer must have been taken."""

CONNECTIONS_MAX = 16
"""Connections that are served at once; others are closed at once."""

_logger = logging.getLogger("quicsteer")

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


@contextlib.asynccontextmanager
async def exporting(bind: str | None, metrics: Callable[[], Awaitable[str]], *, required: bool) -> AsyncIterator[None]:
    """Serve metrics meanwhile, if there is an address to do so; one that cannot be had is an error if ``required``.

    Raises:
        ValueError: ``bind`` is no address.
        KernelError: the address cannot be had.
    """
    exporter = Exporter(bind, metrics) if bind else None
    try:
        if exporter:
            try:
                await exporter.start()
            except KernelError as error:
                if required:
                    raise
                _logger.error("no metrics: %s", error)
        yield
    finally:
        if exporter:
            await exporter.close()


class Exporter:
    """Serves what ``metrics`` returns on the TCP address ``bind``, ``"host:port"``; port 0 takes a free one.

    ``addresses`` has where it listens, after ``start()``.

    Raises:
        ValueError: ``bind`` is no address.
    """

    def __init__(self, bind: str, metrics: Callable[[], Awaitable[str]]) -> None:
        self._bind = resolve(bind)
        self._metrics = metrics
        self._servers: list[asyncio.Server] = []
        self._connections = 0

    @property
    def addresses(self) -> list[tuple[str, int]]:
        return [sock.getsockname()[:2] for server in self._servers for sock in server.sockets]

    async def start(self) -> None:
        """Listen.

        Raises:
            KernelError: the address cannot be had.
        """
        for address in self._bind:
            host, port = address.sockaddr[:2]
            try:
                server = await asyncio.start_server(self._serve, host, port, family=address.family, limit=REQUEST_MAX)
            except OSError as error:
                await self.close()
                raise KernelError(error.errno or 0, f"bind(TCP {address})") from error
            self._servers.append(server)
        _logger.info("metrics: http://%s/metrics", format_address(self.addresses[0]))

    async def close(self) -> None:
        """Listen no more."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections >= CONNECTIONS_MAX:
            writer.close()
            return
        self._connections += 1
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                writer.write(await self._answer(reader))
                await writer.drain()
        except (TimeoutError, ConnectionError):
            writer.transport.abort()
        finally:
            self._connections -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response(431, "the request is too long\n")
        except asyncio.IncompleteReadError:
            return _response(400, "the request has no end\n")
        method, target, version = (head.split(b"\r\n", 1)[0].split(b" ") + [b""] * 3)[:3]
        if not version.startswith(b"HTTP/1."):
            return _response(400, "this is no HTTP/1.1 request\n")
        if target.partition(b"?")[0] != b"/metrics":
            return _response(404, "the metrics are at /metrics\n")
        if method not in (b"GET", b"HEAD"):
            return _response(405, "only GET is served\n", "Allow: GET, HEAD\r\n")
        return await self._answer_with_metrics(method)

    async def _answer_with_metrics(self, method: bytes) -> bytes:
        try:
            metrics = await self._metrics()
        except QuicSteerError as error:  # the service is ending
            return _response(503, f"{error}\n")
        return _response(200, metrics, body=method == b"GET")


def _response(status: int, text: str, headers: str = "", body: bool = True) -> bytes:
    content = text.encode()
    content_type = CONTENT_TYPE if status == 200 else "text/plain; charset=utf-8"
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\nContent-Length: {len(content)}\r\n"
        f"{headers}Connection: close\r\n\r\n"
    )
    return head.encode() + (content if body else b"")
