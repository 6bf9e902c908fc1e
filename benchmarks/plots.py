"""Small PNG plots for the benchmarks: lines over one axis, panels in a row. Draws nothing without matplotlib."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One plot: lines by name, each a list of (x, y)."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Points]
    log_x: bool = False
    bound: float | None = None  # a dashed horizontal line


def draw(path: Path, panels: Sequence[Panel], *, title: str) -> bool:
    """Write the picture; False, and a sentence on stderr, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print(
            f"no plot: matplotlib is not installed (pip install matplotlib), so {path} is not written", file=sys.stderr
        )
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        for name, points in panel.lines.items():
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3, label=name)
        if panel.bound is not None:
            axis.axhline(panel.bound, linestyle="--", color="grey", linewidth=1)
        if panel.log_x:
            axis.set_xscale("symlog", linthresh=1)  # with a place for 0
            axis.set_xlim(left=min(x for points in panel.lines.values() for x, _ in points))
        axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
