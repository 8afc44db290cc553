"""Compare an original with its conversions and with any number of trained checkpoints, on held-out documents.

    python scripts/evaluate.py --original MODEL --data FOLDER --output report
    python scripts/evaluate.py --original MODEL --checkpoints run/final tuned=other/final --data FOLDER --output report
    python scripts/evaluate.py --original MODEL --data FOLDER --contexts 512 2048 --stride 1024 --passkey 512 1024
    python scripts/evaluate.py --original MODEL --data FOLDER --columns exact same_window same_split same_kept \\
        --tasks needle_single needle_multikey --task_lengths 1024 4096 --output report

Columns: original, window only, every head linear, retrieval heads exact (nothing trained; `--columns` chooses, and has
what else the bytes of the conversion could hold), then the checkpoints, converted or not, named by the text before the
equals sign. `--tasks` adds RULER-style tasks, judged by what is generated. `--budget 0.25 --budget_context 8192`
converts at a quarter of the KV bytes. Writes report.json, report.md and plots (perplexity by position; prefill,
decoding and cache against length; what the bytes of the conversion bought).
"""

import copy
import dataclasses
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from transformers import AutoTokenizer

import hf_rfa
from hf_rfa.budget_curve import plot_curve, summary
from hf_rfa.checkpoint import load_any
from hf_rfa.command_line import parse_arguments
from hf_rfa.config import seen_exactly
from hf_rfa.data import check_tokenizer, evaluation_windows, load_documents, tokenize_documents, training_batches
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.columns import ColumnSettings, markdown_table, measure_columns, untrained_columns
from hf_rfa.evaluation.measuring import Asked
from hf_rfa.evaluation.results import COLUMNS, COLUMNS_HELP, DEFAULT_COLUMNS, ORIGINAL, source_name
from hf_rfa.evaluation.speed import measure_speed
from hf_rfa.evaluation.tasks import TaskSettings
from hf_rfa.options import Settings, option, part
from hf_rfa.runtime.devices import chosen_device

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    original: str = option("Folder or hub id.")
    output: Path = option("Folder of the report.")
    checkpoints: tuple[str, ...] = option("Trained models, each [NAME=]FOLDER.", ())
    data: str = option(SOURCE_HELP, "stdlib")
    text_column: str = option("Column of the text.", "text")
    max_documents: int | None = option("Held-out documents that are measured; by default all.", None, least=1)
    calibration_documents: int = option("Documents of the training split to calibrate on.", 20, least=1)

    measurement: ColumnSettings = part(
        ColumnSettings(contexts=(512, 1024, 2048)), names={"passkey_lengths": "passkey"}, group="Measurement"
    )
    columns: tuple[str, ...] = option(COLUMNS_HELP, DEFAULT_COLUMNS)
    task_settings: TaskSettings = part(TaskSettings(), group="Tasks")
    speed: tuple[int, ...] = option("Prompt lengths that are timed, tokens; none leaves it out.", (1024, 4096))
    clock: Literal["wall", "cpu"] = option("'cpu' on a machine that others use too.", "wall")

    conversion: hf_rfa.RFAConfig = part(
        hf_rfa.RFAConfig(softmax_heads="auto"),
        only=(
            *("feature_map", "num_features", "window", "sink_tokens", "kept_keys", "softmax_heads", "loss_budget"),
            *("budget", "budget_context", "seed"),
        ),
        group="Conversion of the untrained columns",
    )


