"""Does what a supervisor says over a worker's channel (``quicsteer.channel``), for a server in an event loop."""

import asyncio
from typing import Any, Protocol

from .channel import Channel

DRAIN_SECONDS = 30.0
"""How long connections have to end when a supervisor does not say."""


class Server(Protocol):
    """What a supervisor can tell a server to do."""

    def start_listening(self) -> None:
        """Take new connections."""

    def stop_listening(self) -> None:
        """Take no new connections."""

    async def drain(self, seconds: float) -> None:
        """Serve until no connection is left, but no longer than ``seconds``; close then."""


class Supervision:
    """Reads a channel, and does what it says: ``listen``, ``stop`` and ``ping``.

    The answers are ``stopped`` and later ``drained``, and ``alive``. A server whose supervisor is gone goes on.
    """

    def __init__(self, channel: Channel, server: Server) -> None:
        self._channel = channel
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._drain: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to read the channel."""
        self._loop.add_reader(self._channel.socket, self._read)

    def stop(self) -> None:
        """Stop to read the channel. This comes before it is closed."""
        if self._channel.socket.fileno() >= 0:
            self._loop.remove_reader(self._channel.socket)

    def _read(self) -> None:
        messages = self._channel.receive()
        if messages is None:
            self.stop()
        for message in messages or ():
            self._follow(message)

    def _follow(self, message: dict[str, Any]) -> None:
        match message["say"]:
            case "listen":
                self._server.start_listening()
            case "stop" if self._drain is None:
                self._server.stop_listening()
                self._channel.send("stopped")
                self._drain = self._loop.create_task(self._end(float(message.get("seconds", DRAIN_SECONDS))))
            case "ping":
                self._channel.send("alive")

    async def _end(self, seconds: float) -> None:
        await self._server.drain(seconds)
        self._channel.send("drained")
