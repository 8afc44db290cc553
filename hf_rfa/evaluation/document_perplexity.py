"""Perplexity of whole documents: over a sliding window, and streaming, with the state carried through the document."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.measures import next_token_nll, window_logits
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.arguments import cache_argument
from hf_rfa.runtime.quiet import evaluation_mode


def sliding_window_nll(model: PreTrainedModel, document: Tensor, context: int, stride: int) -> Tensor:
    """Loss (N - 1,) in nats of each token of a document (N,) but the first, float32 on the CPU.

    Windows of `context` tokens begin every `stride` tokens, and each scores only the tokens that no earlier window has
    scored. So every token has at least `context - stride` tokens of context, as far as the document has them.

    Raises:
        ConfigError: a document below two tokens, or not 1 <= stride < context.
    """
    if len(document) < 2 or not 1 <= stride < context:
        raise ConfigError(
            f"Needs a document of two tokens and 1 <= `stride` < `context`. Got {len(document)} tokens, "
            f"stride={stride}, context={context}."
        )
    losses: list[Tensor] = []
    scored = 1
    with evaluation_mode(model):
        for start in range(0, len(document), stride):
            window = document[start : start + context]
            logits = window_logits(model, window, f"the window at token {start}")
            nll = next_token_nll(logits[:-1], window[1:])
            losses.append(nll[scored - start - 1 :])
            scored = start + len(window)
            if scored == len(document):
                break
    return torch.cat(losses)


def streaming_nll(model: PreTrainedModel, document: Tensor, chunk: int = 512) -> Tensor:
    """Loss (N - 1,) in nats of each token given all tokens before it, the state carried from chunk to chunk.

    With linear heads alone, memory does not depend on N. Heads that stay softmax keep the keys and values of the whole
    document.

    Raises:
        UnsupportedModelError: the model is not converted.
        ConfigError: a document below two tokens, or `chunk` below 1.
        FloatingPointError: logits that are not finite.
    """
    require_adapters(model)
    if len(document) < 2 or chunk < 1:
        raise ConfigError(
            f"Needs a document of two tokens and `chunk` of at least 1. Got {len(document)} tokens and {chunk}."
        )
    cache, losses = DynamicCache(), []
    with evaluation_mode(model):
        for start in range(0, len(document) - 1, chunk):
            piece = document[start : min(start + chunk, len(document) - 1)]
            where = f"the chunk at token {start}"
            logits = window_logits(model, piece, where, **{cache_argument(model): cache}, use_cache=True)
            losses.append(next_token_nll(logits, document[start + 1 : start + 1 + len(piece)]))
    return torch.cat(losses)


def document_perplexity(losses: Sequence[Tensor]) -> float:
    """exp of the mean over all tokens of all documents: documents count by their lengths."""
    return math.exp(torch.cat(list(losses)).double().mean())
