"""The command of ``quicsteer run`` in the tests: an aioquic echo server on the worker that it inherits."""

import asyncio
import sys
from pathlib import Path

from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from quic import echo_from

from quicsteer import Worker
from quicsteer.aioquic import serve


async def main(certificate: str, key: str, retry: int) -> None:
    worker = Worker.inherited()
    assert worker is not None
    configuration = QuicConfiguration(is_client=False, connection_id_length=worker.connection_ids.length)
    configuration.certificate = x509.load_pem_x509_certificate(Path(certificate).read_bytes())
    configuration.private_key = load_pem_private_key(Path(key).read_bytes(), None)
    with worker:
        server = await serve(
            worker,
            configuration=configuration,
            stream_handler=echo_from(worker.index),
            retry=retry,
            session_tickets=True,
        )
        await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
