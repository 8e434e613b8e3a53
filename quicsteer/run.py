"""``quicsteer run``: a group, its supervisor, and what a service needs around them.

Signals: SIGHUP reloads, SIGUSR2 replaces the supervisor itself, SIGTERM and SIGINT let the workers end (once more:
kill them), SIGUSR1 and SIGWINCH go on to the workers.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from . import upgrade
from .control import ControlServer, default_directory
from .counters import READ_INTERVAL
from .errors import QuicSteerError
from .exporter import exporting
from .group import SteeringGroup
from .member import State
from .modes import SteeringMode
from .notify import SERVICE_VARIABLES, ServiceManager
from .options import AUTO
from .prometheus import render
from .readout import ServiceReadout
from .supervisor import Limits, ReloadFailed, StartFailed, Supervisor
from .worker import Worker

START_FAILED = 3
"""Exit status when the workers cannot start."""

BANKS_DEFAULT = 2
FORWARDED = (signal.SIGUSR1, signal.SIGWINCH)

_logger = logging.getLogger("quicsteer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``quicsteer run``."""
    parser.description = (
        "Open a group of steered sockets and run COMMAND once per worker, each with its own sockets "
        "(quicsteer.Worker.inherited()). SIGHUP or 'quicsteer reload' replaces the workers without losing a "
        "connection. Exit status: 0 after an orderly end, 2 for a wrong argument or a taken address, 3 when the "
        "workers cannot start."
    )
    parser.set_defaults(descriptors=())
    parser.add_argument("--bind", action="append", required=True, metavar="HOST:PORT", help="may be repeated")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per CPU that may be used)")
    parser.add_argument("--user", help="run the workers as this user, without capabilities")
    parser.add_argument("--group", help="and with this group (default: the user's own)")
    add_service_arguments(parser)
    parser.add_argument("command_line", nargs="+", metavar="COMMAND", help="the program of a worker, behind '--'")


