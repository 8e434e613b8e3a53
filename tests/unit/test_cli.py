"""The command line without a kernel: arguments, and what a report looks like."""

import dataclasses
import errno
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quicsteer import HostStats, Probe, SteeringMode, cli
from quicsteer.abi import Outcome
from quicsteer.check import Report, describe, exit_status, explain_host, probe_hash_seed, run_checks
from quicsteer.cli import main, render, summarize
from quicsteer.decision import Rules, decide
from quicsteer.errors import KernelError, QuicSteerError
from quicsteer.ports import Holder
from quicsteer.proof import Tally, judge, make_datagrams

KERNEL = Probe("Linux 6.18", True, "classic steering needs 4.6, eBPF 5.8 with CAP_BPF")
SHARED = Probe("shared port", True, "sockets can share an address (SO_REUSEPORT)", mode=SteeringMode.HASH)
CLASSIC = Probe("classic BPF steers", True, "800 of 800 datagrams reached the socket", mode=SteeringMode.CBPF)
REFUSED = Probe(
    "eBPF steers",
    False,
    "bpf(BPF_MAP_CREATE): Operation not permitted, CAP_BPF is missing",
    "systemd unit: AmbientCapabilities=CAP_BPF\n"
    "container: --cap-add BPF (for its root user; and its seccomp profile must allow bpf)",
    mode=SteeringMode.EBPF,
)
BUFFER = Probe("receive buffer", True, "a burst of 256 fills it", "sysctl -w net.core.rmem_max=8388608", warning=True)
REPORT = Report("1.2.3", "6.18.0", SteeringMode.CBPF, (KERNEL, SHARED, CLASSIC, REFUSED, BUFFER))

TEXT = """\
ok    Linux 6.18          classic steering needs 4.6, eBPF 5.8 with CAP_BPF
ok    shared port         sockets can share an address (SO_REUSEPORT)
ok    classic BPF steers  800 of 800 datagrams reached the socket
no    eBPF steers         bpf(BPF_MAP_CREATE): Operation not permitted, CAP_BPF is missing
                          systemd unit: AmbientCapabilities=CAP_BPF
                          container: --cap-add BPF (for its root user; and its seccomp profile must
                            allow bpf)
warn  receive buffer      a burst of 256 fills it
                          sysctl -w net.core.rmem_max=8388608

Mode: cbpf. Connections keep their worker when addresses change; per-worker outcome counters need
eBPF."""


def report(**answers: bool | None) -> Report:
    """A report in which the named modes have these answers."""
    probes = tuple(Probe(mode, ok, "", mode=SteeringMode(mode)) for mode, ok in answers.items())
    return dataclasses.replace(REPORT, probes=probes)


def test_a_report_for_people_has_columns_and_fits_100() -> None:
    assert render(REPORT) == TEXT
    assert max(map(len, TEXT.splitlines())) <= 100


def test_colour_is_on_the_answer_and_nowhere_else() -> None:
    lines = render(REPORT, colour=True).splitlines()
    assert lines[0] == "\033[32mok\033[0m" + TEXT.splitlines()[0].removeprefix("ok")
    assert [line.count("\033[0m") for line in lines] == [1, 1, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0]


def test_a_long_command_stays_whole() -> None:
    command = "/" + "x" * 120
    probe = dataclasses.replace(REFUSED, remedy=f"file: setcap cap_bpf+ep {command} # caveat")
    text = render(dataclasses.replace(REPORT, probes=(probe,)))
    assert command in text


def test_what_could_not_be_told_is_a_question_mark() -> None:
    text = render(report(ebpf=None))
    assert text.startswith("?     ebpf")


def test_a_report_for_machines_has_these_keys() -> None:
    assert json.loads(json.dumps(REPORT.to_dict())) == {
        "version": "1.2.3",
        "kernel": "6.18.0",
        "mode": "cbpf",
        "probes": [
            {
                "name": probe.name,
                "mode": probe.mode,
                "ok": probe.ok,
                "warning": probe.warning,
                "detail": probe.detail,
                "remedy": probe.remedy,
            }
            for probe in REPORT.probes
        ],
    }


