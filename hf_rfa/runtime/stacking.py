"""Caches of several texts as the rows of one: a server's batch, which texts join and leave between two steps.

A converted layer's state has the same size for every text, so that a batch is a stack of states. What grows with the
text (exact heads, layers that are not converted) is padded in front to the length of the longest row, and the forward
is told so by an attention mask padded in the same way, and by `position_ids`. Rows have no padding anywhere else.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from hf_rfa.errors import StaleStateError, UnsupportedModelError
from hf_rfa.ops.state import RFAState
from hf_rfa.runtime.cache import RFACacheLayer


def stack_caches(caches: Sequence[Cache]) -> DynamicCache:
    """One cache with the rows of all of `caches`, in their order; they are not changed.

    Raises:
        UnsupportedModelError: A layer holds something else than keys and values, or the state of a converted layer.
        StaleStateError: They were filled by different conversions.

    Example:
        >>> import torch, hf_rfa
        >>> from hf_rfa.runtime.arguments import cache_of
        >>> from hf_rfa.runtime.stacking import stack_caches
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), calibrate=False).eval()
        >>> with torch.no_grad():
        ...     caches = [cache_of(model(torch.ones(1, n, dtype=torch.long), use_cache=True)) for n in (20, 300)]
        >>> stack_caches(caches).layers[0].state.count.tolist()
        [20, 300]
    """
    stacked = DynamicCache()
    stacked.layers = [_stacked(layers) for layers in zip(*(cache.layers for cache in caches), strict=True)]
    return stacked


def keep_rows(cache: Cache, rows: Sequence[int], width: int) -> None:
    """Keep these rows of a stacked cache, and of its slots the last `width`: the tokens of the longest of them."""
    index = torch.tensor(rows, dtype=torch.int64)
    for layer in cache.layers:
        _keep(layer, index, width)


def _stacked(layers: Sequence[CacheLayerMixin]) -> CacheLayerMixin:
    first = layers[0]
    if all(type(layer) is DynamicLayer for layer in layers):
        new = copy.copy(first)
        width = max(layer.get_seq_length() for layer in layers)
        new.keys = torch.cat([_padded(layer.keys, width) for layer in layers])
        new.values = torch.cat([_padded(layer.values, width) for layer in layers])
        return new
    states = [layer for layer in layers if type(layer) is RFACacheLayer]
    if len(states) < len(layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise UnsupportedModelError(
            f"Texts of different lengths cannot share a batch in cache layers of the kind {', '.join(kinds)}. Got a "
            "model with them (recurrent layers, for example). Run its texts one by one, with `model.generate`."
        )
    return _stacked_states(states)


def _stacked_states(layers: Sequence[RFACacheLayer]) -> RFACacheLayer:
    first = layers[0]
    if any((layer.filled_by, layer.draw) != (first.filled_by, first.draw) for layer in layers):
        raise StaleStateError(
            "These caches were filled by different conversions, or by different draws of omega: their states cannot "
            "share a batch. Start new sequences."
        )
    if any(layer.given is not None or layer.record_past for layer in layers):
        raise UnsupportedModelError(
            "A cache that records its past, or holds the keys of a plain one, cannot share a batch. Start with empty "
            "caches."
        )
    states = [state for layer in layers if (state := layer.state) is not None]
    new = copy.copy(first)
    new.state = RFAState.cat(states) if states else None
    new.seen = max(layer.seen for layer in layers)
    new._steps = []
    new.companions = {
        name: _stacked_states([layer.companions[name] for layer in layers]) for name in first.companions
    }  # fmt: skip
    return new


def _keep(layer: Any, rows: torch.Tensor, width: int) -> None:
    if isinstance(layer, RFACacheLayer):
        state = layer.state
        layer.state = None if state is None else state.select_rows(rows).narrowed(width)
        layer.seen = width
        for companion in layer.companions.values():
            _keep(companion, rows, width)
    else:
        for name in ("keys", "values"):
            tensor = getattr(layer, name)
            kept = tensor[:, :, max(0, tensor.shape[2] - width) :]
            setattr(layer, name, kept.index_select(0, rows.to(tensor.device)))


def _padded(tensor: torch.Tensor | None, width: int) -> torch.Tensor:
    assert tensor is not None  # of a layer that has seen tokens
    return F.pad(tensor, (0, 0, width - tensor.shape[2], 0))
