"""What worker processes of the tests run: importable, since spawn and forkserver import it."""

import os
from multiprocessing.connection import Connection
from typing import Any

from steer import receive_all

from quicsteer import Worker


def report(worker: Worker) -> dict[str, Any]:
    """What a worker process sees of its worker and of itself."""
    received = sum(len(receive_all(sock)) for sock in worker.sockets)
    targets = []
    for number in os.listdir("/proc/self/fd"):
        try:
            targets.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            continue
    return {
        "index": worker.index,
        "slot": worker.slot,
        "received": received,
        "blocking": any(sock.getblocking() for sock in worker.sockets),
        "cid": worker.connection_ids.issue(),
        "sockets": sum(target.startswith("socket:") for target in targets),
        "maps": sum("bpf" in target for target in targets),
        "token_secret": worker.token_secret,
    }


def report_to(connection: Connection, worker: Worker) -> None:
    connection.send(report(worker))
