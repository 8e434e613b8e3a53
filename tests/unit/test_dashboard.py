"""The dashboard asks for metrics that there are."""

import json
import re
from pathlib import Path

from figures import FIGURES, SOCKET, group

from quicsteer.prometheus import group_families, quic_families, socket_families, supervisor_families

DOCS = Path(__file__).parents[2] / "docs"
NAMES = {
    family.name
    for family in [
        *group_families(group()),
        *supervisor_families({"workers": [], "restarts": 0, "reloads": 0}),
        *quic_families({0: FIGURES}),
        *socket_families([SOCKET]),
    ]
}


def test_each_panel_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((DOCS / "grafana" / "quicsteer.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            asked = set(re.findall(r"\bquicsteer_\w+", target["expr"]))
            assert asked, panel["title"]
            assert asked <= NAMES, panel["title"]
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            grouped = re.search(r"(?:sum|max) by \(([\w, ]+)\)", target["expr"])
            assert labels <= set(re.split(r", ?", grouped[1]) if grouped else ()), panel["title"]


def test_each_metric_is_documented() -> None:
    documented = (DOCS / "stats.md").read_text()
    assert [name for name in sorted(NAMES) if f"`{name}`" not in documented] == []
