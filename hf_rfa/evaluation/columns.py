"""The columns of every comparison and any number of trained checkpoints, measured on the same tokens.

By default: original, window only, every head linear, retrieval heads exact; besides, what else the bytes of the
conversion could hold (`hf_rfa.evaluation.equal_bytes`).
"""

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import hf_rfa
from hf_rfa.config import RFAConfig
from hf_rfa.data.sequences import evaluation_windows
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.document_perplexity import document_perplexity, sliding_window_nll, streaming_nll
from hf_rfa.evaluation.equal_bytes import equal_bytes_columns
from hf_rfa.evaluation.measuring import Asked, Measurer, with_far_recovery
from hf_rfa.evaluation.results import (
    DEFAULT_COLUMNS,
    EXACT,
    LINEAR,
    ORIGINAL,
    SAME_BYTES,
    SAME_SPLIT,
    WINDOW_ONLY,
    Quality,
    column_titles,
)
from hf_rfa.evaluation.retrieval_tasks import PasskeyScore, passkey_retrieval
from hf_rfa.evaluation.tasks.measuring import task_rows
from hf_rfa.options import Settings, option
from hf_rfa.runtime.record import conversion_config, is_converted


@dataclass(frozen=True)
class ColumnSettings(Settings):
    """Settings of the measurement of one column, the same for all columns."""

    contexts: tuple[int, ...] = option(
        "Context lengths, tokens, for perplexity and bits per byte; KL and positions use the longest.", (512, 2048)
    )
    windows: int = option("Held-out windows of the longest context, at most.", 8, least=1)
    stride: int = option(
        "Stride, tokens, of the sliding window of the longest context over whole documents; 0 leaves them out.",
        0, least=0,
    )  # fmt: skip
    document_tokens: int = option("Whole documents are cut to this many tokens.", 8192, least=2)
    copy_gaps: tuple[int, ...] = option("Tokens between the two appearances of a span that is to be copied.", (300,))
    passkey_lengths: tuple[int, ...] = option("Lengths of the passkey task, tokens; none leaves it out.", ())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.contexts or min(self.contexts) < 2:
            raise ConfigError(
                f"`contexts` must be lengths of at least 2 tokens. Got {list(self.contexts)}. Set, for example, "
                "512,2048."
            )


@dataclass(frozen=True, kw_only=True)
class Column(Quality):
    """One model's figures, on windows, on whole documents and on passkeys."""

    name: str
    sliding_perplexity: float | None = None
    stride: int = 0  # of the sliding window, tokens
    streaming_perplexity: float | None = None
    passkey: list[PasskeyScore] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def untrained_columns(
    original: PreTrainedModel,
    calibrated: PreTrainedModel,
    names: Sequence[str] = DEFAULT_COLUMNS,
    ids: Tensor | None = None,
) -> dict[str, PreTrainedModel]:
    """The original and its conversions, nothing trained; they share their weights, which saves memory.

    Args:
        calibrated: the same model, converted and calibrated, with the exact heads that calibration chose. If it chose
            none, there are no columns `exact` and `same_split`: they would be `linear` and `same_window`.
        names: the columns, see `hf_rfa.evaluation.results.COLUMNS`.
        ids: token ids (n,) of the context at which columns have the same bytes; needed for these only.

    Raises:
        ConfigError: an unknown name, or no `ids` where they are needed.
    """
    titles = column_titles(names)
    config = conversion_config(calibrated)
    near = dataclasses.replace(config, gamma=0.0, kept_keys=0, head_kept_keys=None, softmax_heads=None, budget=None)
    if not config.softmax_heads:
        titles = [title for title in titles if title not in (EXACT, SAME_SPLIT)]
    same_bytes = [title for title in titles if title in SAME_BYTES]
    if same_bytes and ids is None:
        raise ConfigError(f"Columns of the same bytes need the tokens to count them at. Got {same_bytes}. Pass `ids`.")

    def convert(config: RFAConfig) -> PreTrainedModel:
        return hf_rfa.convert(_with_same_weights(original), config, calibrate=False)

    models = {ORIGINAL: original, EXACT: calibrated}
    if WINDOW_ONLY in titles:
        models[WINDOW_ONLY] = convert(near)
    if LINEAR in titles:
        models[LINEAR] = _with_same_weights(calibrated)
        hf_rfa.set_softmax_heads(models[LINEAR], [])
    if ids is not None:
        models |= equal_bytes_columns(convert, calibrated, ids, same_bytes)
    return {title: models[title] for title in titles}


