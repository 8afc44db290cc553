"""Results of runs of `kept_keys_table.py`: the tables of each model, and a plot of cost against bytes.

    python scripts/experiments/kept_keys_report.py FOLDER

FOLDER holds the result of each model under a name of its own (`smollm2-135m.json`); for each it gets `NAME.md` and
`NAME.png`.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor asked for
import matplotlib.pyplot as plt
from selection_rules import PRODUCT

Row = Mapping[str, Any]
#: The window that rules and bounds are compared at.
WINDOW = 64
INTRODUCTION = """\
# {name}

{heads} key heads, {documents} passage(s) of {context:,} tokens, nothing trained: nats/token that a conversion costs,
estimated from one backward pass ({cpu_seconds:,.0f} CPU-s in all). Cells are `joint`, all heads' errors together. The
exact heads are those that cost most under the same line on the calibration passage. Far kernels were fitted at window
64 and K = 128, gamma at each window and K. Bytes are those of a linear key head, float32. The costs of a layer differ
from the package's by at most {held:.0e} of their size.
"""


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    paths = sorted(path for path in folder.glob("*.json") if "lines" in json.loads(path.read_text()))
    if not paths:
        raise SystemExit(f"{folder} has no result of `kept_keys_table.py`: copy them into it.")
    for path in paths:
        result = json.loads(path.read_text())
        path.with_suffix(".md").write_text(tables(path.stem, result))
        plot(path.stem, result["lines"], path.with_suffix(".png"))


def tables(name: str, result: Mapping[str, Any]) -> str:
    """The whole grid under the package's rule, then all rules and the oracle."""
    options, lines = result["options"], result["lines"]
    shares = list(lines[0]["joint"])
    text = INTRODUCTION.format(
        name=name, heads=result["heads"], documents=options["documents"], context=options["context"],
        cpu_seconds=result["cpu_seconds"], held=result["largest_difference_from_package"],
    )  # fmt: skip
    grid = [line for line in lines if line["rule"] == PRODUCT]
    windows = sorted({line["window"] for line in grid if line["kept_keys"]})
    fars = list(dict.fromkeys(line["far"] for line in grid))
    text += "\n## Window, kept keys, far part, under the package's rule\n\n"
    text += (
        "The last columns are a window with sinks of the same bytes as the line, interpolated between those measured; "
        "with exact heads this is DuoAttention's split.\n\n"
    )
    bound = {share: window_alone(grid, share) for share in shares}
    rows = [
        [str(window), str(line["kept_keys"]), far or "none", f"{line['bytes'] / 1024:.1f}"]
        + [_number(line["joint"][share]) for share in shares]
        + [_number(bound[share](line["bytes"])) for share in shares]
        for window in windows
        for far in fars
        for line in _sorted(grid, window, far)
    ]
    header = ["window", "K", "far part", "KiB", *(f"{share} exact" for share in shares)]
    text += _table([*header, *(f"same bytes, {share}" for share in shares)], rows, left=3)
    text += f"\n## Selection rules, window {WINDOW}\n\n"
    text += (
        "In order of the geometric mean of the columns with a far part. d: nearer queries do not count; max: over the "
        "query heads of a key head, otherwise the mean; W: the output projection.\n\n"
    )
    return text + _rules([line for line in lines if line["window"] == WINDOW], shares)


def window_alone(grid: Sequence[Row], share: str) -> Callable[[float], float]:
    """The cost of a window with sinks alone by its bytes; between those measured the logarithms are interpolated."""
    bare = sorted((line["bytes"], line["joint"][share]) for line in grid if not line["kept_keys"] and not line["far"])

    def at(size: float) -> float:
        after = min(max(1, next((i for i, (b, _) in enumerate(bare) if b >= size), len(bare) - 1)), len(bare) - 1)
        (low, first), (high, last) = bare[after - 1], bare[after]
        if not low <= size <= high or min(first, last) <= 0:
            return math.nan
        part = (size - low) / (high - low)
        return math.exp((1 - part) * math.log(first) + part * math.log(last))

    return at


def _rules(lines: Sequence[Row], shares: Sequence[str]) -> str:
    numbers = sorted({line["kept_keys"] for line in lines if line["rule"] == "random"})
    fars = list(dict.fromkeys(line["far"] for line in lines if line["rule"] == "random"))
    columns = [(number, far, share) for number in numbers for far in fars for share in (shares[0], shares[-1])]
    cells = {
        (line["rule"], line["kept_keys"], line["far"], share): line["joint"][share]
        for line in lines
        for share in shares
    }
    named = [
        rule
        for rule in dict.fromkeys(line["rule"] for line in lines)
        if all((rule, *column) in cells for column in columns)
    ]
    joined = [column for column in columns if column[1] is not None]
    named.sort(key=lambda rule: math.prod(cells[(rule, *column)] for column in joined))
    rows = [[rule.replace("|", "\\|"), *(_number(cells[(rule, *column)]) for column in columns)] for rule in named]
    header = [f"K {number}, {far or 'no far part'}, {share} exact" for number, far, share in columns]
    return _table(["rule", *header], rows, left=1)


def plot(name: str, lines: Sequence[Row], path: Path) -> None:
    """Cost against bytes of a linear key head: window alone, kept keys, and kept keys with each far part."""
    grid = [line for line in lines if line["rule"] == PRODUCT]
    shares = list(grid[0]["joint"])
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    for axes, share in zip(panels, (shares[0], shares[-1]), strict=True):
        bare = sorted(
            (line["bytes"], line["joint"][share]) for line in grid if not line["kept_keys"] and not line["far"]
        )
        _line(axes, bare, "k:x", "window and sinks alone")
        kept = [(line["bytes"], line["joint"][share]) for line in _sorted(grid, WINDOW, None)]
        _line(axes, kept, "C0--s", "window 64, kept keys")
        for far, style in zip(
            dict.fromkeys(line["far"] for line in grid if line["far"]), ("C1-o", "C2-^", "C3-D"), strict=False
        ):
            points = [(line["bytes"], line["joint"][share]) for line in _sorted(grid, WINDOW, far)]
            _line(axes, points, style, f"window 64, kept keys, {far}")
        best = sorted(
            (line["bytes"], line["joint"][share]) for line in lines
            if line["rule"].startswith("oracle") and line["far"] is None
        )  # fmt: skip
        _line(axes, best, "C7-.+", "oracle, no far part")
        axes.set(
            title=f"{name}, {share} of the key heads exact",
            xlabel="KiB of a linear key head",
            xscale="log",
            yscale="log",
        )
        ticks = (32, 64, 128, 256, 512)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
    panels[0].set_ylabel("estimated divergence, nats/token")
    panels[0].legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axes: Any, points: Sequence[tuple[float, float]], style: str, label: str) -> None:
    axes.plot([size / 1024 for size, _ in points], [cost for _, cost in points], style, label=label, markersize=4)


def _sorted(grid: Sequence[Row], window: int, far: str | None) -> list[Row]:
    mine = [line for line in grid if line["window"] == window and line["far"] == far]
    return sorted(mine, key=lambda line: line["kept_keys"])


def _number(cost: float) -> str:
    return "" if math.isnan(cost) else f"{cost:.5f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, rule, *rows])


if __name__ == "__main__":
    main()
