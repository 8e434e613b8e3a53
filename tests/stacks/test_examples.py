"""The servers in ``examples/`` run as they stand, and their clients stay where they are."""

import asyncio
import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gtlsclient import REBIND, fetch, need_gtlsclient, was_served
from quic import TIMEOUT, Client
from service import echo_command

EXAMPLES = Path(__file__).parents[2] / "examples"
CLIENTS = 8


@contextlib.contextmanager
def running(name: str, directory: Path) -> Iterator[tuple[str, int]]:
    """Run an example on a free port; it ends with the block."""
    certificate, key = echo_command(directory)[2:4]
    arguments = [] if name == "datagram_protocol.py" else [certificate, key]
    command = [sys.executable, str(EXAMPLES / name), *arguments, "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=directory) as process:
        try:
            assert process.stdout
            listening = re.fullmatch(r"listening on ([\d.]+):(\d+)\n", process.stdout.readline())
            assert listening
            yield listening[1], int(listening[2])
        finally:
            process.send_signal(signal.SIGINT if name != "prefork.py" else signal.SIGTERM)
            process.wait(TIMEOUT)


async def echo(client: Client, data: bytes) -> bytes:
    reader, writer = await client.protocol.create_stream()
    writer.write(data)
    writer.write_eof()
    return await asyncio.wait_for(reader.read(), TIMEOUT)


async def follow(address: tuple[str, int]) -> None:
    """Exchange data over a connection whose port changes."""
    client = Client()
    await client.connect(address)
    for number in range(4):
        assert await echo(client, b"%d" % number) == b"%d" % number
        await (client.migrate() if number % 2 else client.change_port())
    client.protocol.close()
    client.drop()


async def follow_all(address: tuple[str, int]) -> None:
    await asyncio.gather(*(follow(address) for _ in range(CLIENTS)))


@pytest.mark.parametrize("name", ["aioquic_events.py", "prefork.py", "uvloop_server.py", "threads.py"])
def test_connections_stay_with_aioquic(name: str, tmp_path: Path) -> None:
    with running(name, tmp_path) as address:
        asyncio.run(follow_all(address))


@pytest.mark.parametrize("name", ["qh3_server.py", "zttp_server.py"])
def test_foreign_clients_are_served(name: str, tmp_path: Path) -> None:
    need_gtlsclient()
    options = REBIND if name == "qh3_server.py" else []
    with running(name, tmp_path) as address, ThreadPoolExecutor(4) as pool:
        logs = list(pool.map(lambda _: fetch(address, *options), range(CLIENTS)))
    failed = [log for log in logs if not was_served(log, bool(options))]
    assert not failed, f"{len(failed)} of {CLIENTS} failed, the first one:\n{failed[0][-4000:]}"


def test_a_protocol_that_is_not_quic_has_workers(tmp_path: Path) -> None:
    class Asking(asyncio.DatagramProtocol):
        def __init__(self) -> None:
            self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def datagram_received(self, data: bytes, addr: object) -> None:
            self.answer.set_result(data)

    async def ask(address: tuple[str, int]) -> bytes:
        transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(Asking, remote_addr=address)
        transport.sendto(b"hello")
        pid, _, echoed = (await asyncio.wait_for(protocol.answer, TIMEOUT)).partition(b":")
        assert echoed == b"hello"
        transport.close()
        return pid

    async def main(address: tuple[str, int]) -> None:
        assert len({await ask(address) for _ in range(60)}) > 1

    with running("datagram_protocol.py", tmp_path) as address:
        asyncio.run(main(address))


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text()
    assert all(path.name in source for path in EXAMPLES.glob("*.py"))
