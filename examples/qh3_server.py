"""qh3 on steered workers: connections live through NAT rebinding, not through a migration.

    python qh3_server.py cert.pem key.pem [HOST:PORT]

``host_cid`` may be set before the first datagram is handled, so the connection ID that a client starts with is ours.
Those that it gets later are made where nothing can be set: a client that changes to one of them reaches a worker by the
kernel's dispatch, as without steering. Behind a NAT clients keep their connection ID and stay.
"""

import asyncio
import multiprocessing
import sys
from typing import Any

from qh3.asyncio.protocol import QuicConnectionProtocol
from qh3.asyncio.server import QuicServer
from qh3.h3.connection import H3_ALPN, H3Connection
from qh3.h3.events import DataReceived, HeadersReceived
from qh3.quic.configuration import QuicConfiguration
from qh3.quic.events import HandshakeCompleted, QuicEvent

from quicsteer import SteeringGroup, Worker


class Http(QuicConnectionProtocol):
    """Answers each request with the number of the worker."""

    index = 0
    http: H3Connection | None = None

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, HandshakeCompleted):
            self.http = H3Connection(self._quic)
        if self.http is None:
            return
        for http_event in self.http.handle_event(event):
            if isinstance(http_event, (HeadersReceived, DataReceived)) and http_event.stream_ended:
                self.http.send_headers(http_event.stream_id, [(b":status", b"200")])
                self.http.send_data(http_event.stream_id, b"worker %d\n" % self.index, end_stream=True)
                self.transmit()


async def serve_forever(worker: Worker, certificate: str, key: str) -> None:
    configuration = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
    configuration.load_cert_chain(certificate, key)

    def create_protocol(quic: Any, **arguments: Any) -> Http:
        quic.host_cid = worker.connection_ids.issue()
        protocol = Http(quic, **arguments)
        protocol.index = worker.index
        return protocol

    await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: QuicServer(configuration=configuration, create_protocol=create_protocol), sock=worker.socket
    )
    await asyncio.Event().wait()


def work(worker: Worker, certificate: str, key: str) -> None:
    asyncio.run(serve_forever(worker, certificate, key))


def main(certificate: str, key: str, address: str = "127.0.0.1:4433") -> None:
    with SteeringGroup.open(address, workers=4) as group:  # no drop_invalid: later connection IDs are not ours
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
