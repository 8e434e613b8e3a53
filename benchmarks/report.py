"""Figures: what is made of the samples, the machine they come from, and how both are shown."""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

_FIRST_MARK, _LAST_MARK = "<!-- figures -->", "<!-- end of figures -->"

_PICTURES = Path("images", "benchmarks")

RATIO = "ratio"
"""Unit of a bar that compares two figures."""


def first_line(error: Exception) -> str:
    """Return what is wrong, without the remedies below it."""
    return str(error).partition("\n")[0]


def describe_machine() -> dict[str, Any]:
    """Return what decides the figures besides the code."""
    model = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "kernel": platform.release(),
        "cpu": model[0] if model else platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "bpf_jit_enable": "".join(_lines("/proc/sys/net/core/bpf_jit_enable")) or None,
        "bpf_jit_harden": "".join(_lines("/proc/sys/net/core/bpf_jit_harden")) or None,
        "spec_store_bypass": "".join(_lines("/sys/devices/system/cpu/vulnerabilities/spec_store_bypass")) or None,
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Bar:
    """A figure that must not be above its limit."""

    text: str
    value: float
    limit: float
    unit: str

    @property
    def met(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Table:
    """Rows under named columns; a cell is text, a number, a ``Spread`` or ``None`` for nothing to say."""

    title: str
    columns: tuple[str, ...]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Report:
    """The outcome of one benchmark. ``samples`` are the rounds that the tables were made from."""

    benchmark: str
    parameters: dict[str, Any]
    tables: list[Table]
    bars: list[Bar]
    notes: list[str] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=describe_machine)

    def to_json(self) -> str:
        plain = asdict(self)
        plain["bars"] = [{**asdict(bar), "met": bar.met} for bar in self.bars]
        plain["samples"] = {name: [round(value, 1) for value in values] for name, values in self.samples.items()}
        return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """Read a file that ``Report.to_json`` wrote."""
    return from_json(path.read_text())


def from_json(text: str) -> Report:
    """Return the report that ``Report.to_json`` wrote."""
    plain = json.loads(text)
    tables = [
        Table(table["title"], tuple(table["columns"]), [[_read_cell(cell) for cell in row] for row in table["rows"]])
        for table in plain["tables"]
    ]
    bars = [Bar(bar["text"], bar["value"], bar["limit"], bar["unit"]) for bar in plain["bars"]]
    return Report(**{**plain, "tables": tables, "bars": bars})


def _read_cell(cell: Any) -> Any:
    return Spread(*cell) if isinstance(cell, list) else cell


def spread(values: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def differences(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of the paired differences: of what lay in the same round."""
    return spread([value - other for value, other in zip(values, base, strict=True)])


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Return the median of the paired ratios."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def render(report: Report) -> str:
    """Return a report as Markdown."""
    machine = report.machine
    lines = [
        f"`{report.benchmark}` on Linux {machine['kernel']}, {machine['cpu']} ({machine['cpus']} CPUs, load "
        f"{machine['load']}), Python {machine['python']}, {machine['date']}: "
        + ", ".join(f"{name} {value}" for name, value in report.parameters.items())
        + ".",
    ]
    for table in report.tables:
        lines += ["", f"**{table.title}**", "", *_render_table(table)]
    if report.bars:
        lines += ["", "**Bars**", ""]
        rows = [
            [bar.text, _number(bar.value, bar.unit), _number(bar.limit, bar.unit), _verdict(bar)] for bar in report.bars
        ]
        lines += _render_table(Table("", ("figure", "measured", "at most", ""), rows))
    for note in report.notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def insert(reports: Sequence[Report], path: Path) -> None:
    """Put the reports into a Markdown file, between its two marks, with their pictures if they lie there.

    Raises: ValueError when it has no marks.
    """
    before, first, rest = path.read_text().partition(_FIRST_MARK)
    _, last, after = rest.partition(_LAST_MARK)
    if not last:
        raise ValueError(f"{path} has no {_FIRST_MARK} and {_LAST_MARK}")
    figures = "\n".join(_section(report, path.parent) for report in reports)
    path.write_text(f"{before}{first}\n\n{figures}\n{last}{after}")


def _section(report: Report, directory: Path) -> str:
    lines = [f"### {report.benchmark}", ""]
    picture = _PICTURES / f"{report.benchmark}.svg"
    if (directory / picture).exists():
        lines += [f"![{report.benchmark}]({picture})", ""]
    return "\n".join(lines) + "\n" + render(report)


def _verdict(bar: Bar) -> str:
    return "met" if bar.met else "**missed**"


def _number(value: float, unit: str) -> str:
    return f"{value:.3f}" if unit == RATIO else f"{value:.3g} {unit}"


def _render_table(table: Table) -> list[str]:
    cells = [list(table.columns), *([_render_cell(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _render_cell(cell: Any) -> str:
    match cell:
        case None:
            return ""
        case Spread(median, low, high):
            digits = 0 if abs(median) >= 10 else 2
            return f"{median:.{digits}f} [{low:.{digits}f} to {high:.{digits}f}]"
        case float():
            return f"{cell:.3f}" if abs(cell) < 10 else f"{cell:.0f}"
        case int():
            return f"{cell:,}"
    return str(cell)
