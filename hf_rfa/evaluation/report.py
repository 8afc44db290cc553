"""The result of a comparison as tables, report.md, report.json and plots."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, nor asked for
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from hf_rfa.budget_curve import CurveStep, plot_curve, summary
from hf_rfa.config import seen_exactly
from hf_rfa.evaluation.results import (
    ORIGINAL,
    SAME_BYTES,
    SAME_KEPT,
    SAME_SPLIT,
    SAME_WINDOW,
    VARIANTS,
    Comparison,
    Quality,
    source_name,
)
from hf_rfa.evaluation.tasks.measuring import task_rows

MIB = 2**20

# Told apart in print without colour: by line and marker.
_STYLES = dict(zip((*VARIANTS, *SAME_BYTES), ("k-o", "C3:s", "C0--^", "C2-.D", "C1:v", "C4-.x", "C5--*"), strict=True))

_DEFINITIONS = """\
All columns are measured on the same {tokens} held-out tokens. **window only** sees {seen} exactly (window {window}), \
and nothing else; **every head linear** {kept}adds the {others}far keys through {features} random features \
({feature_map}) per key head; **retrieval heads exact** does so for all key heads but {heads} of {key_heads}, which \
stay softmax: {head_list} as (layer, key head).

- perplexity: exp(nats/token) over separate windows of that many tokens; bits per byte: the same, per byte of text.
- KL to original: KL(original || model) of the next-token distributions, nats/token, at context {context}.
- far recovery: (nll of the window - nll) / (nll of the window - nll of the original), at context {context}.
- copy perplexity, gap g: of a span of 128 tokens at its second appearance, g other tokens after the first.
- greedy agreement: share of the original's greedy tokens that the model ranks first, given the original's own prefix.
"""

# What is explained only where it is shown.
_COLUMN_DEFINITIONS = {
    SAME_WINDOW: "{sinks} sinks and a window alone, as wide as fills the conversion's bytes at context {context}.",
    SAME_SPLIT: "the exact heads of the conversion; the others have such a window and nothing else (the split of "
    "DuoAttention).",
    SAME_KEPT: "the conversion with more kept keys in place of the features' sums, and no far part.",
}
_TASKS_DEFINITION = """\
RULER-style tasks (`hf_rfa.evaluation.tasks`): mean score of greedy answers with its 95 % interval (Wilson; questions \
about the same document count as independent). Numbers hidden in held-out text: needle_single (one of its form), \
needle_multikey (three others distract), needle_multivalue (share of both values found); choice: the letter of one of \
four numbers, every rotation asked, 25 % is chance; variables: share of the three variables of a chain; common_words: \
share of the three most common words of a list."""


def quality_table(qualities: Mapping[str, Quality]) -> list[list[str]]:
    """Header and rows of the table of figures, as text; one column per model."""
    columns = list(qualities.values())
    rows = [["", *qualities]]
    for n in columns[0].perplexity:
        rows.append([f"perplexity @ {n}", *(f"{q.perplexity[n]:.3f}" for q in columns)])
    for n in columns[0].bits_per_byte:
        rows.append([f"bits per byte @ {n}", *(f"{q.bits_per_byte[n]:.4f}" for q in columns)])
    rows.append(["KL to original (nats/token)", *(f"{q.kl_to_original:.4f}" for q in columns)])
    rows.append(["far recovery", *("-" if q.far_recovery is None else f"{q.far_recovery:.1%}" for q in columns)])
    for gap in columns[0].copy_perplexity:
        rows.append([f"copy perplexity, gap {gap}", *(f"{q.copy_perplexity[gap]:.2f}" for q in columns)])
    rows.append(["greedy agreement", *(f"{q.greedy_agreement:.1%}" for q in columns)])
    rows += task_rows({name: quality.tasks for name, quality in qualities.items()})
    if all(q.cache_bytes is not None for q in columns):
        cells = (f"{(q.cache_bytes or 0) / MIB:.3f}" for q in columns)
        rows.append([f"cache @ {max(columns[0].perplexity)} (MiB)", *cells])
    return rows


def cost_table(comparison: Comparison) -> list[list[str]]:
    """Header and rows of the table of times and bytes, as text; batch size 1."""
    rows = [["", *comparison.speed]]
    for speeds in zip(*comparison.speed.values(), strict=True):  # those of all models at one context
        context = speeds[0].context
        rows += [
            [f"prefill @ {context} (s)", *(f"{s.prefill_seconds:.3f}" for s in speeds)],
            [f"decode @ {context} (tokens/s)", *(f"{s.decode_tokens_per_second:.1f}" for s in speeds)],
            [f"cache @ {context} (MiB)", *(f"{s.cache_bytes / MIB:.3f}" for s in speeds)],
        ]
        if speeds[0].peak_bytes is not None:
            rows += [[f"peak memory @ {context} (MiB)", *(f"{(s.peak_bytes or 0) / MIB:.0f}" for s in speeds)]]
    return rows


def position_table(qualities: Mapping[str, Quality]) -> list[list[str]]:
    """Header and rows of perplexity by position in the longest context."""
    bins = [(b.start, b.end) for b in next(iter(qualities.values())).by_position]
    return [["position", *qualities]] + [
        [f"{start} to {end - 1}", *(f"{q.by_position[i].perplexity:.3f}" for q in qualities.values())]
        for i, (start, end) in enumerate(bins)
    ]


def calibration_table(comparison: Comparison) -> list[list[str]]:
    """Header and rows of the result of calibration, one row per key head."""
    heads = comparison.calibration["heads"]
    return [[key.replace("_", " ") for key in heads[0]]] + [
        [f"{value:.4g}" if isinstance(value, float) else str(value) for value in head.values()] for head in heads
    ]


def curve_table(comparison: Comparison) -> list[list[str]]:
    """Header and rows of what bytes bought when the heads were chosen; no row where the config left no choice."""
    return summary(_curve(comparison))


def _curve(comparison: Comparison) -> list[CurveStep]:
    return [CurveStep(**step) for step in comparison.calibration.get("curve", ())]


def finetuned_title(comparison: Comparison) -> str:
    """The title of the second table, which says how all its columns were trained."""
    training = next(iter(comparison.training.values()))
    return f"After {training.steps} steps of fine-tuning ({training.tokens:,} tokens, the same for every column)"


CALIBRATED_TITLE = "Right after calibration (no weight of the model trained)"
CURVE_TITLE = "What the conversion's bytes bought (estimated cost, cache of one text)"


def with_finetuned_original(qualities: Mapping[str, Quality]) -> dict[str, Quality]:
    """The fine-tuned columns under names that say so: the original was fine-tuned too."""
    return {f"{name}, same tuning" if name == ORIGINAL else name: q for name, q in qualities.items()}


def write_report(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Writes report.md, report.json and plots, and returns their paths.

    The plots are perplexity.png and cost.png; curve.png where heads were chosen, kept_tokens.png where keys are kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("report.md", "report.json", "perplexity.png", "cost.png")]
    paths[0].write_text(markdown(comparison), encoding="utf-8")
    # JSON has no NaN: fail here rather than in every reader.
    paths[1].write_text(json.dumps(as_dict(comparison), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    plot_perplexity(comparison, paths[2])
    plot_cost(comparison, paths[3])
    if curve := _curve(comparison):
        paths.append(folder / "curve.png")
        plot_curve(curve, paths[-1], unit=comparison.calibration["unit"])
    if comparison.kept is not None:
        paths.append(folder / "kept_tokens.png")
        comparison.kept.plot(paths[-1])
    return paths


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """All figures as JSON-ready values; the fields are those of `hf_rfa.evaluation.results.Comparison`."""
    # What was kept is too long to be read, and drawn instead.
    values = dataclasses.asdict(dataclasses.replace(comparison, kept=None))
    del values["kept"]
    values["settings"] = comparison.settings.to_dict()
    for key in ("model", "data", "output"):
        values["settings"][key] = source_name(values["settings"][key])
    return values


def markdown(comparison: Comparison) -> str:
    """The text of report.md."""
    settings, environment, conversion = comparison.settings, comparison.environment, comparison.settings.conversion
    heads = comparison.softmax_heads
    kept = comparison.calibration.get("kept_keys", conversion.most_kept_keys)
    parts = [
        "# hf_rfa compare",
        f"{source_name(settings.model)} ({comparison.parameters:,} parameters) on {source_name(settings.data)}; "
        + ", ".join(f"{key} {value}" for key, value in environment.items())
        + f"; {comparison.seconds:.0f} s in all.",
        _DEFINITIONS.format(
            tokens=f"{comparison.eval_tokens:,}",
            window=conversion.window,
            seen=seen_exactly(conversion.window, conversion.sink_tokens),
            kept=f"keeps up to {kept} far keys per key head and " if kept else "",
            others="other " if kept else "",
            features=conversion.num_features,
            feature_map=conversion.feature_map,
            heads=len(heads),
            key_heads=comparison.key_heads,
            head_list=", ".join(map(str, heads)) or "none",
            context=max(settings.contexts),
        ),
        *_definitions(comparison),
        f"## {CALIBRATED_TITLE}",
        _markdown_table(quality_table(comparison.calibrated)),
    ]
    if comparison.finetuned:
        parts += [
            f"## {finetuned_title(comparison)}",
            _markdown_table(quality_table(with_finetuned_original(comparison.finetuned))),
            "KL and greedy agreement are with the original as it came, before any fine-tuning. Tokens/s in training: "
            + ", ".join(f"{name} {t.tokens / t.seconds:.0f}" for name, t in comparison.training.items())
            + ".",
        ]
    else:
        parts += ["Nothing was fine-tuned (`--steps 0`)."]
    parts += [
        "## Time and memory",
        f"Batch size 1, medians of {settings.speed_repeats} interleaved runs; the cache after a prefill of that many "
        "tokens. The window-only model runs through the same operator with the weight of its far part at 0: its "
        "costs are those of every head linear, and a purpose-made one would need less.",
        _markdown_table(cost_table(comparison)),
        "## Perplexity by position",
        f"Right after calibration, in windows of {max(settings.contexts)} tokens.",
        _markdown_table(position_table(comparison.calibrated)),
        "## Calibration",
        "Per key head; losses are shares of the squared norm of the layer's output, with the features and with the "
        "window alone.",
        _markdown_table(calibration_table(comparison)),
        *_curve_section(comparison),
        *(["![Far tokens that each head kept](kept_tokens.png)"] if comparison.kept is not None else []),
        "![Perplexity against context](perplexity.png)",
        "![Prefill time and cache memory against context](cost.png)",
        "All settings and figures, calibration included, are in report.json; the converted model is in model/ "
        '(`hf_rfa.from_pretrained("model")`).',
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _curve_section(comparison: Comparison) -> list[str]:
    """The curve that led to the heads of the conversion, if calibration chose any."""
    table, conversion = curve_table(comparison), comparison.settings.conversion
    if len(table) == 1:
        return []
    if conversion.budget is not None:
        end = f"until a budget of {conversion.budget} at {conversion.budget_context:,} tokens was spent"
    else:
        end = f"until {conversion.loss_budget} nats/token were measured, or a quarter of all heads was exact"
    return [
        "## What the bytes bought",
        f"Exact heads and kept keys were bought where a byte lowers the estimated cost most, {end}. Bytes of exact "
        f"heads are those at {conversion.budget_context:,} tokens. All steps: `calibration.curve` in report.json.",
        _markdown_table(table),
        "![Estimated cost against bytes](curve.png)",
    ]


def _definitions(comparison: Comparison) -> list[str]:
    """Of the columns and tasks that are not in every report."""
    settings, parts = comparison.settings, []
    for name, text in _COLUMN_DEFINITIONS.items():
        if name in comparison.calibrated:
            text = text.format(sinks=settings.conversion.sink_tokens, context=max(settings.contexts))
            parts.append(f"**{name}**: {text}")
    return [*parts, _TASKS_DEFINITION] if settings.task_settings.tasks else parts


def plot_perplexity(comparison: Comparison, path: Path) -> None:
    """Perplexity against context, one panel before and one after fine-tuning."""
    stages = [("after calibration", comparison.calibrated), ("after fine-tuning", comparison.finetuned)]
    stages = [(title, qualities) for title, qualities in stages if qualities]
    figure, panels = plt.subplots(1, len(stages), figsize=(5 * len(stages), 3.8), sharey=True, squeeze=False)
    for axes, (title, qualities) in zip(panels[0], stages, strict=True):
        for name, quality in qualities.items():
            axes.plot(list(quality.perplexity), list(quality.perplexity.values()), _STYLES[name], label=name)
        axes.set_xscale("log", base=2)
        _context_axis(axes, comparison.settings.contexts)
        axes.set(title=title, ylabel="perplexity")
    panels[0][0].legend()
    _save(figure, path)


def plot_cost(comparison: Comparison, path: Path) -> None:
    """Prefill time and cache memory against context."""
    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 3.8))
    contexts = [speed.context for speed in next(iter(comparison.speed.values()))]
    for name, speeds in comparison.speed.items():
        time_axes.plot(contexts, [s.prefill_seconds for s in speeds], _STYLES[name], label=name)
        memory_axes.plot(contexts, [s.cache_bytes / MIB for s in speeds], _STYLES[name], label=name)
    for axes, title, unit in ((time_axes, "prefill time", "s"), (memory_axes, "cache after prefill", "MiB")):
        _context_axis(axes, contexts)
        axes.set(title=title, ylabel=unit)
        axes.set_ylim(bottom=0)
    time_axes.legend()
    _save(figure, path)


def _context_axis(axes: Axes, contexts: Sequence[int]) -> None:
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context (tokens)")
    axes.grid(alpha=0.3)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _markdown_table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])
