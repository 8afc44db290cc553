"""Results of runs of `linear_heads.py`: a table of all stages, and a plot of how copying recovers.

    python scripts/experiments/linear_heads_table.py FOLDER

FOLDER holds the `results.json` of each run under a name of its own (64-features.json: "64 features" in the table); it
gets `table.md` and `copies.png`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor asked for
import matplotlib.pyplot as plt

STAGES = ("calibrated", "transferred", "finetuned")
COLUMNS = ("perplexity 1024", "perplexity 2048", "KL 1024", "copy 0", "copy 300", "copy 1500")


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    runs = {path.stem.replace("-", " "): json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not runs:
        raise SystemExit(f"{folder} has no .json file: copy the results.json of each run into it.")
    (folder / "table.md").write_text(table(runs))
    plot(runs, folder / "copies.png")


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The original, then every stage of every run."""
    original = next(iter(runs.values()))["original"]
    lines = [
        "| | steps | CPU-s in all | " + " | ".join(COLUMNS) + " | cache, MiB |",
        "|---|---:|---:" + "|---:" * (len(COLUMNS) + 1) + "|",
        _line("original", "", "", original, ""),
    ]
    for name, run in runs.items():
        spent = 0.0
        for stage in STAGES:
            # The last stage includes the trial steps by which the budget was divided.
            spent = run["cpu_seconds"] if stage == "finetuned" else spent + run[stage]["cpu_seconds"]
            steps = {"transferred": run["options"]["transfer_steps"], "finetuned": f"{run['finetune_steps']:,}"}
            cache = f"{run['cache_bytes'] / 2**20:.2f}"
            lines.append(_line(f"{name}: {stage}", steps.get(stage, ""), f"{spent:,.0f}", run[stage], cache))
    return "\n".join(lines) + "\n"


def _line(name: str, steps: str, seconds: str, figures: Mapping[str, float], cache: str) -> str:
    numbers = (f"{figures[column]:.4f}" if column.startswith("KL") else f"{figures[column]:.2f}" for column in COLUMNS)
    return f"| {name} | {steps} | {seconds} | {' | '.join(numbers)} | {cache} |"


def plot(runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Copy perplexity at 300 tokens against steps of fine-tuning."""
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for (name, run), style in zip(runs.items(), ("-o", "--s", "-.^", ":v", "-D", "--P"), strict=False):
        points = [(0, run["transferred"]["copy 300"]), *((e["step"], e["copy 300"]) for e in run["evaluations"])]
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.axhline(next(iter(runs.values()))["original"]["copy 300"], color="black", linewidth=0.8, label="original")
    axes.set(xlabel="steps of fine-tuning", ylabel="copy perplexity, 300 tokens between", yscale="log")
    ticks = (1.5, 2, 3, 5, 10, 20, 40)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
