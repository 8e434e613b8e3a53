"""``quicsteer hypercorn`` as a program, for the tests."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from service import Manager, Service, _make_directory, _until_closed, echo_command

APPLICATION = f"{Path(__file__).with_name('asgi_app.py')}:app"


class HypercornService(Service):
    """A running ``quicsteer hypercorn``."""

    @property
    def quic_address(self) -> tuple[str, int]:
        """Where it serves HTTP/3, and the same for TCP."""
        return self.address

    def count_shutdowns(self) -> int:
        """How many workers have shut their application down."""
        return len(re.findall(r"the application of \d+ was shut down", self.log))


@contextlib.contextmanager
def hypercorn(
    *arguments: str, workers: int = 4, application: str = APPLICATION, wait: bool = True
) -> Iterator[HypercornService]:
    """``quicsteer hypercorn`` with the certificate that the clients know, on a free port."""
    directory = _make_directory(None)
    manager = Manager(directory)
    *_, certificate, key, _ = echo_command(directory)
    command = [sys.executable, "-m", "quicsteer", "hypercorn", "--control", str(directory / "control")]
    command += ["--workers", str(workers), "--certfile", certificate, "--keyfile", key]
    command += [] if "--bind" in arguments else ["--bind", "127.0.0.1:0"]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, *arguments, application],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=directory,
            env={**os.environ, "NOTIFY_SOCKET": str(manager.path)},
        )
    process.returncode = 0  # the service is waited for by its pidfd
    yield from _until_closed(HypercornService(process.pid, directory, manager), wait)  # type: ignore[misc]
