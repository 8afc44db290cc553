"""Compare an original with its conversions and with any number of trained checkpoints, on held-out documents.

    python scripts/evaluate.py --original MODEL --data FOLDER --output report
    python scripts/evaluate.py --original MODEL --checkpoints run/final tuned=other/final --data FOLDER --output report
    python scripts/evaluate.py --original MODEL --data FOLDER --contexts 512 2048 --stride 1024 --passkey 512 1024

Columns: original, window only, every head linear, retrieval heads exact (nothing trained), then the checkpoints,
converted or not, under the name before the equals sign. Writes report.json, report.md and plots (perplexity by
position; prefill, decoding and cache against length).
"""

import argparse
import copy
import dataclasses
import itertools
import json
import time
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from transformers import AutoTokenizer

import hf_rfa
from hf_rfa.checkpoint import load_any
from hf_rfa.data import check_tokenizer, evaluation_windows, load_documents, tokenize_documents, training_batches
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.columns import Plan, markdown_table, measure_columns, untrained_columns
from hf_rfa.evaluation.results import VARIANTS, source_name
from hf_rfa.evaluation.speed import measure_speed

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", required=True, help="folder or hub id")
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="[NAME=]FOLDER", help="trained models")
    parser.add_argument("--data", default="stdlib", help="see hf_rfa.data.documents.load_documents")
    parser.add_argument("--text_column", default="text")
    parser.add_argument("--max_documents", type=int, help="held-out documents that are measured; by default all")
    parser.add_argument("--calibration_documents", type=int, default=20, help="of the training split")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--windows", type=int, default=8, help="windows of the longest context")
    parser.add_argument("--stride", type=int, default=0, help="of the sliding window; 0 leaves whole documents out")
    parser.add_argument("--document_tokens", type=int, default=8192, help="whole documents are cut to so many")
    parser.add_argument("--copy_gaps", type=int, nargs="*", default=[300])
    parser.add_argument("--passkey", type=int, nargs="*", default=[], help="lengths of the passkey task")
    parser.add_argument("--speed", type=int, nargs="*", default=[1024, 4096], help="prompt lengths that are timed")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="'cpu' on a machine that others use too")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--num_features", type=int, default=64)
    parser.add_argument("--feature_map", default="hyperbolic", help="of the untrained columns, as window and features")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    original = load_any(given.original, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(given.original)
    check_tokenizer(tokenizer, original)
    checkpoints = named_folders(given.checkpoints)
    longest = max(given.contexts)
    (train, _), (documents, num_bytes) = (
        tokenize_documents(
            tokenizer, load_documents(given.data, split, text_column=given.text_column, max_documents=count)
        )
        for split, count in (("train", given.calibration_documents), ("validation", given.max_documents))
    )
    evaluation_windows(documents, longest)  # raises before any work where no document reaches the context
    try:
        given.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot write to {str(given.output)!r}: {error}. Choose another --output.") from error

    config = hf_rfa.RFAConfig(
        feature_map=given.feature_map, num_features=given.num_features, window=given.window, softmax_heads="auto",
        seed=given.seed,
    )  # fmt: skip
    calibration = itertools.islice(training_batches(train, max(longest, 8 * given.window), 2, given.seed), 2)
    calibrated = hf_rfa.convert(copy.deepcopy(original), config, calibrate=list(calibration))
    models = untrained_columns(original, calibrated)
    for name, folder in checkpoints.items():
        models[name] = load_any(folder, dtype=torch.float32).to(device)
        check_tokenizer(tokenizer, models[name])
    plan = Plan(
        contexts=given.contexts, windows=given.windows, stride=given.stride, document_tokens=given.document_tokens,
        copy_gaps=given.copy_gaps, passkey_lengths=given.passkey,
    )  # fmt: skip
    columns = measure_columns(models, documents, num_bytes, plan, tokenizer.bos_token_id)
    text = torch.cat(documents)
    clock = CLOCKS[given.clock]
    speeds = {n: measure_speed(models, text.repeat(-(-n // len(text))), n, clock=clock) for n in given.speed}

    table = markdown_table(columns) + "\n" + speed_rows(speeds, list(models))
    (given.output / "report.md").write_text(table, encoding="utf-8")
    report = {
        "settings": {name: str(value) for name, value in vars(given).items()}
        | {name: source_name(getattr(given, name)) for name in ("original", "data", "output")}
        | {"checkpoints": list(checkpoints)},
        "columns": [column.to_dict() for column in columns],
        "speed": {n: {name: dataclasses.asdict(s) for name, s in by_name.items()} for n, by_name in speeds.items()},
    }
    (given.output / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    plot(columns, speeds, given.output)
    print(table)


def named_folders(given: list[str]) -> dict[str, str]:
    """Column -> folder; without a name of its own a column has the last two of the folder's."""
    named = {}
    for text in given:
        name, _, folder = text.rpartition("=")
        name = name or "/".join(Path(folder).parts[-2:])
        if name in (*VARIANTS, *named):
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


def plot(columns, speeds, output: Path) -> None:
    """Lines that differ by marker and dash too, so that a print in grey can be read."""
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
    main()
