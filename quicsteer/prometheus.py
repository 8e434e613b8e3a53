"""The figures as Prometheus metrics: one list of families, from which come the text and the collector.

Names and units follow Prometheus' conventions: counters end in ``_total``, sizes are in bytes. What a mode cannot know
has no sample.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .abi import Outcome
from .addresses import format_address
from .counters import GroupStats, SlotStats
from .quicstats import OTHER_CODES, QuicStats, name_transport_error
from .sockdiag import SocketStats
from .version import package_version

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

COUNTER, GAUGE = "counter", "gauge"

Labels = dict[str, str]

_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r"\""})


@dataclass(frozen=True)
class Family:
    """All samples of one metric."""

    name: str
    kind: str
    help: str
    samples: list[tuple[Labels, float]] = field(default_factory=list)

    def add(self, labels: Labels, value: float | None) -> None:
        """Add a sample, unless there is nothing to know."""
        if value is not None:
            self.samples.append((labels, value))

    def text(self) -> str:
        """Return the family in the text exposition format."""
        lines = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} {self.kind}"]
        for labels, value in self.samples:
            shown = ",".join(f'{name}="{text.translate(_ESCAPES)}"' for name, text in labels.items())
            lines.append(f"{self.name}{{{shown}}} {value}" if shown else f"{self.name} {value}")
        return "\n".join(lines) + "\n"


def render(families: Iterable[Family]) -> str:
    """Return families in the text exposition format; those without a sample are left out."""
    return "".join(family.text() for family in families if family.samples)


def group_families(stats: GroupStats) -> list[Family]:
    """Return the metrics of a group."""
    info = Family("quicsteer_info", GAUGE, "What runs: mode of steering, whether a better one was refused, version.")
    info.add({"mode": str(stats.mode), "fallback": "yes" if stats.fallback else "no", "version": package_version()}, 1)
    return [info, *_slot_families(stats.slots, stats.sink_outcomes), _sink_family(stats), _host_family(stats)]


def _slot_families(
    slots: Iterable[SlotStats], sink_outcomes: Mapping[Outcome, int | None]
) -> tuple[Family, Family, Family, Family, Family, Family]:
    datagrams = Family("quicsteer_datagrams_total", COUNTER, "Datagrams by slot and what the program decided.")
    dropped = Family(
        "quicsteer_datagrams_dropped_total", COUNTER, "Datagrams dropped for want of receive buffer in an open slot."
    )
    parked = Family("quicsteer_datagrams_parked_total", COUNTER, "Datagrams for slots that nobody read, swallowed.")
    queue = Family("quicsteer_receive_queue_bytes", GAUGE, "Receive buffer in use, in the kernel's accounting.")
    buffer = Family("quicsteer_receive_buffer_bytes", GAUGE, "Size of the receive buffer, in the kernel's accounting.")
    is_parked = Family("quicsteer_slot_parked", GAUGE, "1 for a slot that nobody reads.")
    for slot in slots:
        labels = {"slot": str(slot.slot), "address": format_address(slot.address)}
        for outcome in Outcome:
            name = outcome.name.lower()
            datagrams.add({**labels, "outcome": name}, getattr(slot, name))
        # Whose slot it is stands on one family only: the others can be joined by slot and address.
        is_parked.add({**labels, "worker": str(slot.worker), "role": slot.role, "bank": _bank(slot)}, int(slot.parked))
        dropped.add(labels, slot.dropped)
        parked.add(labels, slot.swallowed)
        queue.add(labels, slot.queued_bytes)
        buffer.add(labels, slot.buffer_bytes)
    for outcome, count in sink_outcomes.items():
        datagrams.add({"slot": "sink", "address": "", "outcome": outcome.name.lower()}, count)
    return datagrams, dropped, parked, queue, buffer, is_parked


def _bank(slot: SlotStats) -> str:
    return "" if slot.bank is None else str(slot.bank)


def _sink_family(stats: GroupStats) -> Family:
    sink = Family("quicsteer_sink_datagrams_total", COUNTER, "Datagrams that no worker could serve, dropped.")
    sink.add({}, stats.sink)
    return sink


def _host_family(stats: GroupStats) -> Family:
    host = Family(
        "quicsteer_host_udp_errors_total", COUNTER, "UDP errors of the network namespace since the group opened."
    )
    for name, count in vars(stats.host).items() if stats.host else ():
        host.add({"error": name}, count)
    return host


def supervisor_families(status: Mapping[str, Any]) -> list[Family]:
    """Return the metrics of a supervisor, from what it answers to ``status``."""
    workers = Family("quicsteer_workers", GAUGE, "Worker processes by state.")
    states = [worker["state"] for worker in status["workers"]]
    for state in ("starting", "ready", "serving", "draining"):
        workers.add({"state": state}, states.count(state))
    hung = Family("quicsteer_workers_hung", GAUGE, "Workers that do not answer while datagrams wait.")
    hung.add({}, sum(worker["hung"] for worker in status["workers"]))
    restarts = Family("quicsteer_worker_restarts_total", COUNTER, "Workers started in the place of one that died.")
    restarts.add({}, status["restarts"])
    reloads = Family("quicsteer_reloads_total", COUNTER, "Reloads that succeeded.")
    reloads.add({}, status["reloads"])
    return [workers, hung, restarts, reloads]


_QUIC_NUMBERS = {
    "connections": ("quicsteer_quic_connections", GAUGE, "QUIC connections that are open."),
    "handshakes": ("quicsteer_quic_handshakes", GAUGE, "QUIC handshakes that are open."),
    "opened": ("quicsteer_quic_connections_opened_total", COUNTER, "QUIC connections opened."),
    "retries": ("quicsteer_quic_retries_total", COUNTER, "Clients asked to prove their address by a Retry."),
    "invalid_tokens": ("quicsteer_quic_invalid_tokens_total", COUNTER, "Retry tokens refused."),
    "stateless_resets": ("quicsteer_quic_stateless_resets_total", COUNTER, "Stateless resets sent."),
    "unanswered_resets": ("quicsteer_quic_stateless_resets_withheld_total", COUNTER, "Stateless resets not sent."),
    "unsent": ("quicsteer_quic_datagrams_unsent_total", COUNTER, "Datagrams that the kernel did not take."),
}


def quic_families(workers: Mapping[int, QuicStats]) -> list[Family]:
    """Return the metrics of the workers' QUIC connections, by index of the worker."""
    families = {name: Family(*described) for name, described in _QUIC_NUMBERS.items()}
    closed = Family("quicsteer_quic_connections_closed_total", COUNTER, "QUIC connections that ended, by error code.")
    resets = Family("quicsteer_quic_stream_resets_total", COUNTER, "QUIC streams given up, by error code.")
    for index, figures in workers.items():
        worker = {"worker": str(index)}
        for name, family in families.items():
            family.add(worker, getattr(figures, name))
        for end, count in sorted(figures.ends.items()):
            layer = "application" if end.application else "transport"
            name = (not end.application and name_transport_error(end.code)) or ""
            closed.add({**worker, "sender": end.sender, "layer": layer, "code": _code(end.code), "name": name}, count)
        for reset, count in sorted(figures.stream_resets.items()):
            resets.add({**worker, "sender": reset.sender, "frame": reset.frame, "code": _code(reset.code)}, count)
    return [*families.values(), closed, resets]


