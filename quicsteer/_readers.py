"""Reads a worker's two sockets per address in one event loop so that established connections come first.

Per turn of the loop up to 16 datagrams are read from a socket for established connections and one from a listener.
asyncio's own datagram transports take one of each: under a flood of new connections the established socket then gets
half of the turns, and overflows. They also change what other processes see of a shared socket; this reads with
``add_reader`` and leaves O_NONBLOCK as it is.
"""

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any

ESTABLISHED_BATCH = 16
LISTENER_BATCH = 1
LAST_BATCH = 64
"""Datagrams that are read at most from a listener before its reader stops."""

_DATAGRAM_MAX = 65536

SocketAddress = tuple[Any, ...]
Receive = Callable[["Endpoint", bytes, SocketAddress, bool], None]
"""Takes a datagram: where it arrived, payload, sender, and whether a listener took it."""


class Endpoint(asyncio.DatagramTransport):
    """One address of a worker, as a transport: all that is sent leaves through the socket for established connections.

    ``listeners`` are the sockets for new connections. Where ``established`` is one of them (the plain form, and modes
    without steering) it is read in batches of 16, once listening starts, and all its datagrams count as a listener's.
    The sockets belong to the caller, who closes the endpoint before them: epoll would go on watching a closed socket
    that another process holds.

    What ``receive`` raises goes to the loop's exception handler, and reading goes on.
    """

    def __init__(
        self,
        established: socket.socket,
        listeners: Sequence[socket.socket],
        receive: Receive,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__({"socket": established, "sockname": established.getsockname(), "peername": None})
        self._established = established
        self._listens = established in listeners
        self._listeners = [sock for sock in listeners if sock is not established]
        self._receive = receive
        self._loop = loop
        self._buffer = memoryview(bytearray(_DATAGRAM_MAX))
        self._closed = False
        self.reading = False
        """Whether a batch is being read: who sends after each datagram may rather send once after the batch."""
        self.unsent = 0
        """Datagrams that the kernel did not take, mostly because the send buffer was full; lost, as UDP may."""

    def start(self) -> None:
        """Start to read the socket for established connections, unless it is a listener too."""
        if not self._listens:
            self._loop.add_reader(self._established, self._read, self._established, ESTABLISHED_BATCH, False)

    def start_listening(self) -> None:
        """Start to read the listeners."""
        if self._listens:
            self._loop.add_reader(self._established, self._read, self._established, ESTABLISHED_BATCH, True)
        for sock in self._listeners:
            self._loop.add_reader(sock, self._read, sock, LISTENER_BATCH, True)

    def stop_listening(self) -> None:
        """Stop to read the listeners, after a last batch of up to 64 datagrams; go on with established connections.

        What arrived before is served here; the next reader finds an empty queue.
        """
        for sock in self._listeners:
            if self._loop.remove_reader(sock):
                self._read(sock, LAST_BATCH, True)

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send a datagram, or lose it when the kernel does not take it now."""
        if self._closed or addr is None:
            return
        try:
            self._established.sendto(data, addr)
        except OSError:
            self.unsent += 1

    def close(self) -> None:
        """Stop reading and sending; the sockets stay open. Closing twice does nothing."""
        if not self._closed:
            self._closed = True
            for sock in (self._established, *self._listeners):
                self._loop.remove_reader(sock)

    def abort(self) -> None:
        self.close()

    def is_closing(self) -> bool:
        return self._closed

    def _read(self, sock: socket.socket, batch: int, listener: bool) -> None:
        self.reading = True
        try:
            for _ in range(batch):
                try:
                    size, address = sock.recvfrom_into(self._buffer)
                except BlockingIOError:
                    return
                except OSError:
                    continue  # an ICMP error about something sent earlier, which recv reports once
                try:
                    self._receive(self, bytes(self._buffer[:size]), address, listener)
                except Exception as error:  # noqa: BLE001  # the application's: one datagram must not cost the others
                    context = {"message": "a datagram could not be handled", "exception": error, "transport": self}
                    self._loop.call_exception_handler(context)
                if self._closed:
                    return
        finally:
            self.reading = False
