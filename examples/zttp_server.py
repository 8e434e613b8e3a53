"""zttp on steered workers: an engine without sockets that takes its connection IDs from a factory.

    python zttp_server.py cert.pem key.pem [HOST:PORT]

The shape fits any engine of that kind: read the worker's sockets, established ones first; answer through the
established one; ``worker.connection_ids`` makes every connection ID.
"""

import multiprocessing
import selectors
import sys
import time
from pathlib import Path

import zttp
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from quicsteer import SteeringGroup, Worker


def credentials(certificate: str, key: str) -> zttp.TlsCredentials:
    """Read a certificate for a P-256 key."""
    private = load_pem_private_key(Path(key).read_bytes(), None)
    if not isinstance(private, EllipticCurvePrivateKey):
        raise SystemExit(f"{key} is not a key on the curve P-256")
    scalar = private.private_numbers().private_value.to_bytes(32, "big")
    der = x509.load_pem_x509_certificate(Path(certificate).read_bytes()).public_bytes(Encoding.DER)
    return {"private_key_scalar": scalar, "certificate": der}


def now() -> int:
    return int(time.monotonic() * 1_000_000)


class Server:
    """One worker."""

    def __init__(self, worker: Worker, certificate: str, key: str) -> None:
        self._worker = worker
        self._socket = worker.socket
        self._endpoint = zttp.QuicEndpoint(
            credentials=credentials(certificate, key),
            connection_id_length=worker.connection_ids.length,
            connection_id_factory=worker.connection_ids,
            retry=True,
            token_secret=worker.token_secret,
        )

    def run(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._socket, selectors.EVENT_READ)
        while True:
            deadline = self._endpoint.next_timeout()
            selector.select(None if deadline is None else max(0.0, (deadline - now()) / 1e6))
            self._endpoint.handle_timeout(now())
            self._read()
            for datagram in self._endpoint.data_to_send():
                host, _, port = (datagram.peer_address or b"").decode().rpartition(" ")
                self._socket.sendto(datagram.data, (host, int(port)))

    def _read(self) -> None:
        while True:
            try:
                data, (host, port, *_) = self._socket.recvfrom(65536)
            except BlockingIOError:
                return
            connection = self._endpoint.receive_datagram(data, f"{host} {port}".encode(), now())
            if connection:
                self._answer(connection)

    def _answer(self, connection: zttp.H3Connection) -> None:
        while not isinstance(event := connection.next_event(), zttp.NeedData | zttp.ConnectionClosed):
            if isinstance(event, zttp.EndOfMessage) or (isinstance(event, zttp.Request) and event.end_stream):
                stream = connection.stream(event.stream_id)
                stream.send_response(200, [(b"content-type", b"text/plain")])
                stream.send_data(b"worker %d\n" % self._worker.index)
                stream.end_message()


def work(worker: Worker, certificate: str, key: str) -> None:
    Server(worker, certificate, key).run()


def main(certificate: str, key: str, address: str = "127.0.0.1:4433") -> None:
    with SteeringGroup.open(address, workers=4, drop_invalid=True) as group:
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
