"""A thread per worker, each with an event loop: for interpreters without a GIL.

python threads.py cert.pem key.pem [HOST:PORT]
"""

import asyncio
import sys
import threading

from aioquic.quic.configuration import QuicConfiguration

from quicsteer import SteeringGroup, Worker
from quicsteer.aioquic import serve


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read())
    writer.write_eof()


async def serve_forever(worker: Worker, certificate: str, key: str) -> None:
    tasks: set[asyncio.Future[None]] = set()

    def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(task := asyncio.ensure_future(answer(reader, writer)))
        task.add_done_callback(tasks.discard)

    configuration = QuicConfiguration(is_client=False)
    configuration.load_cert_chain(certificate, key)
    server = await serve(worker, configuration=configuration, stream_handler=echo, retry=50, session_tickets=True)
    await server.wait_closed()


def work(worker: Worker, certificate: str, key: str) -> None:
    asyncio.run(serve_forever(worker, certificate, key))


def main(certificate: str, key: str, address: str = "127.0.0.1:4433") -> None:
    with SteeringGroup.open(address, workers=4) as group:
        threads = [
            threading.Thread(target=work, args=(worker, certificate, key), daemon=True) for worker in group.workers
        ]
        for thread in threads:
            thread.start()
        print("listening on {}:{}".format(*group.addresses[0]), flush=True)
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