def _with_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same parameter objects, and with buffers of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def measure_columns(
    models: Mapping[str, PreTrainedModel],
    documents: Sequence[Tensor],
    num_bytes: Sequence[int],
    settings: ColumnSettings,
    first_token: int | None = None,
    asked: Asked | None = None,
) -> list[Column]:
    """Every model on the same held-out documents; the KL divergence and the agreement are with the first model.

    Args:
        models: name -> model, the original first.
        documents, num_bytes: token ids and UTF-8 bytes of each document.
        first_token: `tokenizer.bos_token_id`.
        asked: the tasks.

    Raises:
        ConfigError: no document reaches the longest context.
        FloatingPointError: logits that are not finite.
    """
    longest, together = max(settings.contexts), torch.cat(list(documents))
    measure = Measurer(
        next(iter(models.values())), evaluated=evaluation_windows(documents, longest, settings.windows).flatten(),
        held_out=together, bytes_per_token=sum(num_bytes) / len(together), contexts=settings.contexts,
        copy_gaps=settings.copy_gaps, first_token=first_token, asked=asked,
    )  # fmt: skip
    columns = {}
    for name, model in models.items():
        more: dict[str, Any] = {}
        if settings.stride:
            whole = [ids[: settings.document_tokens] for ids in documents]
            losses = [sliding_window_nll(model, ids, longest, settings.stride) for ids in whole]
            more |= {"sliding_perplexity": document_perplexity(losses), "stride": settings.stride}
            if is_converted(model):
                more["streaming_perplexity"] = document_perplexity([streaming_nll(model, ids) for ids in whole])
        if settings.passkey_lengths:
            more["passkey"] = passkey_retrieval(model, together, settings.passkey_lengths, first_token=first_token)
        columns[name] = Column(name=name, **vars(measure(model)), **more)
    return list(with_far_recovery(columns, longest).values())


def markdown_table(columns: Sequence[Column]) -> str:
    """One column per model, one row per figure."""
    first = columns[0]
    rows: list[tuple[str, list[str]]] = []

    def add(title: str, values: Iterable[float | None], form: str) -> None:
        cells = ["—" if value is None else format(value, form) for value in values]
        if any(cell != "—" for cell in cells):
            rows.append((title, cells))

    for n in first.perplexity:
        add(f"perplexity, windows of {n} tokens", (c.perplexity[n] for c in columns), ".3f")
    for n in first.bits_per_byte:
        add(f"bits per byte, windows of {n}", (c.bits_per_byte[n] for c in columns), ".4f")
    stride = max(c.stride for c in columns)
    add(
        f"perplexity, sliding window over whole documents, stride {stride}",
        (c.sliding_perplexity for c in columns),
        ".3f",
    )
    add("perplexity, whole documents, state carried", (c.streaming_perplexity for c in columns), ".3f")
    add("KL to the original, nats/token", (c.kl_to_original for c in columns), ".4f")
    add("far recovery", (c.far_recovery for c in columns), ".3f")
    for gap in first.copy_perplexity:
        add(f"copy perplexity, {gap} tokens between", (c.copy_perplexity[gap] for c in columns), ".3f")
    for i, cell in enumerate(first.passkey):
        title = f"passkey, {cell.length} tokens, depth {cell.depth:.2f}"
        add(title, (c.passkey[i].accuracy for c in columns), ".2f")
    add("greedy agreement", (c.greedy_agreement for c in columns), ".3f")
    rows += [(title, cells) for title, *cells in task_rows({c.name: c.tasks for c in columns})]
    add(
        f"cache after {max(first.perplexity)} tokens, MiB",
        (None if c.cache_bytes is None else c.cache_bytes / 2**20 for c in columns),
        ".2f",
    )
    head = "| | " + " | ".join(c.name for c in columns) + " |\n|---|" + "---:|" * len(columns)
    return "\n".join([head, *(f"| {title} | " + " | ".join(cells) + " |" for title, cells in rows)])
