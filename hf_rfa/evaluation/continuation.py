"""Divergence from the original on what follows a document that was read into a cache."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.measures import POSITIONS_AT_ONCE, window_logits
from hf_rfa.evaluation.speed import prefill
from hf_rfa.runtime.arguments import cache_argument
from hf_rfa.runtime.cache import cache_bytes
from hf_rfa.runtime.quiet import evaluation_mode


def continuation_kl(
    original: PreTrainedModel, model: PreTrainedModel, document: Tensor, continuation: Tensor
) -> float:
    """Mean of `KL(original || model)` over the tokens of a continuation (m,) of a document (n,), nats/token.

    Both read the document first and then the continuation, as it is (teacher-forced), all of it at once. So a cache
    that is made smaller at the end of the document is judged by what it still knows of it; the tokens of the document
    itself do not count. That is how a peer that compresses a full cache after reading can be measured.

    Raises:
        ConfigError: an empty document or continuation.
        FloatingPointError: logits that are not finite.
    """
    before = logits_behind(original, document, continuation)[0]
    return divergence(before, logits_behind(model, document, continuation)[0])


def logits_behind(model: PreTrainedModel, document: Tensor, continuation: Tensor) -> tuple[Tensor, int]:
    """Logits (m, V) of a continuation (m,) behind a document (n,), and the bytes of the cache between them.

    Raises:
        ConfigError: an empty document or continuation.
        FloatingPointError: logits that are not finite.
    """
    if not len(document) or not len(continuation):
        raise ConfigError(
            f"Needs a document and a continuation of at least one token each. Got {len(document)} and "
            f"{len(continuation)}. Pass more text."
        )
    with evaluation_mode(model):
        cache = prefill(model, document)[0]
        size = cache_bytes(cache)
        inputs: dict[str, Any] = {cache_argument(model): cache, "use_cache": True}
        return window_logits(model, continuation, "the continuation", **inputs), size


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean of KL(p || q) over the tokens of logits (m, V), nats/token."""
    total = sum(
        F.kl_div(q_part.float().log_softmax(-1), p_part.float().log_softmax(-1), reduction="sum", log_target=True)
        for p_part, q_part in zip(p.split(POSITIONS_AT_ONCE), q.split(POSITIONS_AT_ONCE), strict=True)
    )
    return float(total) / len(p)
