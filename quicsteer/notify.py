"""Tells the service manager what a process is doing (sd_notify(3)); without one, nothing is sent."""

import contextlib
import os
import socket
import time

SERVICE_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""What the service manager puts into the environment for us, and for no process of ours."""

SEND_TIMEOUT = 5.0
"""Seconds that a busy service manager may take to make room for a message; then the message is lost."""


class ServiceManager:
    """The service manager that started this process, if there is one.

    ``watchdog`` is the time in seconds within which it wants to hear ``WATCHDOG=1``, or ``None``.
    """

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        microseconds = os.environ.get("WATCHDOG_USEC", "")
        for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog = int(microseconds) / 1e6 if microseconds.isdigit() and for_us else None

    def ready(self, status: str) -> None:
        """Say that the service serves: after the start, and after a reload."""
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """Say that a reload has begun (Type=notify-reload wants the time)."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reloading")

    def stopping(self) -> None:
        """Say that the service ends."""
        self._send("STOPPING=1", "STATUS=stopping")

    def status(self, text: str) -> None:
        """Show a line to whoever asks for the status of the service."""
        self._send(f"STATUS={text}")

    def alive(self) -> None:
        """Keep the watchdog quiet."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        # It may have gone away; the service goes on.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.settimeout(SEND_TIMEOUT)
            sock.sendto("\n".join(lines).encode(), self._address)
