"""What quicsteer.hypercorn takes for granted of hypercorn: these tests fail when a release of it changes that."""

import asyncio
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypercorn.__main__
import pytest
from hypercorn.asyncio.run import worker_serve
from hypercorn.config import Config, Sockets
from hypercorn.protocol.h3 import H3Protocol
from hypercorn.typing import AppWrapper

import quicsteer._hypercorn
from quicsteer import hypercorn as command
from quicsteer._hypercorn import PRIVATE_NAMES, missing_names, parse_arguments


def test_all_private_names_are_there() -> None:
    assert missing_names() == []


def test_missing_names_are_found() -> None:
    class Changed:
        def __init__(self) -> None:
            self.kept = 1

    table = ((Changed, "kept", ""), (Changed, "gone", ""))
    assert missing_names(table) == ["Changed.gone"]


def test_a_hypercorn_that_changed_is_refused() -> None:
    script = """
import hypercorn.protocol.h3
del hypercorn.protocol.h3.H3Protocol._create_stream
try:
    import quicsteer.hypercorn
except ImportError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert "has no H3Protocol._create_stream" in child.stdout
    assert "pip install quicsteer[hypercorn]" in child.stdout


def test_no_other_private_name_is_used() -> None:
    source = Path(quicsteer._hypercorn.__file__).read_text()
    body = source[source.index("class _Http3(") :]
    own = {"_give_up", "_quic"}
    assert set(re.findall(r"\.(_[a-z]\w*)", body)) <= own | {name for _, name, _ in PRIVATE_NAMES}


def test_http_3_is_made_of_what_we_give() -> None:
    names = list(inspect.signature(H3Protocol.__init__).parameters)[1:]
    assert names == ["app", "config", "context", "task_group", "state", "client", "server", "quic", "send"]


def test_the_command_line_becomes_a_configuration_and_nothing_runs() -> None:
    before = vars(hypercorn.__main__)["run"]
    config = parse_arguments(["--workers", "3", "--bind", "127.0.0.1:1", "--access-logfile", "-", "module:app"])
    assert (config.workers, config.bind, config.accesslog) == (3, ["127.0.0.1:1"], "-")
    assert config.application_path == "module:app"
    assert vars(hypercorn.__main__)["run"] is before


def test_a_configuration_file_is_read_as_hypercorn_does(tmp_path: Path) -> None:
    path = tmp_path / "hypercorn.toml"
    path.write_text('workers = 5\nquic_bind = ["[::1]:4433", "localhost"]\n')
    config = parse_arguments(["--config", str(path), "module:app"])
    assert config.workers == 5
    assert command._quic_addresses(config, []) == ["[::1]:4433", "localhost:8000"]


def test_the_shutdown_trigger_is_asked_for_when_all_has_started_and_lifespan_ends_last() -> None:
    """On this order the start of HTTP/3 and its end rest."""
    steps: list[str] = []

    async def app(scope: Any, receive: Any, send: Any, sync_spawn: Any, call_soon: Any) -> None:
        assert scope["type"] == "lifespan"
        scope["state"]["kept"] = True
        steps.append((await receive())["type"])
        await send({"type": "lifespan.startup.complete"})
        steps.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.complete"})

    async def trigger() -> None:
        steps.append("trigger")

    async def main() -> None:
        wrapper: AppWrapper = app
        await worker_serve(wrapper, Config(), sockets=Sockets([], [], []), shutdown_trigger=trigger)

    asyncio.run(main())
    assert steps == ["lifespan.startup", "trigger", "lifespan.shutdown"]


@pytest.mark.parametrize(
    ("bind", "address"),
    [
        ("127.0.0.1:443", "127.0.0.1:443"),
        ("[::]:443", "[::]:443"),
        ("example.net", "example.net:8000"),
        ("[::1]", "[::1]:8000"),
    ],
)
def test_addresses_are_read_as_hypercorn_does(bind: str, address: str) -> None:
    assert command._with_port(bind) == address
