"""Messages between a supervisor and a worker, over a pair of Unix sockets.

One message is one packet: a JSON object with its kind under ``"say"``. Neither end ever blocks, and an end whose peer
is gone says nothing: workers go on serving when the supervisor dies.

A worker says ``ready`` (it reads its established sockets), ``stopped`` (it no longer reads its listeners), ``drained``
(no connection is left), ``alive`` (an answer to ``ping``) and ``report`` with its figures (an answer to ``report``, and
unasked before it ends). It is told to ``listen``, to ``stop`` with the seconds that its connections have to end,
``ping`` and ``report``.

In a mode without steering the established sockets are the listeners: they too are read only after ``listen``.
"""

import contextlib
import json
import socket
from typing import Any

from .plain import read_object

_MESSAGE_MAX = 64 * 1024
_PACKETS_MAX = 1024
"""Packets that are read at once: more than fit a socket's queue, so that only a peer that never stops is cut short."""


class Channel:
    """One end of a channel."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock

    def send(self, say: str, **details: Any) -> bool:
        """Send a message; returns ``False`` when it could not be sent, because the peer is gone or reads nothing."""
        try:
            self.socket.send(json.dumps({"say": say, **details}).encode())
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Return messages that have arrived, or ``None`` when the peer is gone and all were read."""
        messages: list[dict[str, Any]] = []
        for _ in range(_PACKETS_MAX):
            try:
                packet = self.socket.recv(_MESSAGE_MAX)
            except BlockingIOError:
                return messages
            except ConnectionResetError:
                continue  # the peer is gone and had not read all; reported once, before what it said
            except OSError:
                packet = b""
            if not packet:
                return messages or None
            with contextlib.suppress(ValueError):  # a message of another release is no reason to end
                message = read_object(packet)
                if isinstance(message.get("say"), str):
                    messages.append(message)
        return messages

    def close(self) -> None:
        """Close this end."""
        self.socket.close()


def channel_pair() -> tuple[Channel, Channel]:
    """Return the two ends of a new channel: the supervisor's and the worker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), Channel(theirs)
