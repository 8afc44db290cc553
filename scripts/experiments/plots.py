"""The study's results as plots: KL divergence against features and windows, and against bytes of cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor asked for
import matplotlib.pyplot as plt

# Told apart in print without colour: by line and marker.
STYLES = {
    "hyperbolic": "C0-o", "trigonometric": "C1--s", "positive": "C2-.^", "optimal_positive": "C4:v", "auto": "C3:D",
    "clustered": "C5-P",
}  # fmt: skip


def write_plots(results: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `features.png` (calibrated, every head linear) and `budget.png` (calibrated, all runs)."""
    calibrated = [r for r in results if r["run"]["stage"] == "calibrated"]
    linear = [r for r in calibrated if r["run"]["softmax_heads"] is None]
    windows = sorted({r["run"]["window"] for r in linear})
    if windows:
        figure, panels = plt.subplots(
            1, len(windows), figsize=(3.2 * len(windows), 3.4), sharey=True, squeeze=False, layout="constrained"
        )
        for axes, window in zip(panels[0], windows, strict=True):
            for name, style in STYLES.items():
                points = sorted(
                    (r["run"]["num_features"], r["kl_to_original"])
                    for r in linear
                    if r["run"]["feature_map"] == name and r["run"]["window"] == window
                )
                if points:
                    axes.plot(*zip(*points, strict=True), style, label=name)
            bare = [r["kl_to_original"] for r in results if _is(r, "window only", window)]
            if bare:
                axes.axhline(bare[0], color="black", linewidth=0.8, linestyle=":", label="window only")
            axes.set(title=f"window {window}", xlabel="features per key head", xscale="log", yscale="log")
            axes.set_xticks([16, 64, 256], ["16", "64", "256"])
            axes.minorticks_off()
        panels[0][0].set_ylabel("KL to the original (nats/token)")
        # No panel has every map where a study was cut.
        handles = {
            label: handle
            for axes in panels[0]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        panels[0][-1].legend(handles.values(), handles.keys(), fontsize=8)
        figure.savefig(folder / "features.png", dpi=150)
        plt.close(figure)
    if calibrated:
        _plot_budget(calibrated, results, folder / "budget.png")


def _plot_budget(calibrated: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL divergence against bytes of cache: a line for each map and feature count, along it more and more exact heads.

    Every head linear is an open marker, so that one sees what exact heads add to it.
    """
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    counts = sorted({r["run"]["num_features"] for r in calibrated})
    dashes = dict(zip(counts, ("-", "--", ":", "-.") * len(counts), strict=False))
    for name, style in STYLES.items():
        label: str | None = name
        for count in counts:
            points = sorted(
                (r["cache_bytes"] / 2**20, r["kl_to_original"], len(r["exact_heads"]))
                for r in calibrated
                if (r["run"]["feature_map"], r["run"]["num_features"], r["run"]["window"]) == (name, count, 64)
            )
            if points:
                size, divergence, _ = zip(*points, strict=True)
                color, marker = style[:2], style[-1]
                axes.plot(size, divergence, color + dashes[count], linewidth=1)
                for x, y, exact in points:
                    face = color if exact else "white"
                    axes.plot(x, y, marker, color=color, markerfacecolor=face, label=label, linestyle="")
                    label = None
                for x, y, exact in points:
                    if exact and count == counts[len(counts) // 2]:
                        axes.annotate(str(exact), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    bare = [(r["cache_bytes"] / 2**20, r["kl_to_original"]) for r in results if _is(r, "window only", 64)]
    if bare:
        axes.plot(*zip(*bare, strict=True), "kx", label="window only", linestyle="")
    axes.set(
        xlabel="cache after 8,192 tokens (MiB); numbers: exact key heads",
        ylabel="KL to the original (nats/token)",
        xscale="log",
        yscale="log",
        title="window 64, nothing trained (open: every head linear)",
    )
    if axes.get_legend_handles_labels()[0]:  # none where the study has another window than 64
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _is(result: Mapping[str, Any], stage: str, window: int | None = None) -> bool:
    return result["run"]["stage"] == stage and window in (None, result["run"]["window"])
