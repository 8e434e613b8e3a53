"""aioquic on uvloop: nothing else changes.

python uvloop_server.py cert.pem key.pem [HOST:PORT]
"""

import asyncio
import multiprocessing
import sys

import uvloop
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
    server = await serve(worker, configuration=configuration, stream_handler=echo, retry=50)
    await server.wait_closed()


def work(worker: Worker, certificate: str, key: str) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_forever(worker, certificate, key))


def main(certificate: str, key: str, address: str = "127.0.0.1:4433") -> None:
    with SteeringGroup.open(address, workers=4) as group:
        processes = [
            multiprocessing.Process(target=work, args=(worker, certificate, key), daemon=True)
            for worker in group.workers
        ]
        for process in processes:
            process.start()
        print("listening on {}:{}".format(*group.addresses[0]), flush=True)
        for process in processes:
            process.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
