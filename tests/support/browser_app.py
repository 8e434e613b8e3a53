"""A page that asks its server many times, and shows which worker answered, and from which port it was seen."""

import asyncio
import json
import os
from typing import Any

REQUESTS = 24
DELAY = 0.1

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>quicsteer</title>
<style>
body { font: 16px/1.4 sans-serif; margin: 24px; color: #222; max-width: 880px }
h1 { font-size: 22px; margin: 0 0 4px }
p { margin: 0 0 20px; color: #555 }
#answers { display: grid; grid-template-columns: repeat(6, 1fr); gap: 8px }
#answers div { border-radius: 6px; padding: 8px 10px; color: #fff; font-size: 12px; white-space: nowrap }
b { display: block; font-size: 16px }
.w0 { background: #1b6ca8 } .w1 { background: #b5473c } .w2 { background: #3a7d44 } .w3 { background: #7a4a9c }
</style>
<h1>One HTTP/3 connection to four workers</h1>
<p id="summary">The client's address changes all the time.</p>
<div id="answers"></div>
<script>
window.ask = async function (count) {
  const answers = [];
  document.getElementById("answers").replaceChildren();
  const start = performance.now();
  for (let number = 0; number < count; number++) {
    const answer = await (await fetch("/who?" + number + "-" + start)).json();
    answers.push(answer);
    const cell = document.createElement("div");
    cell.className = "w" + answer.worker;
    cell.innerHTML = "<b>worker " + answer.worker + "</b>HTTP/" + answer.http + " from port " + answer.port;
    document.getElementById("answers").append(cell);
  }
  const seconds = (performance.now() - start) / 1000;
  const ports = new Set(answers.map(answer => answer.port)).size;
  const workers = new Set(answers.map(answer => answer.worker)).size;
  document.getElementById("summary").textContent =
    count + " requests, " + ports + " client ports, " + workers + (workers == 1 ? " worker" : " workers");
  return { answers, seconds };
};
</script>
"""


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    kind, body = b"text/html", PAGE.encode()
    if scope["path"] == "/who":
        await asyncio.sleep(DELAY)
        answer = {
            "worker": int(os.environ["QUICSTEER_WORKER"]),
            "http": scope["http_version"],
            "port": scope["client"][1],
            "pid": os.getpid(),
        }
        kind, body = b"application/json", json.dumps(answer).encode()
    headers = [(b"content-type", kind), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
