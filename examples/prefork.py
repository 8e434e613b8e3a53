"""Pre-fork, as gunicorn does it: a master that forks, and forks again for each child that dies.

    python prefork.py cert.pem key.pem [HOST:PORT]

The master holds every socket: datagrams for a child that died wait for the next one in its place.
"""

import asyncio
import os
import signal
import sys

from aioquic.quic.configuration import QuicConfiguration

from quicsteer import SteeringGroup, Worker
from quicsteer.aioquic import serve


def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async def answer() -> None:
        writer.write(await reader.read())
        writer.write_eof()

    tasks.add(task := asyncio.ensure_future(answer()))
    task.add_done_callback(tasks.discard)


tasks: set["asyncio.Future[None]"] = set()


async def serve_forever(worker: Worker, certificate: str, key: str) -> None:
    configuration = QuicConfiguration(is_client=False)
    configuration.load_cert_chain(certificate, key)
    server = await serve(worker, configuration=configuration, stream_handler=echo, retry=50, session_tickets=True)
    await server.wait_closed()


def fork(group: SteeringGroup, index: int, certificate: str, key: str) -> int:
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            with group.worker(index) as worker:  # closes this child's copies of all other slots
                asyncio.run(serve_forever(worker, certificate, key))
        finally:
            os._exit(1)
    return pid


def main(certificate: str, key: str, address: str = "127.0.0.1:4433") -> None:
    with SteeringGroup.open(address, workers=4) as group:
        children = {fork(group, index, certificate, key): index for index in range(len(group.workers))}
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        print("listening on {}:{}".format(*group.addresses[0]), flush=True)
        try:
            while True:
                pid, _ = os.wait()
                index = children.pop(pid)
                children[fork(group, index, certificate, key)] = index
        finally:
            for pid in children:
                os.kill(pid, signal.SIGTERM)


if __name__ == "__main__":
    main(*sys.argv[1:])
