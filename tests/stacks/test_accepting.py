"""A worker of ``quicsteer hypercorn`` that stops to accept TCP connections serves those that it has accepted.

On asyncio only. In a process in which uvloop has run, each fork closes the two numbers of libuv's signal pipe and makes
the pipe anew; in the forked services of other tests those numbers are sockets. Reloads of workers on uvloop are in
``test_hypercorn.py``, in processes of their own.
"""

import asyncio
import socket

from hypercorn.config import Config
from quic import TIMEOUT

from quicsteer import hypercorn


def test_a_connection_that_was_just_accepted_is_served() -> None:
    """It is accepted in the turn of the loop in which the worker is told to stop: events come in their order."""
    servers: list[asyncio.Server] = []
    config = Config()

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"served")
        writer.close()

    async def start(listener: socket.socket, order: socket.socket) -> None:
        await asyncio.start_server(greet, sock=listener)
        asyncio.get_running_loop().add_reader(order, stop, order)

    def stop(order: socket.socket) -> None:
        order.recv(1)
        hypercorn._stop_accepting(servers)

    async def wait_for(client: socket.socket) -> bytes:
        return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 64), TIMEOUT)

    supervisor, order = socket.socketpair()
    listener = socket.create_server(("127.0.0.1", 0))  # which its server closes
    with supervisor, order, socket.socket() as client:
        order.setblocking(False)
        with asyncio.Runner(loop_factory=hypercorn._loop_factory(config, servers)) as runner:
            runner.run(start(listener, order))
            client.connect(listener.getsockname())
            client.setblocking(False)
            supervisor.send(b"!")
            assert runner.run(wait_for(client)) == b"served"