def add_service_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that any command has which runs a service."""
    parser.add_argument("--capacity", type=int, metavar="N", help="most workers after a reload (default: --workers)")
    parser.add_argument("--mode", choices=[AUTO, *map(str, SteeringMode)], default=AUTO, metavar="MODE")
    parser.add_argument(
        "--banks", type=int, default=BANKS_DEFAULT, metavar="N", help="generations that may live at once"
    )
    parser.add_argument("--cid-length", type=int, default=8, metavar="BYTES", help="8 to 20")
    parser.add_argument("--drop-invalid", action="store_true", help="drop in the kernel what no worker could serve")
    parser.add_argument("--receive-buffer", type=int, metavar="BYTES", help="per socket")
    parser.add_argument("--ready-timeout", type=_seconds, default=Limits.ready, metavar="SECONDS")
    parser.add_argument(
        "--mute-after",
        type=_seconds,
        default=Limits.mute,
        metavar="SECONDS",
        help="take a program for ready that did not take its worker over by then: it knows nothing of quicsteer",
    )
    parser.add_argument(
        "--drain-timeout",
        type=_seconds_or_forever,
        default=Limits.drain,
        metavar="SECONDS",
        help="how long connections of replaced workers may go on; 'forever' for as long as they like",
    )
    parser.add_argument("--hung-after", type=_seconds, default=Limits.hung, metavar="SECONDS")
    parser.add_argument("--kill-hung", action="store_true", help="kill workers that do not answer and let data wait")
    parser.add_argument("--control", type=Path, metavar="PATH", help="control socket")
    parser.add_argument("--metrics", metavar="HOST:PORT", help="serve Prometheus metrics at http://HOST:PORT/metrics")


def run(options: argparse.Namespace) -> int:
    """Run the service until it ends; returns the exit status."""
    logging.getLogger("quicsteer").setLevel(logging.INFO)
    if upgrade.is_check():
        return upgrade.check_state()
    return asyncio.run(_Service(options).run())


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _seconds_or_forever(text: str) -> float | None:
    return None if text == "forever" else _seconds(text)


class _Service:
    """One run: wires signals, control socket and service manager to the supervisor."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._manager = ServiceManager()
        self._gid = _group_id(options.group)
        self._tasks: set[asyncio.Task[None]] = set()
        self._state = upgrade.take_over()
        self._serving = False
        self._upgrading = False
        self._reload_error = ""

    async def run(self) -> int:
        options = self._options
        limits = Limits(
            ready=options.ready_timeout,
            mute=options.mute_after,
            drain=options.drain_timeout,
            hung=options.hung_after,
            kill_hung=options.kill_hung,
        )
        workers = self._count_workers()
        with self._open_group(workers) as group:
            if group.mode is SteeringMode.SINGLE:
                workers = 1  # whatever was hoped for
            self.supervisor = Supervisor(
                group, self._start_worker, workers=workers, limits=limits, on_change=self._report
            )
            if self._state:
                self._state.restore(self.supervisor)
            path = options.control or default_directory() / f"{group.addresses[0][1]}.sock"
            control = ControlServer(path, self._obey)
            await control.start()
            self._handle_signals()
            if self._state:
                _logger.info("upgraded: this program goes on with %d workers", len(self.supervisor.members))
            self._in_background(self._keep_watchdog_quiet())
            self._in_background(self._keep_counting())
            try:
                async with exporting(options.metrics, self._render_metrics, required=not self._state):
                    await self.supervisor.run()
            except StartFailed as error:
                _logger.error("the workers cannot start: %s", error)
                return START_FAILED
            finally:
                await control.close()
        return 0

    def _count_workers(self) -> int:
        options = self._options
        if options.workers is not None:
            return int(options.workers)
        if options.mode == SteeringMode.SINGLE:
            return 1
        return len(os.sched_getaffinity(0))

    def _open_group(self, workers: int) -> SteeringGroup:
        if self._state:
            return self._state.group()
        options = self._options
        group = SteeringGroup.open(
            options.bind,
            workers if options.capacity is None else options.capacity,
            split=True,
            banks=options.banks,
            mode=options.mode,
            cid_length=options.cid_length,
            drop_invalid=options.drop_invalid,
            receive_buffer=options.receive_buffer,
        )
        _logger.info("%r", group)
        return group

    def _start_worker(self, worker: Worker) -> int:
        # A worker is not the service: what it would say to the service manager is not true of all of them.
        environment = {name: value for name, value in os.environ.items() if name not in SERVICE_VARIABLES}
        options = self._options
        return worker.spawn(
            options.command_line,
            env=environment,
            user=options.user,
            group=self._gid,
            descriptors=options.descriptors,
            ignored_signals=(signal.SIGINT,),  # Ctrl-C reaches all processes; the supervisor ends its workers in order
        )

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: self._in_background(self._reload_quietly()))
        loop.add_signal_handler(signal.SIGUSR2, lambda: self._in_background(self._upgrade()))
        for number in FORWARDED:
            loop.add_signal_handler(number, self._forward, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, upgrade.BLOCKED)  # since an upgrade
        if os.getpid() == 1:
            loop.add_signal_handler(signal.SIGCHLD, self._reap_strangers)
            self._reap_strangers()

    def _stop(self) -> None:
        self._manager.stopping()
        self.supervisor.stop()

    def _forward(self, number: signal.Signals) -> None:
        for member in self.supervisor.members:
            member.kill(number)

    def _reap_strangers(self) -> None:
        """As PID 1, collect the orphans that the kernel gave to this process; members are seen to elsewhere."""
        ours = {member.pid for member in self.supervisor.members}
        while not self._upgrading:  # which waits for a process of its own
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in ours:
                return
            os.waitpid(ended.si_pid, 0)

    async def _reload_quietly(self) -> None:
        with contextlib.suppress(ReloadFailed):  # which is in the log
            await self._reload(None)

    async def _reload(self, workers: int | None) -> None:
        self._manager.reloading()
        try:
            await self.supervisor.reload(workers)
            self._reload_error = ""
        except ReloadFailed as error:
            self._reload_error = str(error)
            _logger.error("reload failed: %s", error)
            raise
        finally:
            self._manager.ready(self._status_line())

    async def _upgrade(self) -> None:
        if self._upgrading:
            return
        self._upgrading = True
        try:
            await upgrade.replace_process(self.supervisor, self._options.descriptors)
        except (QuicSteerError, OSError) as error:
            _logger.error("upgrade refused, this supervisor goes on: %s", error)
        finally:
            self._upgrading = False
            if os.getpid() == 1:
                self._reap_strangers()

    def _report(self) -> None:
        """Tell the service manager what has changed."""
        if os.getpid() == 1:
            self._reap_strangers()  # those behind a worker that was not collected until now
        line = self._status_line()
        if self._serving:
            self._manager.status(line)
        elif any(member.state is State.SERVING for member in self.supervisor.members):
            self._serving = True
            self._manager.ready(line)
            _logger.info("%s", line)

    def _status_line(self) -> str:
        members = self.supervisor.members
        serving = sum(member.state is State.SERVING for member in members)
        parts = [f"{serving} workers serve in mode {self.supervisor.group.mode}"]
        draining = sum(member.state is State.DRAINING for member in members)
        if draining:
            parts.append(f"{draining} drain")
        hung = sum(member.hung for member in members)
        if hung:
            parts.append(f"{hung} hung")
        if self.supervisor.reloading:
            parts.append(f"reload: {self.supervisor.reloading}")
        elif self._reload_error:
            parts.append(f"last reload failed: {self._reload_error}")
        return ", ".join(parts)

    async def _keep_watchdog_quiet(self) -> None:
        while self._manager.watchdog:
            self._manager.alive()
            await asyncio.sleep(self._manager.watchdog / 2)

    async def _obey(self, request: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Carry out a command of the control socket."""
        name = request["command"]
        if name == "status":
            yield {"ok": True, **self._describe()}
        elif name == "stats":
            yield {"ok": True, **(await self._read()).to_dict()}
        elif name == "reload":
            async for answer in self._obey_reload(request.get("workers")):
                yield answer
        elif name == "dispatch":
            weights = request.get("weights")
            if not isinstance(weights, dict):
                raise ValueError("dispatch takes weights by index")
            self.supervisor.dispatch({int(index): weight for index, weight in weights.items()})
            yield {"ok": True}
        else:
            yield {"ok": False, "error": f"command {name!r} is not known to this release"}

    async def _obey_reload(self, workers: int | None) -> AsyncIterator[dict[str, Any]]:
        work = self._in_background(self._reload(workers))
        work.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever asked may be gone
        said = ""
        while not work.done():
            if self.supervisor.reloading not in ("", said):
                said = self.supervisor.reloading
                yield {"progress": said}
            await asyncio.wait({work}, timeout=0.1)
        work.result()
        yield {"ok": True, **self._describe()}

    async def _read(self) -> ServiceReadout:
        supervisor = self.supervisor
        await supervisor.reports.refresh(supervisor.members)
        return ServiceReadout(self._describe(), supervisor.group.stats(), supervisor.reports.by_index())

    async def _render_metrics(self) -> str:
        return render((await self._read()).families())

    async def _keep_counting(self) -> None:
        """Read the group's 32-bit drop counters before they can go round."""
        while True:
            await asyncio.sleep(READ_INTERVAL)
            self.supervisor.group.stats()

    def _describe(self) -> dict[str, Any]:
        supervisor = self.supervisor
        return {
            "pid": os.getpid(),
            "mode": str(supervisor.group.mode),
            "addresses": [list(address) for address in supervisor.group.addresses],
            "bank": supervisor.bank,
            "reloading": supervisor.reloading,
            "reload_error": self._reload_error,
            "reloads": supervisor.reloads,
            "restarts": supervisor.restarts,
            "workers": [member.describe() for member in supervisor.members],
        }

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _group_id(name: str | None) -> int | None:
    if name is None:
        return None
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ValueError(f"group {name!r} is not known here") from error


def add_reload_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``quicsteer reload``."""
    parser.description = (
        "Replace the workers of a running 'quicsteer run' without losing a connection, and wait for it."
    )
    parser.add_argument("target", nargs="?", metavar="CONTROL", help="control socket (default: the only one here)")
    parser.add_argument("--workers", type=int, metavar="N", help="run so many workers from now on")


def reload(options: argparse.Namespace) -> int:
    """Ask a supervisor for a reload."""
    from .control import command, find_socket

    request = {"command": "reload", "workers": options.workers}
    answer = command(find_socket(options.target), request, lambda said: print(said["progress"], file=sys.stderr))
    serving = [worker for worker in answer["workers"] if worker["state"] == State.SERVING]
    print(f"reloaded: {len(serving)} workers serve")
    return 0


def add_dispatch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``quicsteer dispatch``."""
    parser.description = (
        "Share new connections out by weight (mode ebpf). Workers that are not named have weight 1; 0 drains a worker. "
        "Connections that exist stay where they are."
    )
    parser.add_argument("weights", nargs="*", metavar="INDEX=WEIGHT", help="none: share out evenly")
    parser.add_argument("--control", metavar="PATH", help="control socket (default: the only one here)")


def dispatch(options: argparse.Namespace) -> int:
    """Set the weights of a running supervisor's workers."""
    from .control import command, find_socket

    weights = {}
    for text in options.weights:
        index, equals, weight = text.partition("=")
        if not equals or not index.isdigit():
            raise ValueError(f"{text!r} is not INDEX=WEIGHT, as in 2=0")
        weights[index] = float(weight)
    command(find_socket(options.control), {"command": "dispatch", "weights": weights}, lambda _: None)
    return 0
