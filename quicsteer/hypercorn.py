"""``quicsteer hypercorn``: an ASGI application over HTTP/1.1, HTTP/2 and HTTP/3, by steered workers of hypercorn.

The command line is hypercorn's with a few options of ``quicsteer run`` besides. TCP listeners are made once and shared
by all workers, as hypercorn does; UDP goes by connection ID. Each worker process is this module again, started by the
supervisor. TCP, TLS, HTTP/1.1, HTTP/2, lifespan and logs are hypercorn's own ``worker_serve``; HTTP/3 is hypercorn's,
too, on ``quicsteer.aioquic``.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from . import run, upgrade
from ._aioquic import QuicConfiguration
from ._hypercorn import (
    AppWrapper,
    Config,
    Http3Connections,
    Http3Protocol,
    Sockets,
    WorkerContext,
    check_for_updates,
    files_to_watch,
    load_application,
    parse_arguments,
    worker_serve,
    write_pid_file,
)
from .aioquic import SteeredQuicServer
from .errors import QuicSteerError
from .tickets import SessionTickets
from .worker import Worker

ALPN = ["h3"]
RETRY_ABOVE = 50
"""Open handshakes of a worker above which clients must prove their address."""

TCP_GRACE = 1.0
"""Seconds in which a TCP connection that was accepted last can send its first request before it counts as idle."""

WORKER_VARIABLE = "QUICSTEER_WORKER"
"""Environment variable that tells an application the number of its worker."""

_LISTENERS = "QUICSTEER_TCP"
"""Environment variable with the TCP listeners of the service: a JSON list of kind, bind and descriptor."""

_WATCH_INTERVAL = 1.0
_PORTS_TRIED = 100
_FOREVER = 10 * 365 * 24 * 3600.0
_LOOPS = ("asyncio", "uvloop")

_logger = logging.getLogger("quicsteer")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``quicsteer hypercorn``, or be one of its workers; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    worker = Worker.inherited()  # at once: the supervisor waits to hear of it
    if worker is None:
        return serve(arguments)
    with worker:
        return _work(worker, arguments)


def run_command(options: argparse.Namespace) -> int:
    """Run ``quicsteer hypercorn`` from the command line of this package."""
    return serve(options.arguments)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of what is not hypercorn's."""
    parser = argparse.ArgumentParser(
        prog="quicsteer hypercorn",
        description=(
            "Serve an ASGI application over HTTP/1.1, HTTP/2 and HTTP/3 by steered workers. All options of hypercorn "
            "are taken as they are; --quic-bind is where --bind is unless told. Reload with SIGHUP or 'quicsteer "
            "reload'. These options are quicsteer's:"
        ),
        usage="quicsteer hypercorn [options] [options of hypercorn] application",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help and exit")
    parser.add_argument(
        "--retry-above",
        type=int,
        default=RETRY_ABOVE,
        metavar="N",
        help="clients must prove their address while a worker has more open handshakes (default: 50)",
    )
    parser.add_argument("--no-session-tickets", action="store_true", help="no TLS resumption and no 0-RTT over QUIC")
    parser.add_argument("--worker-user", metavar="USER", help="run the workers as this user, without capabilities")
    parser.add_argument("--worker-group", metavar="GROUP", help="and with this group (default: the user's own)")
    run.add_service_arguments(parser)
    return parser


def serve(arguments: Sequence[str]) -> int:
    """Be the supervisor of the service until it ends."""
    parser = make_parser()
    options, theirs = parser.parse_known_args(arguments)
    if options.help or not theirs:
        parser.print_help()
        print("\nThese are hypercorn's:\n", flush=True)
        theirs = ["--help"]
    config = _read_config(theirs)
    options.user, options.group = options.worker_user, options.worker_group
    options.workers = config.workers
    options.command_line = [sys.executable, "-m", __name__, *arguments]
    if upgrade.is_check():
        return run.run(options)
    listeners = _open_listeners(config)
    options.bind = _quic_addresses(config, listeners)
    options.descriptors = tuple(sock.fileno() for _, _, sock in listeners)
    os.environ[_LISTENERS] = json.dumps([(kind, bind, sock.fileno()) for kind, bind, sock in listeners])
    if config.pid_path is not None:
        write_pid_file(config.pid_path)
    try:
        return run.run(options)
    finally:
        for _, _, sock in listeners:
            sock.close()


def _read_config(arguments: Sequence[str]) -> Config:
    """Return hypercorn's configuration from its own command line.

    Raises:
        ValueError: it asks for what cannot be served so.
    """
    config = parse_arguments(arguments)
    if config.worker_class not in _LOOPS:
        raise ValueError(f"--worker-class is {config.worker_class!r}: workers can be steered on asyncio and uvloop")
    if config.workers < 1:
        raise ValueError(f"--workers is {config.workers}, it must be 1 or more")
    if not config.ssl_enabled:
        raise ValueError("HTTP/3 needs a certificate: name it with --certfile and --keyfile")
    if any(bind.startswith(("fd://", "unix:")) for bind in config.quic_bind):
        raise ValueError("--quic-bind names a host and a port: a group opens its UDP sockets itself")
    return config


Listener = tuple[str, str, socket.socket]
"""``"secure"`` or ``"insecure"``, what the configuration calls it, and the socket."""


def _open_listeners(config: Config) -> list[Listener]:
    """Return the TCP listeners: those of the program before this one in the same process, and new ones."""
    kept = [(kind, bind, number) for kind, bind, number in json.loads(os.environ.pop(_LISTENERS, "[]"))]
    listeners: list[Listener] = []
    for kind, binds in (("secure", config.bind), ("insecure", config.insecure_bind)):
        for bind in binds:
            match = next((entry for entry in kept if entry[:2] == (kind, bind)), None)
            if match:
                kept.remove(match)
                sock = socket.socket(fileno=match[2])
            else:
                sock = _open_listener(config, bind)
            sock.set_inheritable(False)
            listeners.append((kind, bind, sock))
    for _, _, number in kept:
        os.close(number)
    return listeners


def _open_listener(config: Config, bind: str) -> socket.socket:
    """Open a TCP or Unix listener as hypercorn does, of whatever kind; a free port (0) is free for UDP too."""
    single = Config.from_mapping({**vars(config), "bind": [bind], "insecure_bind": [], "quic_bind": []})
    for _ in range(_PORTS_TRIED):
        [sock] = single.create_sockets().secure_sockets
        if not bind.endswith(":0") or _is_free_for_udp(sock):
            break
        sock.close()
    return sock


def _is_free_for_udp(listener: socket.socket) -> bool:
    with socket.socket(listener.family, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(listener.getsockname())
        except OSError:
            return False
    return True


def _quic_addresses(config: Config, listeners: Sequence[Listener]) -> list[str]:
    """Return where HTTP/3 is served: as ``--quic-bind`` says, or on the addresses of the TLS listeners."""
    if config.quic_bind:
        return [_with_port(bind) for bind in config.quic_bind]
    inet = [sock for kind, _, sock in listeners if kind == "secure" and sock.family != socket.AF_UNIX]
    if not inet:
        raise ValueError("no --bind has a host and a port: say with --quic-bind where HTTP/3 is to be served")
    return [_format(*sock.getsockname()[:2]) for sock in inet]


def _with_port(bind: str) -> str:
    """Read an address as hypercorn does: brackets may be missing, and the port, which is 8000 then."""
    bare = bind.replace("[", "").replace("]", "")
    host, _, port = bare.rpartition(":")
    whole = bind.endswith("]") or not host or not port.isdigit()
    return _format(bare, 8000) if whole else _format(host, int(port))


def _format(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _work(worker: Worker, arguments: Sequence[str]) -> int:
    """Be a worker until the supervisor ends it."""
    options, theirs = make_parser().parse_known_args(arguments)
    config = _read_config(theirs)
    sockets = _adopt_listeners(worker)
    if not config.alt_svc_headers:
        ports = dict.fromkeys(port for _, port in worker.addresses)
        config.alt_svc_headers = [f'{protocol}=":{port}"; ma=3600' for protocol in ALPN for port in ports]
    os.environ[WORKER_VARIABLE] = str(worker.index)
    app = load_application(config.application_path, config.wsgi_max_body_size)
    servers: list[asyncio.Server] = []
    with asyncio.Runner(debug=config.debug, loop_factory=_loop_factory(config, servers)) as runner:
        runner.run(_HypercornWorker(worker, config, app, options, servers).run(sockets))
    return 0


def _loop_factory(config: Config, servers: list[asyncio.Server]) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return a factory for the event loop of a worker, which keeps the TCP servers that are made on it.

    hypercorn ends idle connections before it stops to accept others; so who accepts last must be told first.
    """
    base: Any = asyncio.SelectorEventLoop
    if config.worker_class == "uvloop":
        try:
            import uvloop
        except ImportError as error:
            raise QuicSteerError("--worker-class uvloop: pip install uvloop") from error
        base = uvloop.Loop

    class Loop(base):  # type: ignore[misc]
        async def create_server(self, *arguments: Any, **options: Any) -> asyncio.Server:
            server: asyncio.Server = await super().create_server(*arguments, **options)
            servers.append(server)
            return server

    return Loop


def _stop_accepting(servers: Sequence[asyncio.Server]) -> None:
    """Close TCP servers without a loss of connections that they have accepted.

    asyncio begins to serve a connection one turn of its loop after it accepted it, and drops it if the server is closed
    by then. So nothing is accepted any more in this turn, and the servers are closed in the next.
    """
    loop = asyncio.get_running_loop()
    for server in servers:
        if isinstance(loop, asyncio.SelectorEventLoop):
            for sock in server.sockets:
                loop.remove_reader(sock)
        loop.call_soon(server.close)


def _adopt_listeners(worker: Worker) -> Sockets:
    """Return the TCP listeners that the supervisor passed to this worker."""
    listeners = json.loads(os.environ.pop(_LISTENERS, "[]"))
    if len(listeners) != len(worker.descriptors):
        raise QuicSteerError("this worker was not started by 'quicsteer hypercorn', which shares the TCP listeners out")
    found: dict[str, list[socket.socket]] = {"secure": [], "insecure": []}
    for (kind, _, _), descriptor in zip(listeners, worker.descriptors, strict=True):
        found[kind].append(socket.socket(fileno=descriptor))
    return Sockets(found["secure"], found["insecure"], [])


def _quic_configuration(config: Config, worker: Worker) -> QuicConfiguration:
    quic = QuicConfiguration(is_client=False, alpn_protocols=ALPN, connection_id_length=worker.connection_ids.length)
    quic.load_cert_chain(str(config.certfile), config.keyfile, config.keyfile_password)
    return quic


class _Server(SteeredQuicServer):
    """The HTTP/3 side of a worker, which takes the TCP side along when it is told to end."""

    def __init__(self, worker: Worker, http: "_HypercornWorker", **arguments: Any) -> None:
        super().__init__(worker, **arguments)
        self._http = http
        self._draining = False
        self.left = asyncio.Event()
        """Set when there is nothing left to do."""

    def stop_listening(self) -> None:
        """Take no new connections, over TCP neither."""
        super().stop_listening()
        self._http.stop_accepting()

    async def drain(self, timeout: float | None) -> None:
        """Ask clients to go elsewhere, serve what is left of HTTP/3 and of TCP, and let the application end."""
        if not self._draining:
            self._draining = True
            self._http.end(_FOREVER if timeout is None else timeout)
            await super().drain(timeout)
        await self._http.ended.wait()
        self.left.set()

    def end(self, timeout: float) -> None:
        """Drain without being told to by a supervisor; the second time, close."""
        if self._draining:
            self.close()
            return
        self.stop_listening()
        self._end = asyncio.get_running_loop().create_task(self.drain(timeout))


class _HypercornWorker:
    """One worker: hypercorn's own server for TCP, ours for HTTP/3, one application.

    HTTP/3 starts when hypercorn has started up, and the application's shutdown waits until HTTP/3 is over.
    """

    def __init__(
        self,
        worker: Worker,
        config: Config,
        app: AppWrapper,
        options: argparse.Namespace,
        servers: list[asyncio.Server],
    ) -> None:
        self._servers = servers
        self._worker = worker
        self._config = config
        self._app = app
        self._options = options
        self._state: dict[str, Any] = {}
        self._started = asyncio.Event()
        self._stop = asyncio.Event()
        self._http3_over = asyncio.Event()
        self.ended = asyncio.Event()
        """Set when hypercorn has ended."""

    async def run(self, sockets: Sockets) -> None:
        """Serve until told to end.

        Raises:
            Exception: what hypercorn or the application raise when they cannot start.
        """
        loop = asyncio.get_running_loop()
        tcp = loop.create_task(
            worker_serve(self._run_app, self._config, sockets=sockets, shutdown_trigger=self._when_started)
        )
        started = loop.create_task(self._started.wait())
        await asyncio.wait({tcp, started}, return_when=asyncio.FIRST_COMPLETED)
        if tcp.done():
            started.cancel()
            return await tcp
        self._start_http3()
        loop.add_signal_handler(signal.SIGTERM, self._server.end, self._config.graceful_timeout)
        watch = loop.create_task(self._watch_files())
        for address in self._worker.addresses:
            await self._config.log.info(f"Running on https://{_format(*address)} (QUIC) (CTRL + C to quit)")
        await self._until_end(tcp)
        watch.cancel()

    def stop_accepting(self) -> None:
        """Leave new TCP connections to the other workers."""
        _stop_accepting(self._servers)

    def end(self, seconds: float) -> None:
        """Let hypercorn end: ``seconds`` for requests that run, and a little time for connections without one."""
        self._config.graceful_timeout = max(self._config.graceful_timeout, seconds)
        self._config.shutdown_timeout += seconds
        self._shared.go_away()
        asyncio.get_running_loop().call_later(min(seconds, TCP_GRACE), self._stop.set)

    def _start_http3(self) -> None:
        config, worker = self._config, self._worker
        self._shared = Http3Connections(self._app, config, WorkerContext(config.max_requests), self._state)
        tickets = {} if self._options.no_session_tickets else SessionTickets(worker).callbacks()
        self._server = _Server(
            worker,
            self,
            configuration=_quic_configuration(config, worker),
            create_protocol=partial(Http3Protocol, shared=self._shared),
            retry=self._options.retry_above,
            **tickets,
        )
        self._server.start()

    async def _until_end(self, tcp: "asyncio.Task[None]") -> None:
        """Serve until one side ends, and end the other."""
        loop = asyncio.get_running_loop()
        enough = loop.create_task(self._shared.context.terminate.wait())  # requests: --max-requests
        quic = loop.create_task(self._server.wait_closed())
        await asyncio.wait({tcp, quic, enough}, return_when=asyncio.FIRST_COMPLETED)
        enough.cancel()
        if not quic.done():
            self._server.end(self._config.graceful_timeout)
        await quic
        await self._shared.close()
        self._http3_over.set()
        try:
            await tcp
        finally:
            self.ended.set()
        await self._server.left.wait()

    async def _when_started(self) -> None:
        """Be hypercorn's shutdown trigger: it is asked for when everything has started."""
        self._started.set()
        await self._stop.wait()

    async def _run_app(self, scope: Any, receive: Any, send: Any, sync_spawn: Any, call_soon: Any) -> None:
        """Be the application; of its lifespan take the state, and hold its end back."""
        if scope["type"] == "lifespan":
            self._state = scope.get("state", {})
            receive = partial(self._receive_lifespan, receive)
        await self._app(scope, receive, send, sync_spawn, call_soon)

    async def _receive_lifespan(self, receive: Any) -> Any:
        message = await receive()
        if message["type"] == "lifespan.shutdown":
            await self._http3_over.wait()
        return message

    async def _watch_files(self) -> None:
        """With --reload, ask the supervisor for a reload when a source has changed; one worker does it for all."""
        if not self._config.use_reloader or self._worker.index:
            return
        supervisor, files = os.getppid(), files_to_watch()
        while os.getppid() == supervisor:
            await asyncio.sleep(_WATCH_INTERVAL)
            if check_for_updates(files):
                _logger.info("a source file has changed: reload")
                os.kill(supervisor, signal.SIGHUP)
                files = files_to_watch()


if __name__ == "__main__":
    sys.exit(main())
