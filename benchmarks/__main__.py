"""``python -m benchmarks``: arguments in, figures out."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from quicsteer import ForeignConnectionIdWarning

from . import attacks, cost, floods, groups, growth, lifecycle, migration, readout, servers
from ._veth import over_veth
from .lanes import Astray, Plan, loopback, make_load
from .report import Report, insert, read_report, render

_BATCHES = 128  # a run of some 25 ms
_ROUNDS_MIN = 2  # quartiles need two

Progress = Callable[[str], None]


class _Benchmark(NamedTuple):
    """What a name on the command line does, and how many rounds it takes by default and with --quick."""

    run: Callable[[argparse.Namespace, int, Progress], Report]
    about: str | None
    rounds: int
    quick_rounds: int


def _plan(arguments: argparse.Namespace, rounds: int, progress: Progress) -> Plan:
    return Plan(rounds, arguments.seed, arguments.cpu, progress)


def _cost(arguments: argparse.Namespace, rounds: int, progress: Progress) -> Report:
    load = make_load(arguments.flows, arguments.size, _BATCHES)
    with loopback() as path:
        return cost.run(arguments.workers, load, path, _plan(arguments, rounds, progress))


def _cost_over_veth(arguments: argparse.Namespace, rounds: int, progress: Progress) -> Report:
    load = make_load(arguments.flows, arguments.size, _BATCHES)
    plan = _plan(arguments, rounds, progress)
    return over_veth(lambda path: cost.run(arguments.workers, load, path, plan, "cost-veth"))


def _growth(arguments: argparse.Namespace, rounds: int, progress: Progress) -> Report:
    with loopback() as path:
        return growth.run(path, _plan(arguments, rounds, progress), arguments.quick)


def _groups(arguments: argparse.Namespace, rounds: int, progress: Progress) -> Report:
    load = make_load(arguments.flows, arguments.size, _BATCHES)
    with loopback() as path:
        return groups.run(load, path, _plan(arguments, rounds, progress))


def _attacks(arguments: argparse.Namespace, _rounds: int, progress: Progress) -> Report:
    with loopback() as path:
        return attacks.run(path, arguments.seed, progress, arguments.quick)


BENCHMARKS = {
    "cost": _Benchmark(_cost, cost.__doc__, 41, 5),
    "cost-veth": _Benchmark(_cost_over_veth, "the same over a pair of veths, in network namespaces", 41, 5),
    "growth": _Benchmark(_growth, growth.__doc__, 21, 2),
    "migration": _Benchmark(
        lambda arguments, _, progress: migration.run(progress, arguments.quick), migration.__doc__, 1, 1
    ),
    "attacks": _Benchmark(_attacks, attacks.__doc__, 1, 1),
    "floods": _Benchmark(
        lambda arguments, rounds, progress: floods.run(rounds, 0.5 if arguments.quick else 2.0, progress),
        floods.__doc__,
        9,
        1,
    ),
    "lifecycle": _Benchmark(lambda _, rounds, progress: lifecycle.run(rounds, progress), lifecycle.__doc__, 5, 1),
    "servers": _Benchmark(
        lambda arguments, rounds, progress: servers.run(rounds, 0.3 if arguments.quick else 2.0, progress),
        servers.__doc__,
        9,
        2,
    ),
    "groups": _Benchmark(_groups, groups.__doc__, 31, 3),
    "readout": _Benchmark(lambda _, rounds, progress: readout.run(rounds, progress), readout.__doc__, 31, 2),
}
"""In the order of docs/benchmarks.md."""


def main() -> int:
    arguments = _parse()
    if arguments.command == "show":
        return _show(arguments)
    if arguments.command == "plot":
        from .plots import plot  # only this needs matplotlib

        for path in plot([read_report(path) for path in arguments.files], arguments.into):
            print(path)
        return 0
    logging.getLogger("quicsteer").setLevel(logging.ERROR)
    warnings.simplefilter("ignore", ForeignConnectionIdWarning)  # junk is what some groups shall get
    try:
        met = [_report(report, arguments.json) for report in _measure(arguments)]
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except Astray as error:
        print(f"no figures: {error}", file=sys.stderr)
        return 1
    return 0 if all(met) or arguments.quick else 3


def _measure(arguments: argparse.Namespace) -> Iterator[Report]:
    names = list(BENCHMARKS) if arguments.command == "all" else [arguments.command]
    for name in names:
        benchmark = BENCHMARKS[name]
        rounds = arguments.rounds or (benchmark.quick_rounds if arguments.quick else benchmark.rounds)
        if rounds < _ROUNDS_MIN and benchmark.rounds >= _ROUNDS_MIN and arguments.rounds:
            raise ValueError(f"rounds is {rounds}, at least {_ROUNDS_MIN} are needed")
        if arguments.flows < 1:
            raise ValueError(f"flows is {arguments.flows}, at least 1 is needed")
        try:
            yield benchmark.run(arguments, rounds, _Line(name))
        except PermissionError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
        print("", end="\r\033[K" if sys.stderr.isatty() else "", file=sys.stderr)


class _Line:
    """Progress: one line that is written anew on a terminal, or the name of each benchmark once."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = sys.stderr.isatty()
        if not self._terminal:
            print(f"{name} ...", file=sys.stderr, flush=True)

    def __call__(self, text: str) -> None:
        if self._terminal:
            print(f"\r\033[K{self._name}: {text}", end="", file=sys.stderr, flush=True)


