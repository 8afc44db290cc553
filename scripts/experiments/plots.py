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
        panels[0][0].set_ylabel("KL to the original (nats/token)")
        panels[0][-1].legend(fontsize=8)
        figure.savefig(folder / "features.png", dpi=150)
        plt.close(figure)
    if calibrated:
        figure, axes = plt.subplots(figsize=(5.5, 3.8), layout="constrained")
        for name, style in STYLES.items():
            points = [
                (r["cache_bytes"] / 2**20, r["kl_to_original"]) for r in calibrated if r["run"]["feature_map"] == name
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style[:2] + style[-1], label=name, linestyle="")
        bare = [(r["cache_bytes"] / 2**20, r["kl_to_original"]) for r in results if _is(r, "window only")]
        if bare:
            axes.plot(*zip(*bare, strict=True), "kx", label="window only", linestyle="")
        axes.set(
            xlabel="cache after 8,192 tokens (MiB)",
            ylabel="KL to the original (nats/token)",
            xscale="log",
            yscale="log",
        )
        axes.legend(fontsize=8)
        figure.savefig(folder / "budget.png", dpi=150)
        plt.close(figure)


def _is(result: Mapping[str, Any], stage: str, window: int | None = None) -> bool:
    return result["run"]["stage"] == stage and window in (None, result["run"]["window"])
