"""``quicsteer stats``: what the kernel did with the datagrams of a service, or of any process on this host."""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import ports
from .addresses import resolve
from .check import describe
from .control import command, default_directory, find_socket, prepare_directory
from .errors import QuicSteerError
from .prometheus import render
from .readout import SCHEMA, Readout, ServiceReadout, SocketsReadout
from .sockdiag import read_port, read_process
from .tables import WIDTH, Style, service_body, service_header, sockets_body, sockets_header, wrap

DROPPED = 1
"""Exit status of ``--fail-on-drops`` when something was dropped."""

INTERVAL = 1.0
_INTERVAL_MIN = 0.1
_WILDCARDS = ("0.0.0.0", "::")
_PID = "pid:"
_COUNTER_MODULUS = 2**32
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

Source = Callable[[], Readout]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``quicsteer stats``."""
    parser.description = (
        "Show what the kernel did with the datagrams of a running 'quicsteer run', or those of any process on this "
        "host. Exit status: 0, or 1 with --fail-on-drops when datagrams were dropped since the last look; 2 when there "
        "is nothing to show."
    )
    parser.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="a control socket, pid:N, or HOST:PORT of any process (*:PORT for all hosts); default: the only service",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON; with --watch one object per line")
    form.add_argument("--prometheus", action="store_true", help="in Prometheus' text format")
    parser.add_argument(
        "--watch", nargs="?", const=str(INTERVAL), metavar="SECONDS", help="keep a view up to date (default: every 1 s)"
    )
    parser.add_argument(
        "--why",
        type=float,
        metavar="SECONDS",
        help="count for so long why the kernel drops datagrams at the target's ports (CAP_BPF and CAP_PERFMON)",
    )
    parser.add_argument(
        "--fail-on-drops",
        action="store_true",
        help="exit status 1 when datagrams were dropped since this was last asked of the target",
    )


def run(options: argparse.Namespace) -> int:
    """Show the figures; returns the exit status."""
    interval, target = _read_watch(options.watch, options.target)
    if interval is not None and (options.prometheus or options.fail_on_drops):
        raise ValueError("--watch goes on for ever: it does not go with --prometheus and --fail-on-drops")
    if options.why is not None:
        if interval is not None or options.prometheus or options.fail_on_drops:
            raise ValueError("--why goes with --json only")
        return _explain(find_source(target)(), options.why, options.json)
    source = find_source(target)
    if interval is not None:
        return _watch(source, interval, options.json)
    readout = source()
    if options.json:
        print(json.dumps(readout.to_dict(), indent=2))
    elif options.prometheus:
        print(render(readout.families()), end="")
    else:
        print("\n".join(render_text(readout, _style())))
    if not options.fail_on_drops:
        return 0
    return DROPPED if dropped_since_last_look(readout, target or str(find_socket(None))) else 0


def _read_watch(watch: str | None, target: str | None) -> tuple[float | None, str | None]:
    """Return interval and target; what stands behind ``--watch`` may be either."""
    if watch is None:
        return None, target
    try:
        interval = float(watch)
    except ValueError:
        if target is not None:
            raise ValueError(f"--watch {watch!r} is not a number of seconds") from None
        return INTERVAL, watch
    if not _INTERVAL_MIN <= interval < float("inf"):
        raise ValueError(f"--watch {watch} is too short: at least {_INTERVAL_MIN} seconds")
    return interval, target


def _watch(source: Source, interval: float, as_json: bool) -> int:
    from .live import follow, watch

    if not as_json and sys.stdout.isatty():
        watch(source, interval, _style())
        return 0
    for readout in follow(source, interval):
        text = json.dumps(readout.to_dict()) if as_json else "\n".join([*render_text(readout, _style()), ""])
        print(text, flush=True)
    return 0


def _explain(readout: Readout, seconds: float, as_json: bool) -> int:
    """Count for a while why datagrams are dropped, or until Ctrl-C."""
    from .dropreasons import MEANINGS, counting

    if not 0 < seconds < float("inf"):
        raise ValueError(f"--why {seconds} is not a number of seconds")
    start = time.monotonic()
    with counting(readout.ports) as reasons:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(seconds)
        counts = reasons.read()
    spent = time.monotonic() - start
    if as_json:
        print(json.dumps({"schema": SCHEMA, "seconds": spent, "reasons": counts}, indent=2))
        return 0
    print(f"{readout.title}: {sum(counts.values()):,} datagrams dropped in {spent:.1f} s")
    for name, count in counts.items():
        print(f"{count:13,}  {name:<24} {MEANINGS.get(name, '')}".rstrip())
    return 0


def _style() -> Style:
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return Style(colour, "utf" in (sys.stdout.encoding or "").lower())


def render_text(readout: Readout, style: Style, width: int = WIDTH) -> list[str]:
    """Return a readout for people, as lines."""
    if isinstance(readout, ServiceReadout):
        lines = [*service_header(readout, None, style), *service_body(readout, None, width, style)]
    else:
        lines = [*sockets_header(readout, style), *sockets_body(readout, None, width, style)]
    advice = wrap(readout.advice(), width, style)
    return [line.rstrip() for line in [*lines, *([""] if advice else []), *advice]]


def find_source(target: str | None) -> Source:
    """Return what reads a target.

    Raises:
        QuicSteerError: there is no such service, or there are several.
        ValueError: the target means nothing.
    """
    if target is not None and target.startswith(_PID):
        return _process_source(target)
    if target is None or "/" in target or Path(target).is_socket():
        path = find_socket(target)
        return lambda: _read_service(path)
    return _port_source(target)


def _read_service(path: Path) -> ServiceReadout:
    answer = command(path, {"command": "stats"}, lambda _: None)
    if "schema" not in answer:
        raise QuicSteerError(f"the supervisor at {path} is of an older release: reload it with SIGUSR2")
    return ServiceReadout.from_dict(answer, _find_strangers(answer["supervisor"]))


def _find_strangers(supervisor: Mapping[str, Any]) -> list[str]:
    """Return who else has sockets on the ports of a service; nobody where /proc does not show which are its own."""
    ours = ports.open_sockets(supervisor["pid"])
    texts = []
    for port in dict.fromkeys(port for _, port in supervisor["addresses"]):
        others = ports.holders(port, besides=ours) if ours else []
        if others:
            texts.append(describe(others, port))
    return texts


def _process_source(target: str) -> Source:
    text = target.removeprefix(_PID)
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"target {target!r} is not pid:N")
    pid = int(text)
    path = ports.find_control_socket(pid)
    if path:
        return lambda: _read_service(path)

    def read() -> Readout:
        if not Path(f"/proc/{pid}").exists():
            raise QuicSteerError(f"there is no process {pid}")
        return SocketsReadout(target, time.monotonic(), read_process(pid))

    return read


def _port_source(target: str) -> Source:
    addresses = [
        address.sockaddr[:2] for address in resolve(target.replace("*:", ":", 1) if target[:2] == "*:" else target)
    ]
    hosts = {host for host, _ in addresses}
    port = addresses[0][1]
    everything = target.startswith(("*:", ":")) or bool(hosts.intersection(_WILDCARDS))
    wanted = hosts.union(_WILDCARDS)

    def read() -> Readout:
        found = [sock for sock in read_port(port) if everything or sock.address[0] in wanted]
        if not found:
            raise QuicSteerError(f"no UDP socket of this network namespace is bound to {target}")
        return SocketsReadout(target, time.monotonic(), found)

    return read


def dropped_since_last_look(readout: Readout, target: str) -> int:
    """Return how many datagrams were dropped since the last call for a target, by this user; remember this one.

    The first look at a target counts from the start of its counters.
    """
    import tempfile  # slow to load

    directory = default_directory()
    prepare_directory(directory)
    path = directory / f"drops-{hashlib.sha256(target.encode()).hexdigest()[:16]}.json"
    state = {"target": target, "run": _run_of(readout), "drops": readout.drops}
    before: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        saved = json.loads(path.read_text())
        if saved["run"] == state["run"]:
            before = dict(saved["drops"])
    with tempfile.NamedTemporaryFile("w", dir=directory, delete=False) as file:
        json.dump(state, file)
    os.replace(file.name, path)
    return sum(_growth(count, before.get(key, 0), readout) for key, count in readout.drops.items())


def _growth(count: int, before: int, readout: Readout) -> int:
    if isinstance(readout, SocketsReadout):
        return (count - before) % _COUNTER_MODULUS
    return count - before if count >= before else count


def _run_of(readout: Readout) -> str:
    """Name what the counters belong to: after a restart they begin anew."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"{boot} {readout.identity}"
