#!/usr/bin/env python3
"""Draw the panels of quicsteer.json from a Prometheus server, without Grafana: ``render.py URL SECONDS FILE.png``.

Each panel's own expressions are asked of the server, for the last SECONDS. Needs matplotlib. It shows what the panels
show, not how Grafana draws them.
"""

import json
import re
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

DASHBOARD = Path(__file__).with_name("quicsteer.json")
VARIABLES = {"$__rate_interval": "10s", "$instance": ".*"}
COLUMNS = 24  # of Grafana's grid
UNITS = {"pps": "datagrams/s", "ops": "per second", "percentunit": "share", "short": ""}


def query(server: str, expression: str, seconds: float) -> list[dict[str, Any]]:
    """Return the series of an expression."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    end = time.time()
    asked = urllib.parse.urlencode({"query": expression, "start": end - seconds, "end": end, "step": 1})
    with urllib.request.urlopen(f"{server}/api/v1/query_range?{asked}") as answer:  # noqa: S310  # the user's own
        result: list[dict[str, Any]] = json.load(answer)["data"]["result"]
    return result


def legend(form: str, labels: dict[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), form).strip()


def draw(axes: Any, panel: dict[str, Any], server: str, seconds: float) -> None:
    """Draw one panel."""
    end = time.time()
    for target in panel["targets"]:
        for series in query(server, target["expr"], seconds):
            points = [(float(moment) - end, float(value)) for moment, value in series["values"]]
            axes.plot(*zip(*points, strict=True), label=legend(target["legendFormat"], series["metric"]), linewidth=1.2)
    axes.set_title(panel["title"], fontsize=9, loc="left", fontweight="bold")
    axes.set_ylabel(UNITS[panel["fieldConfig"]["defaults"]["unit"]], fontsize=7)
    axes.set_xlim(-seconds, 0)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    if axes.lines:
        columns = 3 if panel["gridPos"]["w"] > COLUMNS // 3 else 1
        axes.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncol=columns, frameon=False)


def main(server: str, seconds: float, output: str) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(15, rows * 0.42))
    grid = figure.add_gridspec(rows // 8, COLUMNS, hspace=0.7, wspace=8)
    for panel in panels:
        place = panel["gridPos"]
        axes = figure.add_subplot(grid[place["y"] // 8, place["x"] : place["x"] + place["w"]])
        draw(axes, panel, server, seconds)
    title = "Panels of quicsteer.json, drawn by render.py from a Prometheus server (not by Grafana)"
    figure.suptitle(title, fontsize=10, y=0.93)
    figure.savefig(output, dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3])