def _code(code: int) -> str:
    return "other" if code == OTHER_CODES else f"{code:#x}"


def socket_families(sockets: Iterable[SocketStats]) -> list[Family]:
    """Return the metrics of sockets of other processes."""
    dropped = Family("quicsteer_socket_datagrams_dropped_total", COUNTER, "Datagrams that the kernel dropped here.")
    queue = Family("quicsteer_socket_receive_queue_bytes", GAUGE, "Receive buffer in use, in the kernel's accounting.")
    buffer = Family(
        "quicsteer_socket_receive_buffer_bytes", GAUGE, "Size of the receive buffer, in the kernel's accounting."
    )
    for sock in sockets:
        labels = {"address": format_address(sock.address), "inode": str(sock.inode), "uid": str(sock.uid)}
        dropped.add(labels, sock.dropped)
        queue.add(labels, sock.queued_bytes)
        buffer.add(labels, sock.buffer_bytes)
    return [dropped, queue, buffer]


class Readable(Protocol):
    """What a collector reads: a ``SteeringGroup``."""

    def stats(self) -> GroupStats:
        """Return what the kernel did with the group's datagrams so far."""


class GroupCollector:
    """A collector for ``prometheus_client``: ``REGISTRY.register(GroupCollector(group))``.

    Each scrape reads the group anew. ``quic`` returns the figures of servers in this process by index of the worker:
    for one ``quicsteer.aioquic`` server, ``lambda: {server.worker.index: server.figures()}``. Needs
    prometheus_client (the extra ``prometheus``).
    """

    def __init__(self, group: Readable, quic: Callable[[], Mapping[int, QuicStats]] = dict) -> None:
        self._group = group
        self._quic = quic

    def describe(self) -> list[Any]:
        """Promise nothing, so that to register costs nothing."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the metrics of this moment."""
        from prometheus_client.metrics_core import Metric

        for family in [*group_families(self._group.stats()), *quic_families(self._quic())]:
            if family.samples:
                metric = Metric(family.name.removesuffix("_total"), family.help, family.kind)
                for labels, value in family.samples:
                    metric.add_sample(family.name, labels, value)
                yield metric
