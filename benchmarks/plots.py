"""Pictures of written reports, as SVG; each says on which machine, kernel and date its figures were made."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .report import Report, Spread, Table

mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "quicsteer", "font.size": 9, "axes.axisbelow": True})

_OURS, _OTHERS, _BASE = "#1b6ca8", "#b0b7bd", "#6c757d"
_LINES = {
    "a program that does nothing": ("#6c757d", "o"),
    "ebpf": (_OURS, "s"),
    "cbpf": ("#e07b39", "v"),
    "Envoy's rule": ("#9467bd", "^"),
    "nginx's rule": ("#2ca02c", "D"),
    "nghttpx's rule": ("#d62728", "x"),
    "udpgrm's rule": ("#8c564b", "*"),
    "msquic's rule": ("#17becf", "P"),
    "a connected socket per flow": ("#bcbd22", "h"),
}
"""Color and marker of a rule."""
_WIDTH = 8.0


def plot(reports: Sequence[Report], directory: Path) -> list[Path]:
    """Draw those reports for which there is a picture, and return the files.

    Raises: OSError when a file cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for report in reports:
        draw = _PICTURES.get(report.benchmark)
        if draw:
            figure = draw(report)
            figure.text(0.01, 0.01, _caption(report), fontsize=7, color=_BASE)
            path = directory / f"{report.benchmark}.svg"
            figure.savefig(path, metadata={"Date": None})
            path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")
            files.append(path)
    return files


def _caption(report: Report) -> str:
    machine = report.machine
    return (
        f"{machine['date']}, Linux {machine['kernel']}, {machine['cpu']}, {machine['cpus']} CPUs, "
        f"Python {machine['python']}; python -m benchmarks {report.benchmark}"
    )


def _figure(height: float, count: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    strip = 0.2 / height  # for the caption
    engine: Any = figure.get_layout_engine()
    engine.set(rect=(0, strip, 1, 1 - strip))
    return figure, [figure.add_subplot(rows, -(-count // rows), number + 1) for number in range(count)]


def _color(name: str) -> str:
    return _OURS if any(word in name for word in ("ebpf", "cbpf", "quicsteer", "split")) else _OTHERS


def _bars(axes: Axes, names: Sequence[str], values: Sequence[Any], title: str) -> None:
    """Horizontal bars; a ``Spread`` shows its quartiles."""
    medians = [value.median if isinstance(value, Spread) else value for value in values]
    errors = [
        [value.median - value.low if isinstance(value, Spread) else 0 for value in values],
        [value.high - value.median if isinstance(value, Spread) else 0 for value in values],
    ]
    axes.barh(names, medians, xerr=errors, color=[_color(name) for name in names], ecolor=_BASE, capsize=2)
    for number, median in enumerate(medians):
        text = f" {median:.0f}" if abs(median) >= 10 else f" {median:.3g}"
        axes.text(max(median, errors[1][number] + median, 0), number, text, va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=8, loc="left")
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _column(table: Table, name: str) -> list[Any]:
    return [row[table.columns.index(name)] for row in table.rows]


def _cost(report: Report) -> Figure:
    table = report.tables[0]
    rows = [row for row in table.rows if row[2] is not None and "another group" not in row[0]]
    figure, (axes,) = _figure(0.28 * len(rows) + 1)
    title = "What a datagram costs more than without a program, ns; median and quartiles"
    _bars(axes, [row[0] for row in rows], [row[2] for row in rows], title)
    return figure


def _growth(report: Report) -> Figure:
    figure, places = _figure(6.5, len(report.tables), rows=2)
    lines: dict[str, Any] = {}
    for axes, table in zip(places, report.tables, strict=True):
        for number, name in enumerate(table.columns[2:]):
            points = [(row[0], row[2 + number]) for row in table.rows if row[2 + number] is not None]
            color, marker = _LINES[name]
            medians = [value.median for _, value in points]
            width = 2 if name in ("ebpf", "cbpf") else 1
            (line,) = axes.plot([at for at, _ in points], medians, color=color, marker=marker, ms=4, lw=width)
            lines.setdefault(name, line)
        axes.set_xscale("log", base=2 if table.columns[0] != "flows" else 10)
        axes.set_xlabel(table.columns[0])
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
    for axes in places[:: -(-len(places) // 2)]:
        axes.set_ylabel("more than without a program, ns")
    figure.legend(lines.values(), lines.keys(), loc="lower right", bbox_to_anchor=(0.98, 0.12), frameon=False)
    return figure


def _migration(report: Report) -> Figure:
    figure, places = _figure(3.4, 2)
    for axes, table, what in zip(places, report.tables, ("datagrams", "QUIC connections"), strict=True):
        four = [row for row in table.rows if row[1] == 4]
        title = f"{what} that reach their worker\nafter 4 changes of address, %, 4 workers"
        _bars(axes, [row[0] for row in four], [row[-1] * 100 for row in four], title)
    return figure


def _attacks(report: Report) -> Figure:
    aims, guesses = report.tables
    few = min(_column(aims, "workers"))
    rows = [row for row in aims.rows if row[1] == few]
    figure, places = _figure(3.4, 3)
    for axes, column, title in ((places[0], 2, "chosen against Envoy's rule"), (places[1], 3, "forged from one seen")):
        _bars(
            axes,
            [row[0] for row in rows],
            [row[column] for row in rows],
            f"DCIDs {title}:\nload of one of {few} workers",
        )
        axes.axvline(1, color=_BASE, linewidth=0.8)
    connection = [row[1] * 100 for row in guesses.rows]
    _bars(places[2], [row[0] for row in guesses.rows], connection, "“of one connection?”\nright guesses, %")
    places[2].axvline(50, color=_BASE, linewidth=0.8)
    return figure


def _floods(report: Report) -> Figure:
    junk, initials = report.tables
    figure, places = _figure(2.8, 2)
    _bars(
        places[0],
        _column(junk, "lane"),
        _column(junk, "goodput, MB/s"),
        "Junk at full rate:\ngoodput of established connections, MB/s",
    )
    lost = _column(initials, "frames lost, %")
    _bars(places[1], _column(initials, "lane"), lost, "Initials at full rate:\nlost on established connections, %")
    return figure


def _servers(report: Report) -> Figure:
    table = report.tables[0]
    names = [f"{row[1]}, {row[0]} worker{'s' if row[0] > 1 else ''}" for row in table.rows]
    figure, places = _figure(0.26 * len(names) + 1, 2)
    _bars(places[0], names, _column(table, "CPU per request, us"), "CPU per HTTP/3 request, us")
    _bars(places[1], names, _column(table, "requests/s"), "HTTP/3 requests/s, clients on the same CPUs")
    places[1].set_yticklabels([])
    return figure


_PICTURES: dict[str, Callable[[Report], Figure]] = {
    "cost": _cost,
    "cost-veth": _cost,
    "growth": _growth,
    "migration": _migration,
    "attacks": _attacks,
    "floods": _floods,
    "servers": _servers,
}
