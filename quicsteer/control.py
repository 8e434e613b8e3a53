"""The control socket of ``quicsteer run``: a Unix socket on which the operator's commands arrive.

A request is one line of JSON with the command's name under ``"command"``. Answers are lines of JSON; the last one has
``"ok"``, and ``"error"`` when that is false. Only root and the uid of the supervisor are served.
"""

import asyncio
import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from .errors import QuicSteerError
from .plain import read_object

_LINE_MAX = 64 * 1024
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid of SO_PEERCRED, unix(7)

Handler = Callable[[dict[str, Any]], AsyncIterator[dict[str, Any]]]


def default_directory() -> Path:
    """Return where control sockets lie: /run/quicsteer for root, else below XDG_RUNTIME_DIR or /tmp."""
    if os.geteuid() == 0:
        return Path("/run/quicsteer")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "quicsteer" if runtime else Path(f"/tmp/quicsteer-{os.geteuid()}")  # noqa: S108


def prepare_directory(path: Path) -> None:
    """Make the directory of a control socket, for this user alone.

    Raises:
        QuicSteerError: it is somebody else's, or others may write to it.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) & ~_sticky(status):
        raise QuicSteerError(f"directory {path} can be written to by others: use one of your own with --control")


def _sticky(status: os.stat_result) -> int:
    """In a sticky directory others cannot take our socket's name away."""
    return stat.S_IWGRP | stat.S_IWOTH if status.st_mode & stat.S_ISVTX else 0


class ControlServer:
    """Serves commands on a Unix socket that this process owns."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self._handler = handler
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Bind the socket, in place of one that nobody serves any more.

        Raises:
            QuicSteerError: another process serves it.
        """
        prepare_directory(self.path.parent)
        if self.path.exists():
            if not self.path.is_socket():
                raise QuicSteerError(f"{self.path} is no socket: choose another path with --control")
            if _is_served(self.path):
                raise QuicSteerError(f"another process serves {self.path}: choose another one with --control")
            self.path.unlink(missing_ok=True)
        old_mask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, str(self.path), limit=_LINE_MAX)
        finally:
            os.umask(old_mask)

    async def close(self) -> None:
        """Serve no more and remove the socket."""
        if self._server:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            try:
                line = await reader.readline()  # first of all: who is still sending would not hear the answer
                if not _may_command(writer.get_extra_info("socket")):
                    raise ValueError("only root and the supervisor's own user may command it")
                request = read_object(line)
                if not isinstance(request.get("command"), str):
                    raise ValueError("it has no command")
            except ValueError as error:
                await _answer(writer, {"ok": False, "error": f"the request is refused: {error}"})
                return
            try:
                async for answer in self._handler(request):
                    await _answer(writer, answer)
            except (QuicSteerError, ValueError, TypeError) as error:
                await _answer(writer, {"ok": False, "error": str(error)})
        except ConnectionError:
            pass  # the client went away; what it asked for goes on or has ended
        finally:
            writer.close()


def _may_command(sock: socket.socket) -> bool:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return _CREDENTIALS.unpack(credentials)[1] in (0, os.geteuid())


async def _answer(writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()


def command(path: Path, request: dict[str, Any], on_answer: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Send a request to a supervisor; call ``on_answer`` for each answer before the last, and return that.

    Raises:
        QuicSteerError: nobody serves the socket, or the command was refused.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(str(path))
        except OSError as error:
            raise QuicSteerError(f"no supervisor answers at {path}: {error.strerror}") from error
        sock.sendall(json.dumps(request).encode() + b"\n")
        with sock.makefile() as lines:
            for line in lines:
                answer: dict[str, Any] = json.loads(line)
                if "ok" not in answer:
                    on_answer(answer)
                elif answer["ok"]:
                    return answer
                else:
                    raise QuicSteerError(str(answer.get("error", "refused")))
    raise QuicSteerError(f"the supervisor at {path} ended before it answered")


def _is_served(path: Path) -> bool:
    """Tell whether somebody listens on a socket; when that cannot be told, somebody may."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
        return True


def find_socket(target: str | None) -> Path:
    """Return the control socket that a target means: a path, or the only one in the default directory.

    Raises:
        QuicSteerError: there is none, or there are several.
    """
    if target is not None:
        return Path(target)
    found = sorted(default_directory().glob("*.sock"))
    if len(found) > 1:
        found = [path for path in found if _is_served(path)] or found[:1]  # one that was killed leaves its socket
    if len(found) == 1:
        return found[0]
    if not found:
        raise QuicSteerError(f"no control socket in {default_directory()}: name the one of 'quicsteer run --control'")
    raise QuicSteerError(f"several supervisors run: name one of {', '.join(map(str, found))}")
