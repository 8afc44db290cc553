"""Markdown tables that grow while the benchmark runs, and the folder that keeps them: JSON, Markdown, plot."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor asked for
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

MIB = 2**20
#: Told apart in print without colour: by line and marker.
STYLES = ("k-o", "C0--^", "C3:s", "C2-.D", "C1--v", "C4:P", "C5-.X", "C6-<")


class Table:
    """Prints each row when it comes, and keeps all of them."""

    def __init__(self, *titles: str, text: int = 0) -> None:
        """`text`: how many of the columns, from the left, are words; numbers stand on the right."""
        self.lines: list[str] = []
        self._put("| " + " | ".join(titles) + " |")
        self._put("|" + "---|" * text + "---:|" * (len(titles) - text))

    def add(self, *cells: object) -> None:
        self._put("| " + " | ".join(map(str, cells)) + " |")

    def _put(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


@dataclass(frozen=True)
class Panel:
    """One log-log plot: series name -> (x, y) points; `floor` is drawn without markers."""

    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Result:
    """The result of one mode of the benchmark.

    Attributes:
        rows: The figures, seconds and bytes, as JSON-ready values.
        table: The Markdown that was printed.
        panels: The plot's panels.
    """

    rows: list[dict[str, Any]]
    table: list[str]
    panels: list[Panel]


def write(result: Result, folder: Path, mode: str, environment: Mapping[str, Any], command: str) -> None:
    """Write mode.json, mode.md and mode.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    report = {"command": command, **environment, "rows": result.rows}
    (folder / f"{mode}.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    facts = ", ".join(f"{name} {value}" for name, value in environment.items())
    text = "\n".join([f"    {command}", "", facts, "", *result.table, "", f"![{mode}]({mode}.png)", ""])
    (folder / f"{mode}.md").write_text(text, encoding="utf-8")
    plot(result.panels, folder / f"{mode}.png")


def plot(panels: Sequence[Panel], path: Path) -> None:
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(5 * columns, 3.8 * rows), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        styles = iter(STYLES)
        for name, points in panel.series.items():
            style = "0.5" if name == "floor" else next(styles)
            axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({x for points in panel.series.values() for x, _ in points})
        axes.set_xticks(ticks, [short(x) for x in ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set(title=panel.title, xlabel=panel.x, ylabel=panel.y)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def short(tokens: float) -> str:
    """4096 as 4k, 100000 as 100k."""
    unit = 1024 if tokens % 1024 == 0 else 1000
    return f"{tokens / unit:.0f}k" if tokens >= 1000 and tokens % unit == 0 else f"{tokens:.0f}"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}" if seconds >= 1e-3 else f"{seconds * 1e3:.3f}"
