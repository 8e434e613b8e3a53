"""What worker processes of a ``Supervisor`` run: importable, since spawn and forkserver import it."""

import asyncio

from service import echo

from quicsteer import Worker


def serve(worker: Worker) -> None:
    async def main() -> None:
        with worker:
            await echo(worker)

    asyncio.run(main())