def _report(report: Report, directory: Path | None) -> bool:
    print(render(report))
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{report.benchmark}.json").write_text(report.to_json())
    return all(bar.met for bar in report.bars)


def _show(arguments: argparse.Namespace) -> int:
    reports = [read_report(path) for path in arguments.files]
    if arguments.into:
        insert(reports, arguments.into)
    else:
        print("\n".join(render(report) for report in reports), end="")
    return 0


def _parse() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=int, help="at least 15 for figures to keep (default: each benchmark's own)")
    common.add_argument("--quick", action="store_true", help="whether it works, not what it costs: all in two minutes")
    common.add_argument("--workers", type=int, default=4, help="of cost (default %(default)s)")
    common.add_argument(
        "--flows", type=int, default=1000, help="of cost and groups, in whole batches (default %(default)s)"
    )
    common.add_argument("--size", type=int, default=64, help="bytes of a datagram of theirs (default %(default)s)")
    common.add_argument("--seed", type=int, default=1, help="of the order of the variants (default %(default)s)")
    common.add_argument(
        "--cpu", type=int, default=max(os.sched_getaffinity(0)), help="where lanes are measured (default %(default)s)"
    )
    common.add_argument("--json", type=Path, metavar="DIRECTORY", help="write reports and samples into it")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure what steering costs and what it is good for. docs/benchmarks.md says how to read it.",
        epilog="Exit status: 0; 1 datagrams went astray; 2 bad arguments; 3 a bar was missed (not with --quick).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("all", parents=[common], help="all of them, one after the other")
    for name, benchmark in BENCHMARKS.items():
        about = (benchmark.about or "").partition("\n")[0].partition(": ")
        commands.add_parser(name, parents=[common], help=about[2] or about[0], description=benchmark.about)
    show = commands.add_parser("show", help="print written reports as Markdown")
    show.add_argument("files", type=Path, nargs="+", metavar="FILE")
    show.add_argument("--into", type=Path, metavar="MARKDOWN", help="put them between the marks of this file instead")
    draw = commands.add_parser("plot", help="draw written reports as SVG; needs matplotlib")
    draw.add_argument("files", type=Path, nargs="+", metavar="FILE")
    draw.add_argument("--into", type=Path, metavar="DIRECTORY", default=Path(), help="where to put the pictures")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
