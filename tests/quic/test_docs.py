"""What the documentation shows is run as it stands: only the port is another."""

import asyncio
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from gtlsclient import REBIND, fetch, need_gtlsclient, was_served
from http3 import H3Client
from quic import TIMEOUT, Client, client_configuration
from service import echo_command

ROOT = Path(__file__).parents[2]
PORT = "4433"


class Block(NamedTuple):
    """A block of code, how it is run, and how it is known to work."""

    name: str
    kind: str
    command: str
    language: str
    code: str


def blocks() -> list[Block]:
    found = []
    text = (ROOT / "docs" / "use-with.md").read_text()
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        title = section.partition("\n")[0]
        for kind, command, language, code in re.findall(
            r"<!-- run: (\w+)(?:: (.*?))? -->\n```(\w+)\n(.*?)```", section, re.S
        ):
            found.append(Block(title, kind, command, language, code))
    readme = (ROOT / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", readme, re.S)
    return [*found, Block("README", "echo", "", "python", code)]


BLOCKS = blocks()


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def command_line(block: Block, port: int) -> list[str]:
    """Write the block to the working directory if it is a program, and return the command that runs it."""
    if block.language == "console":
        words = shlex.split(block.code.removeprefix("$ "))
    else:
        Path("program.py").write_text(block.code.replace(PORT, str(port)))
        words = shlex.split(block.command or "python program.py")
    words = [word.replace(PORT, str(port)) for word in words]
    start = {"quicsteer": [sys.executable, "-m", "quicsteer"], "python": [sys.executable]}[words[0]]
    return [*start, *(sys.executable if word == "python" else word for word in words[1:])]


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[None]:
    """Run a server; at the end it is told to stop, and all that it started with it."""
    with open("log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # of a session of its own
        process.wait()


async def echo(address: tuple[str, int]) -> None:
    client = Client(client_configuration(alpn_protocols=["echo"]))
    await client.connect(address)
    for number in range(3):
        reader, writer = await client.protocol.create_stream()
        writer.write(b"%d" % number)
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), TIMEOUT) == b"%d" % number
        await client.change_port()
    client.protocol.close()
    client.drop()


async def http3(address: tuple[str, int]) -> None:
    client = H3Client()
    await client.connect(address)
    for _ in range(2):
        assert b"hello" in await client.fetch("/")
        await client.change_port()
    client.drop()


async def gtlsclient(address: tuple[str, int]) -> None:
    need_gtlsclient()
    assert was_served(await asyncio.to_thread(fetch, address, *REBIND), moved=True, body=6)


async def udp(address: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(b"hello", address)
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 2000), TIMEOUT) == b"hello"


def wait_for_server(port: int) -> None:
    """Wait until somebody has the port: what comes then waits in the kernel."""
    deadline = time.monotonic() + TIMEOUT
    tables = [Path("/proc/net/udp"), Path("/proc/net/udp6")]
    while not any(f":{port:04X} " in table.read_text() for table in tables):
        assert time.monotonic() < deadline, Path("log").read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.name}-{block.kind}")
def test_it_runs_as_it_stands(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    certificate, key = echo_command(tmp_path)[2:4]
    Path(certificate).rename("cert.pem")
    Path(key).rename("key.pem")
    Path("app.py").write_text(APPLICATION)
    port = free_port()
    command = command_line(block, port)
    if block.kind in ("end", "pytest"):
        if block.kind == "pytest":
            plugin, test = block.code.split("\n\n", 2)[1:]
            Path("conftest.py").write_text(plugin + "\n")
            Path("test_program.py").write_text(f"{block.code.split(chr(10), 1)[0]}\n{test}")
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_program.py"]
        subprocess.run(command, check=True, timeout=60, capture_output=True)
        return
    with running(command):
        wait_for_server(port)
        visit = {"echo": echo, "http3": http3, "gtlsclient": gtlsclient, "udp": udp}[block.kind]
        asyncio.run(visit(("127.0.0.1", port)))


APPLICATION = """
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})
"""


def test_every_stack_of_the_page_is_run() -> None:
    names = {block.name for block in BLOCKS}
    assert {"hypercorn", "aioquic", "qh3", "uvloop", "pytest", "README"} <= names
    page = (ROOT / "docs" / "use-with.md").read_text()
    assert page.count("```python") + 1 == sum(block.language == "python" for block in BLOCKS)
