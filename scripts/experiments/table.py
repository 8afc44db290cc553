"""The study's results as one Markdown table."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEADER = (
    "stage", "map", "features", "window", "exact heads", "ppl (longest)", "KL, nats/token", "far recovery",
    "copy 0 / 300 / 1500", "passkey", "greedy", "cache at 8k, MiB",
)  # fmt: skip


def write_table(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write every run as a row, best KL divergence first within a stage."""
    rows = [row(result, results) for result in sorted(results, key=_order)]
    lines = [HEADER, ["---"] * 4 + ["---:"] * (len(HEADER) - 4), *rows]
    path.write_text("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n")


def row(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cells of one run."""
    run, recovery = result["run"], far_recovery(result, results)
    longest = max(result["perplexity"], key=int)
    copies = " / ".join(f"{result['copy_perplexity'][gap]:.2f}" for gap in sorted(result["copy_perplexity"], key=int))
    exact = f"{len(result['exact_heads'])} ({run['softmax_heads']})" if run["softmax_heads"] is not None else "0"
    return [
        run["stage"], run["feature_map"] or "", str(run["num_features"] or ""), str(run["window"]), exact,
        f"{result['perplexity'][longest]:.2f}", f"{result['kl_to_original']:.5f}",
        "" if recovery is None else f"{recovery:.0%}", copies, f"{result['passkey']:.0%}",
        f"{result['greedy_agreement']:.1%}",
        f"{result['cache_bytes'] / 2**20:.2f}",
    ]  # fmt: skip


def far_recovery(result: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the loss of the bare window of the same width that the run recovers; None without such a run."""
    longest = max(result["perplexity"], key=int)
    named = {(r["run"]["stage"], r["run"]["window"]): math.log(r["perplexity"][longest]) for r in results}
    original, window = named.get(("original", 0)), named.get(("window only", result["run"]["window"]))
    if original is None or window is None or window <= original:
        return None
    return (window - math.log(result["perplexity"][longest])) / (window - original)


def _order(result: Mapping[str, Any]) -> tuple[Any, ...]:
    run = result["run"]
    stages = ("original", "window only", "uncalibrated", "calibrated", "transferred", "finetuned")
    return (stages.index(run["stage"]), str(run["softmax_heads"]), result["kl_to_original"])
