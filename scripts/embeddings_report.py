"""Tables and plots of scripts/evaluate_embeddings.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

#: Lines that can be told apart in grey.
STYLES = ("-", "--", ":", "-.")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; the first column holds names, the others figures."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def val_cell(found: Any) -> str:
    """VAL in per cent, as in FaceNet's tables."""
    return f"{100 * found['val']:.1f} ± {100 * found['error']:.1f}"


def interval_cell(interval: Sequence[float]) -> str:
    low, high = interval
    return f"[{low:.3f}, {high:.3f}]"


def directions_table(directions: Mapping[str, Any]) -> str:
    header = ["queries → index", "queries", "R@1", "R@1 / that of old → old", "R@10", "nDCG@10", "VAL, %"]
    rows = [
        (name, d["queries"], f"{d['recall'][1]:.3f} {interval_cell(d['interval'])}",
         f"{d['of_old']:.3f} {interval_cell(d['of_old_interval'])}", f"{d['recall'][10]:.3f}", f"{d['ndcg']:.3f}",
         val_cell(d["verification"]))
        for name, d in directions.items()
    ]  # fmt: skip
    return table(header, rows)


def encoders_table(encoders: Mapping[str, Any]) -> str:
    header = ["", "VAL, %", "measured FAR", "clusters, V-measure", "mean cosine to the original"]
    rows = [
        (name, val_cell(e["verification"]), f"{e['verification']['far']:.1e}", f"{e['clustering']:.3f}",
         f"{e['cosine']:.4f}")
        for name, e in encoders.items()
    ]  # fmt: skip
    return table(header, rows)


def precision_table(precisions: Mapping[str, Any]) -> str:
    header = ["vectors in the index", "bytes each", "R@1", "nDCG@10", "VAL, %"]
    rows = [
        (name, p["bytes"], f"{p['recall'][1]:.3f}", f"{p['ndcg']:.3f}", val_cell(p["verification"]))
        for name, p in precisions.items()
    ]
    return table(header, rows)


def heads_table(first: str, heads: Mapping[Any, Any]) -> str:
    header = [first, "texts", "VAL, %", "R@1", "nDCG@10"]
    rows = [
        (name, h["texts"], val_cell(h["verification"]), f"{h['recall'][1]:.3f}", f"{h['ndcg']:.3f}")
        for name, h in heads.items()
    ]
    return table(header, rows)


def cost_table(costs: Mapping[str, Mapping[int, Any]]) -> str:
    header = ["tokens", *(f"{name}, {unit}" for name in costs for unit in ("s", "MiB"))]
    lengths = list(next(iter(costs.values())))
    rows = [
        [length] + [cell for by in costs.values() for cell in
                    (f"{by[length]['seconds']:.2f}", f"{by[length]['peak_bytes'] / 2**20:.0f}")]
        for length in lengths
    ]  # fmt: skip
    return table(header, rows)


def plot_roc(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """FaceNet's figure 8: VAL against FAR, logarithmic, old and new embeddings alone and with each other."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for (name, (far, val)), line in zip(curves.items(), STYLES, strict=False):
        axes.plot(far, val, line, label=name)
    axes.axvline(1e-3, color="0.6", linewidth=0.8)
    axes.set(xscale="log", xlim=(1e-4, 1), ylim=(0, 1), xlabel="FAR", ylabel="VAL")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_heads(title: str, heads: Mapping[Any, Any], path: Path) -> None:
    """VAL with its error bars and R@1, against the dimension or the amount of data."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    places = [float(str(name).removesuffix(" %")) for name in heads]
    vals, errors = ([h["verification"][key] for h in heads.values()] for key in ("val", "error"))
    axes.errorbar(places, vals, errors, fmt="o-", capsize=3, label="VAL at FAR 1e-3")
    axes.plot(places, [h["recall"][1] for h in heads.values()], "s--", label="R@1")
    axes.set(xscale="log", xlabel=title)
    axes.set_xticks(places, [str(name) for name in heads])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _pyplot() -> Any:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