@pytest.mark.parametrize(("ebpf", "cbpf"), list(itertools.product([True, False, None], repeat=2)))
def test_the_status_says_whether_any_steering_works(ebpf: bool | None, cbpf: bool | None) -> None:
    wanted = 0 if True in (ebpf, cbpf) else 2 if None in (ebpf, cbpf) else 1
    assert exit_status(report(ebpf=ebpf, cbpf=cbpf, hash=True)) == wanted


@pytest.mark.parametrize(("answer", "status"), [(True, 0), (False, 1), (None, 2)])
def test_a_required_mode_alone_decides_the_status(answer: bool | None, status: int) -> None:
    for mode in (SteeringMode.EBPF, SteeringMode.CBPF, SteeringMode.HASH):
        answers = {str(other): True for other in SteeringMode if other is not SteeringMode.SINGLE}
        assert exit_status(report(**{**answers, str(mode): answer}), mode) == status
    assert exit_status(report(ebpf=answer), SteeringMode.SINGLE) == 0


@pytest.mark.parametrize(("address", "status"), [(True, 0), (False, 1), (None, 0)])
def test_an_address_that_cannot_be_had_is_a_failure(address: bool | None, status: int) -> None:
    probes = (*REPORT.probes, Probe("address 0.0.0.0:443", address, ""))
    assert exit_status(dataclasses.replace(REPORT, probes=probes)) == status


def test_other_systems_are_reported_and_fail() -> None:
    found = run_checks(system="darwin")
    assert found.mode is SteeringMode.SINGLE
    assert exit_status(found) == 1
    assert "no    operating system" in render(found)


@pytest.mark.parametrize(
    ("answers", "required", "end"),
    [
        ({"cbpf": True}, None, "need eBPF."),
        ({"cbpf": None}, None, "This could not be proven."),
        ({"ebpf": False}, SteeringMode.EBPF, "The required mode ebpf does not work here."),
        ({"ebpf": None}, SteeringMode.EBPF, "The required mode ebpf may or may not work here."),
    ],
)
def test_the_closing_sentence_says_what_is_missing(
    answers: dict[str, bool | None], required: SteeringMode | None, end: str
) -> None:
    assert summarize(report(**answers), required).endswith(end)


@pytest.mark.parametrize("seed", [None, "", "random"])
def test_a_random_hash_seed_is_nothing_to_tell(seed: str | None) -> None:
    assert probe_hash_seed({} if seed is None else {"PYTHONHASHSEED": seed}) == []


def test_memory_for_udp_is_shown_and_warned_of() -> None:
    [quiet] = explain_host(HostStats(3, 0, 0, 0), (10, 1000, 1500))
    assert quiet.detail == (
        "since boot 3 datagrams found no room in a receive buffer and 0 no memory; 10 of 1500 pages in use"
    )
    assert (quiet.ok, quiet.warning, quiet.remedy) == (True, False, "")
    [short] = explain_host(HostStats(0, 9, 0, 0), (900, 1000, 1500))
    assert short.warning
    assert "UDP uses 900 of 1500 pages" in short.detail
    assert "dropped 9 datagrams" in short.detail
    assert short.remedy == "sysctl -w net.ipv4.udp_mem='1000 2000 3000'"
    assert explain_host(None, (1, 2, 3)) == explain_host(HostStats(0, 0, 0, 0), None) == []


@pytest.mark.parametrize("seed", ["0", "42"])
def test_a_fixed_hash_seed_is_a_warning(seed: str) -> None:
    [probe] = probe_hash_seed({"PYTHONHASHSEED": seed})
    assert (probe.ok, probe.warning) == (True, True)
    assert probe.detail.startswith(f"PYTHONHASHSEED is {seed}: ")


def test_holders_are_named_once_per_address() -> None:
    nginx = [Holder("0.0.0.0", 33, inode, 7, "nginx") for inode in range(3)]
    hidden = Holder("::1", 1000, 9)
    text = "nginx (pid 7, uid 33) on 0.0.0.0:443 (3 sockets), a process of uid 1000 on [::1]:443"
    assert describe([*nginx, hidden], 443) == text
    crowd = [Holder("0.0.0.0", 0, pid, pid, "python") for pid in range(20)]
    assert describe(crowd, 443).endswith("python (pid 7, uid 0) on 0.0.0.0:443, 12 more")


