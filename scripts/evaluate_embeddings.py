"""FaceNet's measures of a converted sentence encoder against its original, and of an index between the two.

    python scripts/evaluate_embeddings.py --output report                       # MiniLM, converted and not trained
    python scripts/evaluate_embeddings.py --new run/final --output report
    python scripts/evaluate_embeddings.py --original FOLDER_OR_HUB_ID --new FOLDER --data FOLDER --output report

Held-out texts of identities (chapters, modules, or a label) are encoded by both encoders. report.md then has: VAL at
FAR 1e-3 (10 folds) and clusters; the four directions of queries and index (FaceNet's figure 8, roc.png is its plot);
vectors in 8 bits; heads of several dimensions (its table 5) and amounts of training data (its table 6), all trained
alike on the frozen new encoder; time and memory of encoding long texts by an encoder with rotary positions.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import embeddings_report as report
import numpy as np
from finetune_embeddings import calibration_texts, encode

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.embeddings import (
    EmbeddingIndex,
    MetricConfig,
    Passages,
    PassageSettings,
    clustering,
    groups_of,
    load_encoder,
    load_passages,
    pair_distances,
    retrieve,
    roc,
    val_at_far,
)
from hf_rfa.embeddings.cost import encoding_cost
from hf_rfa.embeddings.heads import apply_head, train_head
from hf_rfa.embeddings.intervals import first_found, ratio_interval, recall_interval
from hf_rfa.embeddings.verification import FAR, FOLDS
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.results import source_name
from hf_rfa.options import Settings, option, part
from hf_rfa.runtime.record import is_converted


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    output: Path = option("Folder of the report.")
    original: str | None = option("Folder or hub id; by default the packaged all-MiniLM-L6-v2.", None)
    new: str | None = option("The new encoder; by default the original, converted and calibrated, not trained.", None)
    data: str = option(SOURCE_HELP, "stdlib")
    max_tokens: int = option("Texts are cut to so many tokens.", 256, least=8)
    held_out_identities: int | None = option("Held-out identities, at most.", 60, least=10)
    training_identities: int | None = option("Training identities for the heads, at most.", 100, least=2)
    calibration_texts: int = option("Texts to calibrate on, if the new encoder is made here.", 8, least=1)
    dimensions: tuple[int, ...] = option("Dimensions of heads (table 5); none leaves it out.", (32, 64, 128, 256, 384))
    shares: tuple[float, ...] = option(
        "Shares of the training identities (table 6); none leaves it out.", (0.01, 0.03, 0.1, 0.3, 1.0)
    )
    share_dimension: int = option("Dimension of the heads of table 6.", 128, least=1)
    lengths: tuple[int, ...] = option("Tokens of long texts that are timed; none leaves it out.", (512, 2048, 8192))
    far: float = option("False accept rate.", FAR, above=0, below=1)
    folds: int = option("Folds of identities.", FOLDS, least=2)

    passages_of: PassageSettings = part(PassageSettings(passage_characters=1000), group="Texts")
    conversion: hf_rfa.RFAConfig = part(
        hf_rfa.RFAConfig(window=32, kept_keys=32, softmax_heads=0.25),  # much of a text of 256 tokens is far
        only=("feature_map", "num_features", "window", "sink_tokens", "kept_keys", "softmax_heads", "seed"),
        group="Conversion, if the new encoder is made here",
    )
    heads: MetricConfig = part(
        MetricConfig(steps=300, loss="triplet", learning_rate=1e-3, identities=16, progress=False),
        only=("steps", "loss", "margin", "identities", "passages", "learning_rate", "seed"),
        group="Heads",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads.loss == "harmonic":
            raise ConfigError("Heads have no old embeddings of their size. Got loss=harmonic. Set loss=triplet.")


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot write to {str(options.output)!r}: {error}. Choose another --output.") from error
    held_out = load_passages(options.data, "validation", options.passages_of).first(options.held_out_identities)
    training = load_passages(options.data, "train", options.passages_of).first(options.training_identities)
    old, new = encoders(options, training)
    vectors = {"old": encode(old, held_out), "new": encode(new, held_out)}
    found: dict[str, Any] = {
        "settings": options.to_dict()
        | {name: source_name(getattr(options, name) or "none") for name in ("output", "original", "new", "data")},
        "texts": len(held_out.texts),
        "identities": len(held_out.names),
        "encoders": {name: encoder_figures(v, vectors["old"], held_out, options) for name, v in vectors.items()},
    }
    curves = {}
    if vectors["old"].shape == vectors["new"].shape:
        found["directions"], curves = directions(vectors, held_out, options)
    else:
        sizes = " and ".join(str(v.shape[1]) for v in vectors.values())
        print(f"The encoders have {sizes} dimensions, so that neither searches the other's index: no directions.")
    found["precisions"] = precisions(vectors["new"], held_out, options)
    if options.dimensions or options.shares:
        found |= heads(encode(new, training), training, vectors["new"], held_out, options)
    if options.lengths:
        found["cost"] = costs(options)
    (options.output / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    text = written(found)
    (options.output / "report.md").write_text(text, encoding="utf-8")
    if curves:
        report.plot_roc(curves, options.output / "roc.png")
    for name, title in (("dimensions", "dimension"), ("shares", "training identities, %")):
        if found.get(name):
            report.plot_heads(title, found[name], options.output / f"{name}.png")
    print(text)


def encoders(options: Options, training: Passages):
    """The original, and the new encoder."""
    old = load_encoder(options.original, options.max_tokens).eval()
    if options.new is not None:
        return old, load_encoder(options.new, options.max_tokens).eval()
    if is_converted(old):
        raise ConfigError(
            "The original is converted already. Got original without new. Name the original before it was converted, "
            "and the converted one as `--new`."
        )
    new = load_encoder(options.original, options.max_tokens).eval()
    texts = calibration_texts(training, options.calibration_texts, 8 * options.max_tokens)
    return old, hf_rfa.convert(new, options.conversion, calibrate=texts)


def figures(queries: np.ndarray, index: np.ndarray, texts: Passages, options: Options) -> dict[str, Any]:
    """Retrieval and VAL between two encoders' embeddings of the same texts."""
    distances = pair_distances(queries, index)
    verification = val_at_far(distances, texts.labels, far=options.far, folds=options.folds)
    found = dataclasses.asdict(retrieve(queries, index, texts.labels))
    return {**found, "verification": dataclasses.asdict(verification)}


