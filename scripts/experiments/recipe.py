"""How the experiments train a converted model: attention transfer, then all weights.

Three in four batches are short, and most of their texts are loops, which only heads that look things up predict; the
fourth is a long plain text. With loops alone copying recovers faster, but the model learns to expect them and is a
seventh worse on other text. The loss is the next-token loss plus `KL_WEIGHT` times the divergence from the original.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

import hf_rfa
from hf_rfa.data import training_batches
from hf_rfa.runtime.record import conversion_config
from hf_rfa.training import FinetuneConfig, Progress, finetune

SHORT, SHORT_ROWS = 640, 2
LONG, LONG_EVERY = 1536, 4
LOOP_PROBABILITY = 0.8
CLUSTER_SCALE = 0.5
KL_WEIGHT = 2.0
LEARNING_RATE, FEATURE_LEARNING_RATE = 4e-4, 3e-3


def transfer(
    model: PreTrainedModel, token_lists: Sequence[torch.Tensor], steps: int, *, cluster_scale: float | None = None,
    seed: int = 0, tokens: int = SHORT, rows: int = SHORT_ROWS, loop_probability: float = 1.0, progress: bool = True,
) -> None:  # fmt: skip
    """`hf_rfa.distill` on `rows` texts of `tokens` at a time, with the loss on attention weights unless the map's
    weights may be negative."""
    feature_map = conversion_config(model).feature_map
    if cluster_scale is None:
        cluster_scale = CLUSTER_SCALE if feature_map == "clustered" else 1.0
    config = hf_rfa.DistillConfig(
        steps=steps, weight_loss=float(feature_map != "trigonometric"), sampled_queries=128,
        cluster_scale=cluster_scale, seed=seed, progress=progress,
    )  # fmt: skip
    batches = training_batches(token_lists, tokens, rows, seed + 1, loop_probability=loop_probability)
    hf_rfa.distill(model, batches, config)


def fine_tune(
    model: PreTrainedModel, original: PreTrainedModel, token_lists: Sequence[torch.Tensor], steps: int, *,
    seed: int = 0, loop_probability: float = LOOP_PROBABILITY, long_tokens: int = LONG,
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None = None, **settings: Any,
) -> Progress:  # fmt: skip
    """`finetune` of all weights and the features; `settings` of `FinetuneConfig` replace those above."""
    usual = {
        "learning_rate": LEARNING_RATE, "feature_learning_rate": FEATURE_LEARNING_RATE, "kl_weight": KL_WEIGHT,
        "mixed_precision": "bf16",
    }  # fmt: skip
    config = FinetuneConfig(**{"steps": steps, **usual, **settings})
    batches = _mixture(token_lists, seed, loop_probability, long_tokens)
    return finetune(model, batches, config, teacher=original if config.kl_weight else None, evaluate=evaluate)


def _mixture(
    token_lists: Sequence[torch.Tensor], seed: int, loop_probability: float, long_tokens: int
) -> Iterator[torch.Tensor]:
    short = training_batches(token_lists, SHORT, SHORT_ROWS, seed, loop_probability=loop_probability)
    long = training_batches(token_lists, long_tokens, 1, seed)
    for number in itertools.count(1):
        yield next(short if number % LONG_EVERY else long)