def test_the_datagrams_of_a_proof_are_of_every_kind() -> None:
    rules = Rules(bytes(16), 8, listeners=4, slots=8)
    kinds = [decide(datagram, rules).outcome for datagram in make_datagrams([])]
    assert {outcome: kinds.count(outcome) for outcome in Outcome} == {
        Outcome.ROUTED: 0,
        Outcome.DISPATCHED: 60,
        Outcome.UNROUTABLE: 24,
        Outcome.MALFORMED: 16,
    }
    assert len(make_datagrams([bytes([n]) * 8 for n in range(20)])) == 200


@pytest.mark.parametrize(
    ("tally", "ok", "detail"),
    [
        (Tally(200, 200), True, "200 of 200 datagrams reached the socket their connection ID names, over IPv4; "),
        (Tally(200, 197), None, "197 of 200 datagrams reached the socket their connection ID names, over IPv4; 3 were"),
        (
            Tally(200, 150, 50),
            False,
            "150 of 200 datagrams reached the socket their connection ID names, over IPv4; 50",
        ),
        (Tally(200, 200, faults=["the sink counts 3 datagrams instead of 40"] * 2), False, "IPv4; the sink counts 3"),
    ],
    ids=["all", "lost", "wrong", "fault"],
)
def test_a_proof_tells_wrong_from_lost(tally: Tally, ok: bool | None, detail: str) -> None:
    probe = judge(SteeringMode.CBPF, ["IPv4"], tally)
    assert probe.ok is ok
    assert detail in probe.detail
    assert probe.detail.count("sink counts") <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["check", "--require", "auto"], "argument --require: invalid choice: 'auto'"),
        (["check", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["check", "--bind"], "argument --bind: expected one argument"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("address", ["443", "localhost", "[::1]", "::1:443", "127.0.0.1:70000", "127.0.0.1:443x"])
def test_a_wrong_address_is_one_line_on_stderr(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--bind", address]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("quicsteer: address ")
    assert address in line


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (QuicSteerError("two\nlines"), 2, "quicsteer: two lines\n"),
        (KernelError(errno.EPERM, "bind"), 2, "quicsteer: bind: Operation not permitted\n"),
        (ValueError("workers is 0"), 2, "quicsteer: workers is 0\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["package", "kernel", "value", "Ctrl-C"],
)
def test_an_error_has_one_line_and_a_status(
    error: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("fail", "", lambda _: None, fail),))
    assert main(["fail"]) == status
    assert capsys.readouterr().err == message


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise LookupError("a bug")

    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("fail", "", lambda _: None, fail),))
    with pytest.raises(LookupError):
        main(["fail"])


def run(script: str, stdout: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, text=True, stdout=stdout, stderr=subprocess.PIPE, cwd="/", check=False)


def test_a_demo_without_a_quic_stack_names_what_to_install() -> None:
    script = """if True:
        import importlib.util, sys
        from quicsteer.cli import main
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, package=None: None if name == "aioquic" else find(name, package)
        sys.exit(main(["demo"]))
    """
    ended = run(script)
    assert (ended.returncode, ended.stderr) == (
        2,
        "quicsteer: the demo needs aioquic: pip install 'quicsteer[aioquic]'\n",
    )


def test_a_check_loads_no_quic_stack() -> None:
    script = """if True:
        import sys
        from quicsteer.cli import main
        try:
            main(["check", "--help"])
        except SystemExit:
            sys.exit("aioquic" in sys.modules or "quicsteer.demo" in sys.modules)
    """
    assert run(script).returncode == 0


PRINT = """if True:
    import sys
    from quicsteer import cli
    cli.COMMANDS = (cli.Command("print", "", lambda _: None, lambda _: print("text") or 0),)
    sys.exit(cli.main(["print"]))
"""


def test_a_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen([sys.executable, "-c", PRINT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/")
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    with process:
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        ended = run(PRINT, stdout=full.fileno())
    assert ended.returncode == 2
    assert ended.stderr == "quicsteer: [Errno 28] No space left on device\n"


def test_the_version_is_told() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "quicsteer", "--version"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert ended.stdout.startswith("quicsteer 0.")
