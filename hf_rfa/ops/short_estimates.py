"""Short documents of pure RFA (`window = 0`): every key is estimated, but they are few enough to be summed directly.

Documents of at most one chunk that continue no state and leave none share tiles (`ops.tiles`). Each tile computes a
small matrix psi(q).psi(k) and needs no running sums.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics, Part, combine
from hf_rfa.ops.state import accumulation_dtype
from hf_rfa.ops.tiles import BLOCK_SLOTS, ShortPlan, Tiles, put_blocks, taken_blocks, token_rows


def short_estimates(call: OperatorCall, plan: ShortPlan) -> torch.Tensor:
    """The output (B, Hk, G, N, M) for the short documents of a call, zero for all other tokens; float32 or wider.

    The far kernel must be in float32 or float64.
    """
    rows = [token_rows(x) for x in (call.query.movedim(2, 3).flatten(3), call.key, call.value)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (*rows, *_tensors(call)))
    recorded = recorded and sum(tiles.source.numel() for tiles in plan.tiles) > BLOCK_SLOTS
    # Recomputed in the backward pass: the features of all tokens would take many times the memory of q and k.
    run: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if recorded else _call
    blocks = []
    for tiles, (query, key, value) in taken_blocks(plan, rows, call.key.shape[1]):
        answer, counts = run(_block, call, tiles, query, key, value)
        if call.statistics is not None:
            call.statistics.add_counts(counts)
        blocks.append((tiles, answer))
    return put_blocks(blocks, (*call.query.shape[:-1], call.value.shape[-1]))


def _block(
    call: OperatorCall, tiles: Tiles, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (t, Hk, T * G, M) for q (t, Hk, T, G * D), k and v, and the `FarStatistics.counts` of the tiles."""
    far, groups, wide = call.far, call.query.shape[2], accumulation_dtype(call.query.dtype)
    query, key, value = query.to(wide).unflatten(-1, (groups, -1)), key.to(wide), value.to(wide)
    features, query_scale = far.query_features(query.flatten(2, 3), call.scaling)
    key_features, key_scale = far.key_features(key, call.scaling)
    filled = tiles.segment_ids >= 0
    log_gate = far.log_gate(key)
    if log_gate is not None:  # key j weighs exp(sum of log g behind it): a difference of two sums of a document
        decay = log_gate.masked_fill(~filled.unsqueeze(1), 0.0).cumsum(-1)
        key_scale, query_scale = key_scale - decay, query_scale + decay.repeat_interleave(groups, -1)
    log_weights = key_scale.unsqueeze(-2).masked_fill(~tiles.visible(call.causal).unsqueeze(1), -torch.inf)
    peak = log_weights.detach().amax(-1)  # over the keys that a query sees, so that later keys change nothing
    weights = (log_weights - peak.unsqueeze(-1)).exp().repeat_interleave(groups, 2)
    weights = weights * (features @ key_features.mT)
    log_scale = query_scale + peak.repeat_interleave(groups, -1) + far.log_gamma().view(-1, 1)
    part = Part(weights @ value, weights.sum(-1), log_scale)
    logits = None if call.sink_logits is None else call.sink_logits.to(wide).repeat(1, tiles.source.shape[1])
    counted, statistics = filled.repeat_interleave(groups, 1).unsqueeze(1), FarStatistics()
    output = combine(None, part, logits, statistics, counted)
    return output, statistics.counts()


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _tensors(call: OperatorCall) -> list[torch.Tensor]:
    """The tensors besides q, k, v that may need gradients."""
    return [t for t in (*vars(call.far).values(), call.sink_logits) if isinstance(t, torch.Tensor)]
