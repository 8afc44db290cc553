"""Exact softmax attention for the heads and layers that are not converted, without an N x N tensor.

Scaled dot-product attention does the work. Its causal flag covers the plain case; otherwise (padding, packing, a cache
before the queries) queries are processed in blocks, so that only a few rows of the mask exist at a time and memory
stays linear.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.recomputing import made_again, transformed

#: Rows of the mask per block, if a mask is needed.
QUERY_BLOCK = 256


@dataclass(frozen=True)
class MaskBlock:
    """The mask of queries `start` to `stop` over keys `low` to `high`: `visible` (B, 1, rows, high - low) bool."""

    start: int
    stop: int
    low: int
    high: int
    visible: torch.Tensor


def exact_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    causal: bool,
    layout: TokenLayout,
    past_mask: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Softmax attention (B, H, N, M) of q (B, H, N, D) over k (B, Hk, T, D), v (B, Hk, T, M), T = past + N.

    `layout` describes the new tokens (the last N keys), `past_mask` (B, T - N) the older ones (None: all tokens).
    `sink_logits` (H,) are added to the denominator only. `sliding_window` W: a token sees itself and the W - 1 slots
    before it (causal only), in time O(N W). Padding rows get zeros.
    """
    length, total = query.shape[2], key.shape[2]
    past = total - length
    groups = query.shape[1] // key.shape[1]
    value_dim = value.shape[-1]
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": groups > 1}
    if sliding_window is not None and sliding_window >= total:
        sliding_window = None
    if sink_logits is not None:
        # An extra key with the learned logit and value zero.
        key, value, query = _with_sink(key, value, query, sink_logits, scaling, groups)
        options["enable_gqa"] = False
    # Pad to equal dims with zeros: with unequal dims torch does not use its linear-memory kernel on the CPU.
    widest = max(query.shape[-1], value_dim)
    query, key, value = (_widened(t, widest) for t in (query, key, value))
    simple = layout.is_plain and past_mask is None and sink_logits is None and sliding_window is None
    if simple and (not causal or length == 1):
        return F.scaled_dot_product_attention(query, key, value, **options)[..., :value_dim]
    if simple and past == 0:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)[..., :value_dim]
    device = query.device
    token_mask = _key_mask(layout, past_mask, query.shape[0], length, past, device)
    segment_ids = layout.ordinal
    if segment_ids is not None:
        segment_ids = segment_ids.to(device)
        # The past continues the row's first document.
        segment_ids = torch.cat([segment_ids[:, :1].expand(-1, past), segment_ids], dim=1)

    seen = None
    if segment_ids is not None and not torch.compiler.is_compiling():  # a graph must not depend on the documents' ends
        seen = _seen(layout, len(query), length, past)

    def block(start: int, block_query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        rows = past + torch.arange(start, start + block_query.shape[2], device=device)
        low = 0 if sliding_window is None else max(0, past + start - sliding_window + 1)
        high = past + start + len(rows) if causal else total
        if seen is not None:
            first, stop = (x[:, start : start + len(rows)] for x in seen)
            low, high = max(low, int(first.min())), min(high, int(stop.max()))
        columns = torch.arange(low, high, device=device)
        visible = token_mask[:, None, low:high].expand(-1, len(rows), -1)
        if causal:
            visible = visible & (columns <= rows[:, None])
        if sliding_window is not None:
            visible = visible & (columns > rows[:, None] - sliding_window)
        if segment_ids is not None:
            visible = visible & (segment_ids[:, rows, None] == segment_ids[:, None, low:high])
        # Padding sees itself, so that no row is empty.
        visible = visible | (columns == rows[:, None])
        block_key, block_value = key[:, :, low:high], value[:, :, low:high]
        if sink_logits is not None:
            visible = torch.cat([visible, visible.new_ones(*visible.shape[:-1], 1)], dim=-1)
            block_key = torch.cat([block_key, key[:, :, total:]], dim=2)
            block_value = torch.cat([block_value, value[:, :, total:]], dim=2)
        mask = visible.unsqueeze(1)
        return F.scaled_dot_product_attention(block_query, block_key, block_value, attn_mask=mask, **options)

    # Recomputed in the backward pass: the masks of all blocks together would be an N x N tensor.
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    outputs = []
    for number, part in enumerate(query.split(QUERY_BLOCK, dim=2)):
        run: Callable[..., torch.Tensor] = partial(block, number * QUERY_BLOCK)
        if trained and transformed(part):
            run = partial(made_again, run)
        elif trained:
            run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
        outputs.append(run(part, key, value))
    output = torch.cat(outputs, dim=2)[..., :value_dim]
    return output if layout.token_mask is None else output * layout.token_mask.to(output)[:, None, :, None]


def _widened(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The tensor with zeros up to `dim`; itself if it is as wide: `F.pad` would copy all keys of a cache."""
    missing = dim - tensor.shape[-1]
    return F.pad(tensor, (0, missing)) if missing else tensor


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Iterable[MaskBlock],
    *,
    scaling: float,
    sink_logits: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention (B, H, N, M) under any mask, given in blocks of rows; rows that see nothing get zeros."""
    groups = query.shape[1] // key.shape[1]
    value_dim = value.shape[-1]
    if sink_logits is not None:
        key, value, query = _with_sink(key, value, query, sink_logits, scaling, groups)
    widest = max(query.shape[-1], value_dim)
    query, key, value = (_widened(t, widest) for t in (query, key, value))
    outputs = []
    for block in blocks:
        visible = block.visible
        sees = visible.any(dim=-1, keepdim=True)
        visible = visible | ~sees
        keys, values = key[:, :, block.low : block.high], value[:, :, block.low : block.high]
        if sink_logits is not None:
            visible = torch.cat([visible, visible.new_ones(*visible.shape[:-1], 1)], dim=-1)
            keys, values = torch.cat([keys, key[:, :, -1:]], dim=2), torch.cat([values, value[:, :, -1:]], dim=2)
        output = F.scaled_dot_product_attention(
            query[:, :, block.start : block.stop], keys, values, attn_mask=visible, scale=scaling, dropout_p=dropout,
            enable_gqa=query.shape[1] != key.shape[1],
        )  # fmt: skip
        outputs.append(output.masked_fill(~sees, 0.0))
    return torch.cat(outputs, dim=2)[..., :value_dim]


def cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    key_mask: torch.Tensor | None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention of q (B, H, N, D) over another sequence's keys (B, Hk, T, D); key_mask (B, T) or None."""
    mask = None if key_mask is None else key_mask.to(query.device)[:, None, None, :]
    enable_gqa = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout, enable_gqa=enable_gqa
    )


def _seen(layout: TokenLayout, batch: int, length: int, past: int) -> tuple[np.ndarray, np.ndarray]:
    """The first key of each query's document (B, N), and the key behind its last (B, N)."""
    first, stop = layout.documents(batch, length).bounds()
    return np.where(first > 0, first + past, 0), stop + past  # the past continues a row's first document


def _key_mask(
    layout: TokenLayout, past_mask: torch.Tensor | None, batch: int, length: int, past: int, device: torch.device
) -> torch.Tensor:
    new = (
        torch.ones(batch, length, dtype=torch.bool, device=device)
        if layout.token_mask is None
        else layout.token_mask.to(device)
    )
    old = torch.ones(batch, past, dtype=torch.bool, device=device) if past_mask is None else past_mask.to(device)
    return torch.cat([old, new], dim=1)


def _with_sink(
    key: torch.Tensor, value: torch.Tensor, query: torch.Tensor, sink_logits: torch.Tensor, scaling: float, groups: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = query.shape
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    # q gets one more component, 1 / scaling; there k has 0, and the sink key has its logit and 0 elsewhere.
    query = torch.cat([query, query.new_full((batch, heads, length, 1), 1 / scaling)], dim=-1)
    key = torch.cat([key, key.new_zeros(*key.shape[:-1], 1)], dim=-1)
    sink = key.new_zeros(batch, heads, 1, key.shape[-1])
    sink[..., -1] = sink_logits.to(key.dtype).view(1, heads, 1)
    return (
        torch.cat([key, sink], dim=2),
        torch.cat([value, value.new_zeros(batch, heads, 1, value.shape[-1])], dim=2),
        query,
    )
