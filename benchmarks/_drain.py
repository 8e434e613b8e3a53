"""The program of a worker in ``readout``: reads what comes and counts it where the measuring process can see it."""

import mmap
import select
import struct
import sys

from quicsteer import Worker

COUNT = struct.Struct("=Q")
_BATCH = 64


def drain(worker: Worker, counts: mmap.mmap) -> None:
    """Read until this process is ended."""
    poll = select.poll()
    sockets = {sock.fileno(): sock for sock in worker.sockets}
    for number in sockets:
        poll.register(number, select.POLLIN)
    buffer, total = bytearray(65536), 0
    while True:
        for number, _ in poll.poll():
            try:
                for _ in range(_BATCH):
                    sockets[number].recv_into(buffer)
                    total += 1
            except BlockingIOError:
                pass
        COUNT.pack_into(counts, worker.index * COUNT.size, total)


if __name__ == "__main__":
    inherited = Worker.inherited()
    assert inherited
    with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        inherited.ready()
        drain(inherited, shared)