def directions(vectors: dict[str, np.ndarray], texts: Passages, options: Options):
    """Figures of the four directions, each beside old → old, and their ROC curves."""
    found, curves = {}, {}
    before = first_found(vectors["old"], vectors["old"], texts.labels)
    for queries, index in (("old", "old"), ("new", "new"), ("new", "old"), ("old", "new")):
        hits = first_found(vectors[queries], vectors[index], texts.labels)
        found[f"{queries} → {index}"] = {
            **figures(vectors[queries], vectors[index], texts, options),
            "queries": len(hits),
            "interval": recall_interval(hits, texts.labels),
            "of_old": float(hits.mean() / before.mean()) if before.any() else float("nan"),
            "of_old_interval": ratio_interval(hits, before, texts.labels),
        }
        if (queries, index) != ("old", "new"):  # the same pairs as those of new → old
            name = "new ↔ old" if queries != index else f"{queries} → {index}"
            curves[name] = roc(pair_distances(vectors[queries], vectors[index]), texts.labels)
    return found, curves


def encoder_figures(vectors: np.ndarray, old: np.ndarray, texts: Passages, options: Options) -> dict[str, Any]:
    """VAL and clusters of one encoder, and how near it is to the original."""
    cosine = float((vectors * old).sum(1).mean()) if vectors.shape == old.shape else float("nan")
    return {
        **figures(vectors, vectors, texts, options), "clustering": clustering(vectors, texts.labels), "cosine": cosine
    }  # fmt: skip


def precisions(vectors: np.ndarray, texts: Passages, options: Options) -> dict[str, Any]:
    """The new index in float32 and in 8 bits, as it is read back; queries stay in float32."""
    found = {}
    for precision in ("float32", "int8"):
        index = EmbeddingIndex(vectors, [str(number) for number in range(len(vectors))], precision=precision)
        found[precision] = {"bytes": index.vector_bytes, **figures(vectors, index.vectors, texts, options)}
    return found


def heads(trained_on: np.ndarray, training: Passages, vectors: np.ndarray, texts: Passages, options: Options):
    """Tables 5 and 6: heads on the frozen new encoder, all trained alike."""

    def measured(share: float, dimension: int) -> dict[str, Any]:
        part = training.share(share, least=2)
        numbers = {text: number for number, text in enumerate(training.texts)}
        rows = trained_on[[numbers[text] for text in part.texts]]
        # Batches are of identities with as many texts as they take of each.
        whole = sum(len(texts) >= options.heads.passages for texts in groups_of(part.labels))
        config = dataclasses.replace(options.heads, identities=min(options.heads.identities, whole))
        head, _ = train_head(rows, part.labels, dimension, config)
        small = apply_head(head, vectors)
        return {"texts": len(part.texts), **figures(small, small, texts, options)}

    return {
        "dimensions": {size: measured(1.0, size) for size in options.dimensions},
        "shares": {f"{100 * share:g} %": measured(share, options.share_dimension) for share in options.shares},
    }


def costs(options: Options) -> dict[str, dict[int, Any]]:
    """Softmax, every head linear, and one head of four exact, on a ModernBERT whose layers all see everything."""
    linear = dataclasses.replace(options.conversion, softmax_heads=None)
    split = dataclasses.replace(linear, softmax_heads=[(layer, 0) for layer in range(4)])
    columns = {"softmax": None, "every head linear": linear, "1 of 4 heads exact": split}
    return {
        name: {n: dataclasses.asdict(encoding_cost(n, config)) for n in options.lengths}
        for name, config in columns.items()
    }


def written(found: dict[str, Any]) -> str:
    """report.md"""
    settings = found["settings"]
    parts = [
        f"{found['texts']} held-out texts of {found['identities']} identities, at most {settings['max_tokens']} "
        f"tokens. VAL at FAR {settings['far']:g}, mean and standard error over {settings['folds']} folds.\n",
        "Encoders:\n\n" + report.encoders_table(found["encoders"]),
    ]
    if "directions" in found:
        parts.append(
            "Queries and index of old and new encoders (figure 8); in brackets 95 % intervals, by a bootstrap over "
            "identities:\n\n" + report.directions_table(found["directions"])
        )
    parts.append("New vectors in 8 bits:\n\n" + report.precision_table(found["precisions"]))
    if found.get("dimensions"):
        parts.append("Embedding dimension (table 5):\n\n" + report.heads_table("dimension", found["dimensions"]))
    if found.get("shares"):
        parts.append("Amount of training data (table 6):\n\n" + report.heads_table("identities", found["shares"]))
    if "cost" in found:
        parts.append("Encoding one text, CPU time and memory:\n\n" + report.cost_table(found["cost"]))
    return "\n".join(parts)


if __name__ == "__main__":
    main(sys.argv[1:])
