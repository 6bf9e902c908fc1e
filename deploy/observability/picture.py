"""Draws the dashboard's panels from a running Prometheus.

    python deploy/observability/picture.py URL FILE.png [SECONDS]

For pages where no Grafana can be. Needs matplotlib and nothing else that is not in the standard library.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
import urllib.parse
import urllib.request
from typing import Any

import matplotlib

matplotlib.use("Agg")
from dashboard import COLUMNS, PANELS, Panel
from matplotlib import pyplot

RATE_WINDOW = "10s"
Series = list[tuple[str, list[float], list[float]]]


def ask(url: str, query: str, *, begin: float, end: float) -> list[dict[str, Any]]:
    """Prometheus' answer to a range query with a point a second."""
    placed = query.replace("$__rate_interval", RATE_WINDOW).replace("$instance", ".*")
    given = urllib.parse.urlencode({"query": placed, "start": begin, "end": end, "step": 1})
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{given}", timeout=30) as answer:
        return list(json.load(answer)["data"]["result"])


def series(url: str, panel: Panel, *, begin: float, end: float) -> Series:
    """Legend, seconds and values of each line of a panel."""
    found: Series = []
    for legend, query in panel.queries:
        for one in ask(url, query, begin=begin, end=end):
            label = legend
            for name in re.findall(r"\{\{(\w+)\}\}", legend):
                label = label.replace("{{" + name + "}}", one["metric"].get(name, ""))
            points = [(at - begin, float(value)) for at, value in one["values"] if not math.isnan(float(value))]
            found.append((label, [at for at, _ in points], [value for _, value in points]))
    return found


def main(url: str, path: str, seconds: str = "60") -> int:
    """Draw the last seconds."""
    end = time.time()
    begin = end - float(seconds)
    rows = math.ceil(len(PANELS) / COLUMNS)
    figure, axes = pyplot.subplots(rows, COLUMNS, figsize=(15, 2.4 * rows), constrained_layout=True)
    for axis, panel in zip(axes.flat, PANELS):
        for label, at, values in series(url, panel, begin=begin, end=end):
            axis.plot(at, values, label=label, linewidth=1.4)
        axis.set_title(panel.title, fontsize=10)
        axis.set_xlim(0, float(seconds))
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.set_ylabel({"s": "s", "reqps": "1/s", "percentunit": "share"}.get(panel.unit, ""), fontsize=7)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=6, loc="upper left")
    figure.savefig(path, dpi=80)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
