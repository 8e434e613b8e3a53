"""Connects an asyncio server to the supervisor of its worker.

A server of any QUIC stack takes part in reloads with three methods: ``start_listening``, ``stop_listening``, and the
coroutine ``drain``. Without a supervisor the server listens at once.
"""

import asyncio
from typing import Any, Protocol, runtime_checkable

from .channel import Channel
from .quicstats import QuicStats
from .worker import Worker


class DrainingServer(Protocol):
    """What a server must be able to do."""

    def start_listening(self) -> None:
        """Read the listeners of the worker."""

    def stop_listening(self) -> None:
        """Serve what waits in the listeners, then read them no more."""

    async def drain(self, timeout: float | None) -> None:
        """Wait until no connection is left; at the end of ``timeout`` seconds, close those that are."""


@runtime_checkable
class ReportingServer(Protocol):
    """What a server may be able to do besides: its figures then appear in ``quicsteer stats``."""

    def figures(self) -> QuicStats:
        """Return what the server did since it started."""


class Lifecycle:
    """Does for a server what the supervisor of its worker says, until the supervisor is gone."""

    def __init__(self, worker: Worker, server: DrainingServer) -> None:
        self._channel = worker.channel
        self._worker = worker
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._draining: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Say that the server is ready, and listen when it is told to."""
        if self._channel is None:
            self._server.start_listening()
            return
        self._loop.add_reader(self._channel.socket, self._receive)
        self._worker.ready()

    def close(self) -> None:
        """Take no more orders."""
        if self._channel is not None:
            self._loop.remove_reader(self._channel.socket)

    def _receive(self) -> None:
        channel = self._channel
        messages = channel.receive() if channel else None
        if channel is None or messages is None:
            self.close()  # the supervisor is gone; the worker goes on
            return
        for message in messages:
            self._obey(channel, message)

    def _obey(self, channel: Channel, message: dict[str, Any]) -> None:
        if message["say"] == "ping":
            channel.send("alive")
        elif message["say"] == "report":
            self._report(channel)
        elif message["say"] == "listen":
            self._server.start_listening()
        elif message["say"] == "stop":
            self._server.stop_listening()
            channel.send("stopped")
            self._draining = self._loop.create_task(self._drain(channel, message.get("seconds")))

    async def _drain(self, channel: Channel, seconds: float | None) -> None:
        await self._server.drain(seconds)
        self._report(channel)
        channel.send("drained")

    def _report(self, channel: Channel) -> None:
        figures = self._server.figures().to_dict() if isinstance(self._server, ReportingServer) else None
        channel.send("report", figures=figures)
