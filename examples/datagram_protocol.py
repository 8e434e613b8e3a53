"""A UDP service that is not QUIC and only wants workers: asyncio's own protocol, one process per socket.

    python datagram_protocol.py [HOST:PORT]

The kernel spreads clients by their address (mode ``hash``); there is nothing to steer by. What a group still gives:
the address belongs to it alone, what is queued for a worker that dies waits for the next one, and drops are counted.
"""

import asyncio
import multiprocessing
import os
import sys
from typing import Any

from quicsteer import SteeringGroup, Worker


class Echo(asyncio.DatagramProtocol):
    """Sends each datagram back behind the number of this process."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(b"%d:" % os.getpid() + data, addr)


async def serve_forever(worker: Worker) -> None:
    await asyncio.get_running_loop().create_datagram_endpoint(Echo, sock=worker.socket)
    await asyncio.Event().wait()


def work(worker: Worker) -> None:
    asyncio.run(serve_forever(worker))


def main(address: str = "127.0.0.1:4433") -> None:
    with SteeringGroup.open(address, workers=4, mode="hash") as group:
        processes = [multiprocessing.Process(target=work, args=(worker,), daemon=True) for worker in group.workers]
        for process in processes:
            process.start()
        print("listening on {}:{}".format(*group.addresses[0]), flush=True)
        for process in processes:
            process.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
