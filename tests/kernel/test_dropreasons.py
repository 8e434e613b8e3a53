"""Why datagrams are dropped, in exact numbers, and what is said where that cannot be told."""

import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from privileges import NOBODY, CannotBecome, run_as
from readouts import overflow
from steer import open_descriptors, short_header

from quicsteer import QuicSteerError, SteeringGroup, SteeringMode, btf, cli, dropreasons
from quicsteer.dropreasons import DropReasons, counting

MANY = 1000


@pytest.fixture
def tracing() -> None:
    """Skip where the host cannot tell reasons."""
    try:
        DropReasons([9]).close()
    except QuicSteerError as error:
        if os.environ.get("QUICSTEER_REQUIRE_KERNEL") == "1":
            pytest.fail(f"QUICSTEER_REQUIRE_KERNEL is set, but {error}")
        pytest.skip(str(error))


@pytest.fixture
def group() -> Iterator[SteeringGroup]:
    with SteeringGroup.open("127.0.0.1:0", 2, mode="cbpf", drop_invalid=True, receive_buffer=20_000) as opened:
        yield opened


@pytest.mark.usefixtures("tracing")
def test_each_reason_is_counted_exactly(group: SteeringGroup, client: socket.socket) -> None:
    before = open_descriptors()
    with (
        counting([group.addresses[0][1]]) as reasons,
        SteeringGroup.open("127.0.0.1:0", 1, mode="hash", receive_buffer=20_000) as other,
    ):
        assert reasons.read() == {}
        overflow(group, group.workers[1], MANY, client)
        for _ in range(MANY // 2):
            client.sendto(short_header(os.urandom(8)), group.addresses[0])
        overflow(other, other.workers[0], 10, client)  # on another port
        assert reasons.read() == {"SOCKET_RCVBUFF": MANY, "SOCKET_FILTER": MANY // 2}
    assert open_descriptors() == before


@pytest.mark.usefixtures("tracing")
def test_several_ports_are_counted_together(client: socket.socket) -> None:
    with (
        SteeringGroup.open(["127.0.0.1:0", "127.0.0.1:0"], 1, mode="hash", receive_buffer=20_000) as group,
        counting([port for _, port in group.addresses]) as reasons,
    ):
        for address in group.addresses:
            for _ in range(MANY):
                client.sendto(bytes(1200), address)
        assert reasons.read() == {"SOCKET_RCVBUFF": group.stats().dropped}


@pytest.mark.usefixtures("tracing")
def test_the_command_counts_for_a_while(group: SteeringGroup, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"127.0.0.1:{group.addresses[0][1]}"
    assert cli.main(["stats", target, "--why", "0.01", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == ["schema", "seconds", "reasons"]
    assert shown["reasons"] == {}
    assert cli.main(["stats", target, "--why", "0.01"]) == 0
    assert capsys.readouterr().out.startswith(f"{target}: 0 datagrams dropped in 0.")
    for wrong in (["--why", "0"], ["--why", "1", "--prometheus"], ["--why", "1", "--watch"]):
        assert cli.main(["stats", target, *wrong]) == 2


@pytest.mark.usefixtures("tracing")
@pytest.mark.parametrize(
    ("capabilities", "works"), [((), False), (("CAP_BPF", "CAP_PERFMON"), True), (("CAP_BPF",), False)]
)
def test_the_least_privilege_is_enough_and_less_is_said_plainly(capabilities: tuple[str, ...], works: bool) -> None:
    source = """
        import json
        from quicsteer import QuicSteerError
        from quicsteer.dropreasons import DropReasons
        try:
            DropReasons([9]).close()
            print(json.dumps(""))
        except QuicSteerError as error:
            print(json.dumps(str(error)))
    """
    try:
        said = run_as(source, uid=NOBODY, capabilities=capabilities, imports=("quicsteer.dropreasons",))
    except CannotBecome as error:
        pytest.skip(str(error))
    assert (said == "") == works
    assert works or said.startswith("drop reasons need CAP_BPF and CAP_PERFMON: bpf(")


def test_a_kernel_that_does_not_describe_itself_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dropreasons, "KERNEL", tmp_path / "vmlinux")
    with pytest.raises(QuicSteerError, match="does not describe its types"):
        DropReasons([9])
    for junk in (b"", b"junk" * 20):
        (tmp_path / "vmlinux").write_bytes(junk)
        with pytest.raises(QuicSteerError, match="does not describe its types"):
            DropReasons([9])


def test_an_older_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        def arguments(self, tracepoint: str) -> list[str]:
            return ["sk_buff", "", "skb_drop_reason"]

        def offset(self, structure: str, member: str) -> int:
            return 14

    monkeypatch.setattr(dropreasons, "_read_types", Older)
    with pytest.raises(QuicSteerError, match=r"Linux 6\.11"):
        DropReasons([9])


@pytest.mark.skipif(not btf.KERNEL.exists(), reason="this kernel does not describe its types")
def test_the_kernel_types_are_read_as_they_are() -> None:
    types = btf.Types(btf.KERNEL.read_bytes())
    assert types.offset("udphdr", "check") == 6
    assert types.offset("sock_common", "skc_num") == types.offset("sock_common", "skc_dport") + 2  # type: ignore[operator]
    assert types.offset("udphdr", "nothing") is None
    assert types.offset("nothing", "nothing") is None
    assert types.arguments("nothing") == []
    assert types.enumerators("nothing") == {}
    assert types.enumerators("bpf_map_type")[2] == "BPF_MAP_TYPE_ARRAY"


def test_the_program_has_the_numbers_where_they_belong() -> None:
    program = dropreasons.counting_program(counts=7, port=4433, port_offset=14)
    instructions = list(struct.iter_unpack("=BBhi", program))
    jumps = [(number, offset) for number, (code, _, offset, _) in enumerate(instructions) if code in (0x15, 0x55)]
    assert {number + 1 + offset for number, offset in jumps} == {len(instructions) - 2}
    assert [immediate for _, _, _, immediate in instructions if immediate in (7, 14, 4433)] == [14, 4433, 7]


def test_the_mode_does_not_matter(any_mode: SteeringMode, client: socket.socket, tracing: None) -> None:
    with (
        SteeringGroup.open("127.0.0.1:0", 1, mode=any_mode, receive_buffer=20_000) as group,
        counting([group.addresses[0][1]]) as reasons,
    ):
        overflow(group, group.workers[0], 10, client)
        assert reasons.read() == {"SOCKET_RCVBUFF": 10}
