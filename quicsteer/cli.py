"""The command line: arguments in, text out. It decides nothing.

What was asked for goes to stdout, everything else to stderr. Exit statuses are the commands' own; 2 is also a wrong
argument or a refused call, 130 Ctrl-C, 141 a reader of stdout that went away.
"""

import argparse
import importlib
import importlib.util
import json
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from .check import Report, exit_status, run_checks
from .errors import ForeignConnectionIdWarning, QuicSteerError, ReceiveBufferWarning, SteeringFallbackWarning
from .modes import SteeringMode
from .triage import Probe
from .version import package_version

FAILED = 2

_WIDTH = 100
_COLOURS = {"ok": "32", "no": "31", "warn": "33", "?": "33"}  # SGR parameters of ECMA-48
_STATUS_WIDTH = max(map(len, _COLOURS)) + 2

_MEANINGS = {
    SteeringMode.EBPF: "Connections keep their worker when addresses change, and every outcome is counted.",
    SteeringMode.CBPF: ("Connections keep their worker when addresses change; per-worker outcome counters need eBPF."),
    SteeringMode.HASH: "Workers share a port, but a connection breaks when its client's address changes.",
    SteeringMode.SINGLE: "One socket and one worker per address.",
}


class Command(NamedTuple):
    """A subcommand. Its arguments are added when it is chosen, so no command loads what another one needs."""

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    raw: bool = False
    """Whether the command reads its arguments itself: they are ``options.arguments`` then."""


class _CommandParser(argparse.ArgumentParser):
    def __init__(self, *, command: Command | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._command and self._command.raw:
            return argparse.Namespace(arguments=list(args), command=self._command), []
        if self._command:
            self._command.add_arguments(self)
            self._command = None
        return super().parse_known_args(args, namespace)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    logging.basicConfig(format="quicsteer: %(message)s")
    try:
        with warnings.catch_warnings():
            for said_by_the_log in (SteeringFallbackWarning, ReceiveBufferWarning, ForeignConnectionIdWarning):
                warnings.simplefilter("ignore", said_by_the_log)
            options = _parser().parse_args(arguments)
            status: int = options.command.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        _discard_output()
        return 128 + signal.SIGPIPE
    except (QuicSteerError, ValueError) as error:
        return _fail(error)
    except OSError as error:  # such as a full disk behind stdout
        _discard_output()
        return _fail(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _fail(error: Exception) -> int:
    print(f"quicsteer: {' '.join(str(error).split())}", file=sys.stderr)
    return FAILED


def _discard_output() -> None:
    """Let stdout go nowhere: the interpreter flushes it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quicsteer", description="Kernel-level UDP datagram steering by connection ID for Python QUIC servers."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_CommandParser)
    for command in COMMANDS:
        added = commands.add_parser(command.name, help=command.help, command=command)
        added.set_defaults(command=command)
    return parser


class _Version(argparse.Action):
    """Prints the version, which is only looked up then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"quicsteer {package_version()}")
        parser.exit()


def _add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Try which modes this host allows, and prove each one that steers with datagrams over loopback. Exit status: "
        "0 when steering by connection ID (or the required mode) works here, 1 when not, 2 when it could not be told."
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--require", choices=[str(mode) for mode in SteeringMode], metavar="MODE", help="ebpf, cbpf, hash or single"
    )
    parser.add_argument(
        "--bind",
        action="append",
        metavar="HOST:PORT",
        help="see whether an address is free, and who has it; may be repeated; exit status 1 when it is taken",
    )


def _check(options: argparse.Namespace) -> int:
    required = SteeringMode(options.require) if options.require else None
    report = run_checks(options.bind)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(render(report, required, colour=_wants_colour()))
    return exit_status(report, required)


def _wants_colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def render(report: Report, required: SteeringMode | None = None, *, colour: bool = False) -> str:
    """Return a report for people, in lines of at most 100 columns."""
    margin = _STATUS_WIDTH + max(len(probe.name) for probe in report.probes) + 2
    lines = [line for probe in report.probes for line in _render_probe(probe, margin, colour)]
    return "\n".join([*lines, "", *textwrap.wrap(summarize(report, required), _WIDTH)])


def _render_probe(probe: Probe, margin: int, colour: bool) -> Iterator[str]:
    status = status_word(probe)
    start = f"{status:<{_STATUS_WIDTH}}{probe.name}".ljust(margin)
    first, *rest = _wrap(probe.detail, start, margin)
    yield f"\033[{_COLOURS[status]}m{status}\033[0m{first[len(status) :]}" if colour else first
    yield from rest
    for remedy in probe.remedy.splitlines():
        yield from _wrap(remedy, " " * margin, margin + 2)


def _wrap(text: str, start: str, indent: int) -> list[str]:
    """Break a text after ``start``; words stay whole, so that what is to be pasted can be."""
    lines = textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=start,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [start.rstrip()]


def status_word(probe: Probe) -> str:
    """Return the answer of a probe as one word."""
    if probe.ok is None:
        return "?"
    if not probe.ok:
        return "no"
    return "warn" if probe.warning else "ok"


def summarize(report: Report, required: SteeringMode | None = None) -> str:
    """Return the closing sentence."""
    text = f"Mode: {report.mode}. {_MEANINGS[report.mode]}"
    found = report.probe(report.mode)
    if found and found.ok is None:
        text += " This could not be proven."
    probe = report.probe(required) if required else None
    if probe and not probe.ok:
        verdict = "may or may not work here" if probe.ok is None else "does not work here"
        text += f" The required mode {required} {verdict}."
    return text


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show with QUIC servers and clients over loopback what steering is worth."
    _demo().add_arguments(parser)


def _run_demo(options: argparse.Namespace) -> int:
    status: int = _demo().run(options)
    return status


def _demo() -> ModuleType:
    """Import the demo, which needs a QUIC stack."""
    if importlib.util.find_spec("aioquic") is None:
        raise QuicSteerError("the demo needs aioquic: pip install 'quicsteer[aioquic]'")
    return importlib.import_module(f"{__package__}.demo")


def _late(module: str, function: str) -> Callable[..., Any]:
    """Return a function of a module that is only loaded when it is called."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__package__}.{module}"), function)(*arguments)

    return call


COMMANDS = (
    Command("check", "tell how this host can steer, and prove it", _add_check_arguments, _check),
    Command("demo", "show with QUIC over loopback what steering is worth", _add_demo_arguments, _run_demo),
    Command("run", "run a server as steered workers", _late("run", "add_arguments"), _late("run", "run")),
    Command("stats", "show what the kernel did with datagrams", _late("stats", "add_arguments"), _late("stats", "run")),
    Command(
        "hypercorn",
        "serve an ASGI application over HTTP/1.1, HTTP/2 and HTTP/3",
        lambda parser: None,
        _late("hypercorn", "run_command"),
        raw=True,
    ),
    Command(
        "reload",
        "replace the workers of a running service without losing a connection",
        _late("run", "add_reload_arguments"),
        _late("run", "reload"),
    ),
    Command(
        "dispatch",
        "share new connections out by weight",
        _late("run", "add_dispatch_arguments"),
        _late("run", "dispatch"),
    ),
)
