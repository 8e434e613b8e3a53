"""The application of the hypercorn tests: it says which process answered, and what it was asked."""

import asyncio
import json
import os
from typing import Any

_abandoned = 0


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await _live(scope, receive, send)
    elif scope["path"] == "/wait":
        await _wait(receive)
    else:
        await _answer(scope, receive, send)


async def _live(scope: dict[str, Any], receive: Any, send: Any) -> None:
    assert (await receive())["type"] == "lifespan.startup"
    scope["state"]["started"] = True
    await send({"type": "lifespan.startup.complete"})
    assert (await receive())["type"] == "lifespan.shutdown"
    print(f"the application of {os.getpid()} was shut down", flush=True)
    await send({"type": "lifespan.shutdown.complete"})


async def _wait(receive: Any) -> None:
    """Answer nothing; count clients that gave up."""
    global _abandoned  # noqa: PLW0603
    while (await receive())["type"] != "http.disconnect":
        pass
    _abandoned += 1


async def _answer(scope: dict[str, Any], receive: Any, send: Any) -> None:
    size, more = 0, True
    if scope["path"] == "/ignore":
        more = False
    if scope["path"] == "/slow":
        await asyncio.sleep(float(scope["query_string"]))
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    answer = {
        "pid": os.getpid(),
        "http": scope["http_version"],
        "state": scope["state"].get("started"),
        "received": size,
        "abandoned": _abandoned,
        "client": list(scope["client"] or []),
    }
    length = int(scope["query_string"] or 0) if scope["path"] == "/download" else 0
    body = b"x" * length or json.dumps(answer).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": body})
