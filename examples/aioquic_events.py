"""aioquic by its events, without streams: workers by multiprocessing.

python aioquic_events.py cert.pem key.pem [HOST:PORT]
"""

import asyncio
import multiprocessing
import sys

from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import QuicEvent, StreamDataReceived

from quicsteer import SteeringGroup, Worker
from quicsteer.aioquic import serve


class Echo(QuicConnectionProtocol):
    """Sends back what comes, as it comes."""

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamDataReceived):
            self._quic.send_stream_data(event.stream_id, event.data, event.end_stream)
            self.transmit()


async def serve_forever(worker: Worker, certificate: str, key: str) -> None:
    configuration = QuicConfiguration(is_client=False)
    configuration.load_cert_chain(certificate, key)
    server = await serve(worker, configuration=configuration, create_protocol=Echo, retry=50, session_tickets=True)
    await server.wait_closed()


def work(worker: Worker, certificate: str, key: str) -> None:
    asyncio.run(serve_forever(worker, certificate, key))


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
