"""Faithfulness of a converted model: perplexity, KL divergence from the original, copying, greedy agreement.

Every function takes a causal LM of Transformers and token ids (N,), int64. Perplexities are exp(nats/token). Windows
are consecutive and separate: tokens [0, context), [context, 2 context), ...; the first token of a window has no
context, so a window gives context - 1 predictions. Models run in evaluation mode, one window at a time, and get their
mode back. Logits that are not finite raise `FloatingPointError`.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_rfa.errors import ConfigError
from hf_rfa.runtime.arguments import cache_argument, cache_of
from hf_rfa.runtime.quiet import evaluation_mode

# Positions whose logits are copied to float32 at a time: 256 with a vocabulary of 128k are 128 MiB.
POSITIONS_AT_ONCE = 256

# The first tokens of a copied span, by which a model recognises it; they are not scored.
COPY_LEAD = 8


@dataclass(frozen=True)
class PositionBin:
    """Perplexity of the tokens at positions `start` <= position < `end` of their window."""

    start: int
    end: int
    perplexity: float


def split_windows(ids: Tensor, context: int, max_windows: int | None = None) -> Tensor:
    """Consecutive windows (num_windows, context) of `ids` (N,); a shorter rest is dropped.

    Raises:
        ConfigError: `ids` is not (N,) int64, `context` or `max_windows` is too small, or no window is full.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise ConfigError(
            f"`ids` must be token ids (N,) of torch.int64. Got shape {tuple(ids.shape)}, {ids.dtype}. Pass one long "
            "sequence, for example `torch.cat(token_lists)`."
        )
    if context < 2:
        raise ConfigError(f"`context` must be at least 2 tokens, one to see and one to predict. Got {context}.")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"`max_windows` must be at least 1. Got {max_windows}. Leave it out to take all.")
    if len(ids) < context:
        raise ConfigError(
            f"A window of {context} tokens needs as many. Got {len(ids)} tokens. Pass more text or lower `context`."
        )
    return ids[: len(ids) // context * context].view(-1, context)[:max_windows]


def token_nll(model: PreTrainedModel, ids: Tensor, context: int, max_windows: int | None = None) -> Tensor:
    """Loss of each predicted token, -log p(x_t | x_<t) in nats: (num_windows, context - 1), float32 on the CPU.

    Column t belongs to the token at position t + 1 of its window.

    Raises:
        ConfigError: fewer than `context` tokens.
        FloatingPointError: a logit is NaN or infinite; the message names window and position.
    """
    rows = []
    with evaluation_mode(model):
        for number, window in enumerate(split_windows(ids, context, max_windows)):
            logits = window_logits(model, window, f"window {number}")
            rows.append(next_token_nll(logits[:-1], window[1:]))
    return torch.stack(rows)


def perplexity(model: PreTrainedModel, ids: Tensor, context: int, max_windows: int | None = None) -> float:
    """exp of the mean loss over all predicted tokens of consecutive windows of `context` tokens (see `token_nll`).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> _ = model.lm_head.weight.data.zero_()   # every token equally likely
        >>> round(perplexity(model, torch.arange(100) % 32, context=20), 3)
        32.0
    """
    return math.exp(token_nll(model, ids, context, max_windows).double().mean())


def bits_per_byte(nll: float, bytes_per_token: float) -> float:
    """`nll / (ln 2 * bytes_per_token)`: comparable between tokenizers, unlike perplexity.

    Args:
        nll: mean loss, nats/token.
        bytes_per_token: size of the text in UTF-8 bytes, divided by its number of tokens.
    """
    if not bytes_per_token > 0:
        raise ConfigError(f"`bytes_per_token` must be positive. Got {bytes_per_token}.")
    return nll / (math.log(2) * bytes_per_token)


def perplexity_by_position(nll: Tensor, first: int = 64) -> list[PositionBin]:
    """Perplexity by position in the window: positions 1 to `first`, then bins that double in length.

    Args:
        nll: loss of each token (num_windows, context - 1), nats, from `token_nll`.
        first: end of the first bin; with the size of the exact window, all later bins have far keys.
    """
    positions = nll.shape[1] + 1
    edges = [1, min(first, positions)]
    while edges[-1] < positions:
        edges.append(min(2 * edges[-1], positions))
    return [
        PositionBin(start, end, math.exp(nll[:, start - 1 : end - 1].double().mean()))
        for start, end in itertools.pairwise(edges)
        if end > start
    ]


def kl_divergence(
    original: PreTrainedModel,
    converted: PreTrainedModel,
    ids: Tensor,
    context: int,
    max_windows: int | None = None,
) -> float:
    """Mean of `KL(original || converted) = sum_v p_v (log p_v - log q_v)` over all positions, nats/token.

    p and q are the next-token distributions of the two models on the same windows. Unlike perplexity, which can
    fall below the original's for an unfaithful model, it is 0 only if the two agree.
    """
    total, count = 0.0, 0
    with evaluation_mode(original, converted):
        for number, window in enumerate(split_windows(ids, context, max_windows)):
            p = window_logits(original, window, f"window {number} of the original")
            q = window_logits(converted, window, f"window {number} of the converted model")
            for p_part, q_part in zip(p.split(POSITIONS_AT_ONCE), q.split(POSITIONS_AT_ONCE), strict=True):
                log_p, log_q = p_part.float().log_softmax(-1), q_part.float().log_softmax(-1)
                total += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            count += len(window)
    return total / count


def copy_perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    gap: int = 300,
    span: int = 128,
    samples: int = 6,
    first_token: int | None = None,
) -> float:
    """Perplexity of a span at its second appearance, `gap` other tokens after the first.

    A sample is `[first_token] span other span`. The first `COPY_LEAD` tokens of the second appearance are not scored.
    A model that copies comes near 1; one that cannot see the first appearance has the perplexity of ordinary text.

    Args:
        gap: number of tokens between the two appearances; larger than two exact windows, it measures far recall.
        span: length of the span, tokens.
        samples: number of samples, spread evenly over `ids`.
        first_token: the token that texts start with (`tokenizer.bos_token_id`), if any.

    Raises:
        ConfigError: not enough tokens for the samples.
    """
    if span <= COPY_LEAD or gap < 0 or samples < 1:
        raise ConfigError(
            f"Needs `span` > {COPY_LEAD}, `gap` >= 0 and `samples` >= 1. Got {span}, {gap} and {samples}."
        )
    stride = (len(ids) - gap) // (samples + 1)
    if stride < span:
        raise ConfigError(
            f"{samples} samples of a span of {span} and a gap of {gap} need {(samples + 1) * span + gap} tokens. Got "
            f"{len(ids)}. Pass more text or fewer `samples`."
        )
    start = ids.new_tensor([] if first_token is None else [first_token])
    losses = []
    with evaluation_mode(model):
        for i in range(samples):
            copied = ids[i * stride : i * stride + span]
            other = ids[(i + 1) * stride : (i + 1) * stride + gap]
            sequence = torch.cat([start, copied, other, copied])
            logits = window_logits(model, sequence, f"copy sample {i}")
            losses.append(next_token_nll(logits[:-1], sequence[1:])[-(span - COPY_LEAD) :])
    return math.exp(torch.stack(losses).double().mean())