def main(arguments: list[str]) -> None:
    given = parse_arguments(Options, arguments, __doc__)
    device = chosen_device("auto")
    original = load_any(given.original, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(given.original)
    check_tokenizer(tokenizer, original)
    checkpoints = named_folders(given.checkpoints)
    config, longest = given.conversion, max(given.measurement.contexts)
    train_texts, held_out = (
        load_documents(given.data, split, text_column=given.text_column, max_documents=count)
        for split, count in (("train", given.calibration_documents), ("validation", given.max_documents))
    )
    (train, _), (documents, num_bytes) = (tokenize_documents(tokenizer, texts) for texts in (train_texts, held_out))
    # Both raise before any work: where no document reaches the context, or a task has too little text.
    evaluated = evaluation_windows(documents, longest)
    asked = Asked(given.task_settings, tokenizer, (document.text for document in held_out))
    try:
        given.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot write to {str(given.output)!r}: {error}. Choose another --output.") from error

    calibration = itertools.islice(training_batches(train, max(longest, 8 * config.window), 2, config.seed), 2)
    calibrated = hf_rfa.convert(copy.deepcopy(original), config, calibrate=list(calibration))
    models = untrained_columns(original, calibrated, given.columns, evaluated.flatten()[:longest])
    for name, folder in checkpoints.items():
        models[name] = load_any(folder, dtype=torch.float32).to(device)
        check_tokenizer(tokenizer, models[name])
    columns = measure_columns(models, documents, num_bytes, given.measurement, tokenizer.bos_token_id, asked)
    text = torch.cat(documents)
    clock = CLOCKS[given.clock]
    speeds = {n: measure_speed(models, text.repeat(-(-n // len(text))), n, clock=clock) for n in given.speed}

    seen = seen_exactly(config.window, config.sink_tokens)
    caption = f"Window {config.window}: a query of an untrained conversion sees {seen} exactly."
    curve = hf_rfa.calibration_report(calibrated).curve
    table = f"{markdown_table(columns)}\n{speed_rows(speeds, list(models))}\n{curve_rows(curve)}{caption}\n"
    (given.output / "report.md").write_text(table, encoding="utf-8")
    report = {
        "settings": given.to_dict()
        | {name: source_name(getattr(given, name)) for name in ("original", "data", "output")}
        | {"checkpoints": list(checkpoints)},
        "columns": [column.to_dict() for column in columns],
        "curve": [dataclasses.asdict(step) for step in curve],
        "speed": {n: {name: dataclasses.asdict(s) for name, s in by_name.items()} for n, by_name in speeds.items()},
    }
    (given.output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plot(columns, speeds, given.output)
    if curve:
        plot_curve(curve, given.output / "curve.png")
    print(table)


def named_folders(given: list[str]) -> dict[str, str]:
    """Column -> folder; by default a column is named by the last two parts of the folder."""
    named = {}
    for text in given:
        name, _, folder = text.rpartition("=")
        name = name or "/".join(Path(folder).parts[-2:])
        if name in (ORIGINAL, *COLUMNS.values(), *named):
            raise ConfigError(f"Two columns are called {name!r}. Name the folder: `--checkpoints NAME={folder}`.")
        named[name] = folder
    return named


def speed_rows(speeds, names) -> str:
    rows = []
    for n, by_name in speeds.items():
        for title, value in (
            (f"prefill of {n} tokens, s", lambda s: f"{s.prefill_seconds:.2f}"),
            (f"decoding after {n} tokens, tokens/s", lambda s: f"{s.decode_tokens_per_second:.0f}"),
            (f"cache after {n} tokens, MiB", lambda s: f"{s.cache_bytes / 2**20:.2f}"),
        ):
            rows.append(f"| {title} | " + " | ".join(value(by_name[name]) for name in names) + " |")
    return "\n".join(rows) + "\n"


def curve_rows(curve) -> str:
    """What the bytes of the conversion bought, if calibration chose any heads."""
    head, *rows = summary(curve)
    if not rows:
        return ""
    lines = [head, ["---:", "---:", "---"], *rows]
    return "What the bytes bought:\n\n" + "".join("| " + " | ".join(row) + " |\n" for row in lines) + "\n"


def plot(columns, speeds, output: Path) -> None:
    """Plots whose lines differ by marker and dash, so that they can be read in grey."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Seven markers and four dashes: the first that repeats both is the 29th.
    styles = list(
        zip(itertools.cycle("os^Dvx*"), itertools.islice(itertools.cycle(["-", "--", "-.", ":"]), 28), strict=False)
    )
    figure, axes = plt.subplots(figsize=(6, 4.6), layout="constrained")
    for column, (marker, line) in zip(columns, styles, strict=False):
        axes.plot([b.end for b in column.by_position], [b.perplexity for b in column.by_position],
                  marker=marker, linestyle=line, label=column.name)  # fmt: skip
    axes.set(ylabel="perplexity")
    token_axis(axes, [b.end for b in columns[0].by_position], "position in the context, tokens (end of bin)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(output / "perplexity_by_position.png", dpi=150)
    plt.close(figure)
    if not speeds:
        return
    figure, three = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for column, (marker, line) in zip(columns, styles, strict=False):
        measured = [by_name[column.name] for by_name in speeds.values()]
        for axes, values in zip(
            three,
            (
                [s.prefill_seconds for s in measured],
                [s.decode_tokens_per_second for s in measured],
                [s.cache_bytes / 2**20 for s in measured],
            ),
            strict=True,
        ):
            axes.plot(list(speeds), values, marker=marker, linestyle=line, label=column.name)
    for axes, title in zip(three, ("prefill, s", "decoding, tokens/s", "cache, MiB"), strict=True):
        axes.set_ylabel(title)
        if title.startswith("decoding"):
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        token_axis(axes, list(speeds), "prompt, tokens")
    figure.legend(*three[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(output / "cost.png", dpi=150)
    plt.close(figure)


def token_axis(axes: Axes, counts: list[int], label: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main(sys.argv[1:])
