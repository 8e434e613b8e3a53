"""What quicsteer.aioquic takes for granted of aioquic: these tests fail when a release of it changes that."""

import asyncio
import inspect
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import aioquic.asyncio.server
import pytest
from aioquic.asyncio.server import QuicServer
from aioquic.quic.connection import QuicConnection, QuicConnectionId
from quic import Client, client_configuration, serve_echo, server_configuration

import quicsteer._aioquic
import quicsteer.aioquic
from quicsteer import SteeringGroup
from quicsteer._aioquic import PRIVATE_NAMES, encode_invalid_token_close, missing_names

PACKAGE = Path(quicsteer.aioquic.__file__).parent


def make_connection() -> QuicConnection:
    return QuicConnection(
        configuration=server_configuration(connection_id_length=11), original_destination_connection_id=bytes(8)
    )


@pytest.mark.parametrize("name", [name for name, _ in PRIVATE_NAMES])
def test_a_connection_has_the_names_that_we_use(name: str) -> None:
    assert hasattr(make_connection(), name)


def test_missing_names_are_found_without_making_a_connection() -> None:
    class Changed:
        def __init__(self) -> None:
            self.host_cid = self._host_cids = b""

        def _replenish_connection_ids(self) -> None: ...

    assert missing_names(Changed) == ["_local_initial_source_connection_id", "_close_event"]
    assert missing_names() == []


def test_an_aioquic_that_changed_is_refused_with_its_version_and_what_is_missing() -> None:
    script = """
import aioquic.quic.connection as connection
class Changed(connection.QuicConnection):
    def __init__(self):
        pass
del connection.QuicConnection._replenish_connection_ids
connection.QuicConnection = Changed
try:
    import quicsteer.aioquic
except ImportError as error:
    print(error)
"""
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    assert f"does not fit aioquic {version('aioquic')}" in child.stdout
    assert "_replenish_connection_ids" in child.stdout
    assert "pip install quicsteer[aioquic]" in child.stdout


def test_no_other_private_name_of_a_connection_is_used() -> None:
    own = {"_name_worker", "_describe_end", "_ended_here", "_ended_silently"}
    allowed = own | {name for name, _ in PRIVATE_NAMES}
    source = (PACKAGE / "_aioquic.py").read_text()
    body = source[source.index("class SteeredConnection") :]
    assert set(re.findall(r"(?:self|super\(\))\.(_[a-z]\w*)", body)) <= allowed


def test_the_first_connection_id_stands_in_three_places() -> None:
    connection = make_connection()
    [first] = connection._host_cids
    assert isinstance(first, QuicConnectionId)
    assert first.cid == connection.host_cid == connection._local_initial_source_connection_id
    assert (len(first.cid), first.sequence_number, len(first.stateless_reset_token)) == (11, 0, 16)


def test_later_connection_ids_are_made_in_one_place() -> None:
    """By a method that appends, which ``SteeredConnection`` relies on."""
    connection = make_connection()
    first = connection._host_cids[0]
    connection._replenish_connection_ids()
    numbers = [each.sequence_number for each in connection._host_cids]
    assert connection._host_cids[0] is first
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 1
    assert inspect.getsource(QuicConnection).count("os.urandom(self._configuration.connection_id_length)") == 1


def test_a_reset_token_that_we_set_is_the_one_that_the_client_gets() -> None:
    async def main(group: SteeringGroup) -> None:
        [worker] = group.workers
        server = await serve_echo(worker)
        client = Client()
        await client.connect(group.addresses[0])
        await client.exchange()
        [entry] = server._connections
        assert entry.protocol
        connection = entry.protocol._quic
        assert client.server_cids == {each.cid: each.stateless_reset_token for each in connection._host_cids}
        client.drop()
        server.close()
        worker.close()

    with SteeringGroup.open("127.0.0.1:0", 1, mode="single") as group:
        asyncio.run(main(group))


def test_an_invalid_token_is_answered_as_aioquic_does() -> None:
    assert encode_invalid_token_close is getattr(aioquic.asyncio.server, "_encode_invalid_token_close", None)
    if encode_invalid_token_close:
        assert encode_invalid_token_close(1, source_cid=bytes(8), destination_cid=bytes(8))


def test_serve_takes_what_the_serve_of_aioquic_takes() -> None:
    theirs = inspect.signature(aioquic.asyncio.server.serve).parameters
    ours = inspect.signature(quicsteer.aioquic.serve).parameters
    assert next(iter(ours)) == "worker"
    assert set(theirs) - set(ours) == {"host", "port"}
    for name in set(theirs) & set(ours):
        assert theirs[name].default == ours[name].default
        assert theirs[name].kind == ours[name].kind


def test_a_steered_server_is_a_server_of_aioquic() -> None:
    assert issubclass(quicsteer.aioquic.SteeredQuicServer, QuicServer)
    taken = set(vars(QuicServer)) | set(QuicServer.__init__.__code__.co_names)
    ours = set(quicsteer.aioquic.SteeredQuicServer.__init__.__code__.co_names)
    ours |= set(vars(quicsteer.aioquic.SteeredQuicServer))
    clashes = {name for name in taken & ours if name.startswith("_") and not name.startswith("__")}
    assert clashes == set(), "a private name of the base class is used for something else"


def test_the_configuration_is_left_alone() -> None:
    async def main(group: SteeringGroup) -> None:
        configuration = server_configuration()
        before = dict(vars(configuration))
        server = await quicsteer.aioquic.serve(group.workers[0], configuration=configuration)
        client = Client(client_configuration())
        await client.connect(group.addresses[0])
        client.drop()
        server.close()
        group.workers[0].close()
        assert vars(configuration) == before

    with SteeringGroup.open("127.0.0.1:0", 1, mode="single") as group:
        asyncio.run(main(group))
