"""A worker program that quicsteer knows nothing of: takes its worker over by exec and prints what it sees."""

import json
import os
from pathlib import Path


def main() -> None:
    from steer import receive_all

    from quicsteer import Worker

    before = {name: os.environ.get(name) for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "QUICSTEER_FD")}
    command_line = Path("/proc/self/cmdline").read_text()
    environment = Path("/proc/self/environ").read_text()
    worker = Worker.inherited()
    assert worker is not None
    listing = os.popen("ls -l /proc/self/fd").read()  # a child of this process
    status = Path("/proc/self/status").read_text()
    print(
        json.dumps(
            {
                "variables": before,
                "left": [name for name in before if name in os.environ],
                "again": Worker.inherited() is None,
                "index": worker.index,
                "slot": worker.slot,
                "mode": worker.mode,
                "received": [len(receive_all(sock)) for sock in worker.established],
                "listeners": [len(receive_all(sock)) for sock in worker.listeners],
                "cid": worker.connection_ids.issue().hex(),
                "token_secret": worker.token_secret.hex(),
                "reset_token": worker.connection_ids.reset_token(bytes(8)).hex(),
                "uid": os.getuid(),
                "groups": os.getgroups(),
                "effective": next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff")),
                "child_sockets": listing.count("socket:"),
                "child_memory": listing.count("memfd:"),
                "repr": repr(worker) + repr(worker.connection_ids),
                "command_line": command_line,
                "environment": environment,
            }
        )
    )


if __name__ == "__main__":
    main()
