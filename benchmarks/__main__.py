"""``python -m benchmarks``: arguments in, figures out."""

import argparse
import os
import sys
from pathlib import Path

from . import cost, groups, readout
from .lanes import Astray, make_load
from .report import Report, insert, read_report, render

_BATCHES = 128  # a run of some 25 ms
_QUICK_ROUNDS = 5
_ROUNDS_MIN = 2  # quartiles need two


def main() -> int:
    arguments = _parse()
    if arguments.command == "show":
        reports = [read_report(path) for path in arguments.files]
        if arguments.into:
            insert(reports, arguments.into)
        else:
            print("\n".join(render(report) for report in reports), end="")
        return 0
    try:
        report = _measure(arguments)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except Astray as error:
        print(f"no figures: {error}", file=sys.stderr)
        return 1
    print(render(report), end="")
    if arguments.json:
        arguments.json.write_text(report.to_json())
    return 0


def _measure(arguments: argparse.Namespace) -> Report:
    rounds = _QUICK_ROUNDS if arguments.quick else arguments.rounds
    if rounds < _ROUNDS_MIN or arguments.flows < 1:
        raise ValueError(f"rounds is {rounds} and flows {arguments.flows}, at least {_ROUNDS_MIN} and 1 are needed")
    if arguments.command == "readout":
        return readout.run(rounds)
    load = make_load(arguments.flows, arguments.size, arguments.cid_length, _BATCHES)
    if arguments.command == "cost":
        return cost.run(arguments.workers, load, rounds, arguments.seed, arguments.cpu)
    return groups.run(load, rounds, arguments.seed, arguments.cpu)


def _parse() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--rounds", type=int, default=31, help="at least 15 for figures to keep (default %(default)s)")
    common.add_argument(
        "--quick", action="store_true", help=f"{_QUICK_ROUNDS} rounds: whether it works, not what it costs"
    )
    common.add_argument("--flows", type=int, default=1000, help="rounded up to whole batches (default %(default)s)")
    common.add_argument("--size", type=int, default=64, help="bytes of a datagram (default %(default)s)")
    common.add_argument("--cid-length", type=int, default=8, help="bytes of our CIDs (default %(default)s)")
    common.add_argument("--seed", type=int, default=1, help="of the order of the variants (default %(default)s)")
    common.add_argument(
        "--cpu", type=int, default=max(os.sched_getaffinity(0)), help="where to run (default %(default)s)"
    )
    common.add_argument("--json", type=Path, metavar="FILE", help="write report and samples")
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what steering costs.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cost", parents=[common], help=cost.__doc__)
    command.add_argument("--workers", type=int, default=4, help="(default %(default)s)")
    commands.add_parser("groups", parents=[common], help=groups.__doc__)
    commands.add_parser("readout", parents=[common], help=readout.__doc__)
    show = commands.add_parser("show", help="print written reports as Markdown")
    show.add_argument("files", type=Path, nargs="+", metavar="FILE")
    show.add_argument("--into", type=Path, metavar="MARKDOWN", help="put them between the marks of this file instead")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