def greedy_continuations(
    model: PreTrainedModel, ids: Tensor, prompt: int = 512, new: int = 200, samples: int = 4
) -> Tensor:
    """Prompts spread evenly over `ids` with `new` greedy tokens of `model` after each: (samples, prompt + new).

    Raises:
        ConfigError: fewer than `samples * prompt` tokens.
    """
    stride = len(ids) // max(samples, 1)
    if prompt < 1 or new < 1 or samples < 1 or stride < prompt:
        raise ConfigError(
            f"Needs `samples` * `prompt` tokens, each at least 1, and `new` at least 1. Got {len(ids)} tokens, "
            f"samples={samples}, prompt={prompt}, new={new}."
        )
    sequences = torch.stack([ids[i * stride : i * stride + prompt] for i in range(samples)]).to(model.device)
    unseen, cache = sequences, None
    with evaluation_mode(model):
        # Not `generate`, which may stop early or change the ranking of tokens.
        for _ in range(new):
            output = model(input_ids=unseen, **{cache_argument(model): cache}, use_cache=True)
            unseen, cache = output.logits[:, -1:].argmax(-1), cache_of(output)
            sequences = torch.cat([sequences, unseen], 1)
    return sequences


def greedy_agreement(converted: PreTrainedModel, continuations: Tensor, prompt: int = 512) -> float:
    """Share of the original's greedy tokens that the converted model ranks first, given the original's own prefix.

    Args:
        continuations: (samples, prompt + new), from `greedy_continuations(original, ...)`.
        prompt: number of given tokens in each row.
    """
    same = []
    with evaluation_mode(converted):
        for number, sequence in enumerate(continuations):
            logits = window_logits(converted, sequence, f"greedy sample {number}")
            same.append(logits[prompt - 1 : -1].argmax(-1) == sequence[prompt:].to(logits.device))
    return torch.stack(same).float().mean().item()


def far_recovery(nll_original: float, nll_window: float, nll_converted: float) -> float | None:
    """Share of the window's loss that the far part recovers, from mean losses in nats/token.

        (nll_window - nll_converted) / (nll_window - nll_original)

    1: as good as the original. 0: the far part recovers nothing. Below 0: it does harm. None if the window loses
    less than 0.001 nats: then there is nothing to recover.
    """
    lost = nll_window - nll_original
    return None if lost < 1e-3 else (nll_window - nll_converted) / lost


def window_logits(model: PreTrainedModel, window: Tensor, where: str, **inputs: Any) -> Tensor:
    """Logits (n, vocabulary) of one sequence (n,), in the model's dtype.

    Args:
        where: name of the sequence in messages.
        inputs: further arguments of the model; by default `use_cache=False`.

    Raises:
        FloatingPointError: a logit is NaN or infinite; the message has `where` and the first such position.
    """
    logits = model(input_ids=window[None].to(model.device), **{"use_cache": False, **inputs}).logits[0]
    # A single -inf is allowed: a model may rule a token out.
    broken = ~logits.amax(-1).isfinite() | logits.isnan().any(-1)
    if broken.any():
        position = int(broken.nonzero()[0])
        raise FloatingPointError(
            f"The logits at position {position} of {where} are not finite ({int(broken.sum())} of {len(window)} "
            "positions are broken). Check the weights for NaN, and run the model in float32 or bfloat16 instead of "
            "float16."
        )
    return logits


def next_token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Loss (n,) in nats, float32 on the CPU, of targets (n,) under logits (n, vocabulary)."""
    targets = targets.to(logits.device)
    pairs = zip(logits.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
    return torch.cat([F.cross_entropy(part.float(), target, reduction="none") for part, target in pairs]).cpu()
