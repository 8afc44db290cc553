"""The key heads of a converted layer that stay exact softmax, with their own KV cache in the layer's state."""

import dataclasses

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.softmax import exact_attention
from hf_rfa.ops.state import RFAState


@dataclasses.dataclass(frozen=True)
class ExactCache:
    """Keys (B, He, T, D) and values (B, He, T, M) of the exact heads; token_mask (B, T) bool or None."""

    key: torch.Tensor
    value: torch.Tensor
    token_mask: torch.Tensor | None

    @classmethod
    def of_state(cls, state: RFAState | None) -> "ExactCache | None":
        """The cache of the exact heads in a state; None if it has none."""
        if state is None or state.exact_key is None or state.exact_value is None:
            return None
        return cls(state.exact_key, state.exact_value, state.exact_mask)

    def select_rows(self, rows: torch.Tensor) -> "ExactCache":
        """The cache of some rows (n,) int64 of the batch."""
        rows = rows.to(self.key.device)
        token_mask = None if self.token_mask is None else self.token_mask.index_select(0, rows)
        return ExactCache(self.key.index_select(0, rows), self.value.index_select(0, rows), token_mask)

    def into(self, state: RFAState) -> RFAState:
        """The state with this cache in it."""
        return dataclasses.replace(state, exact_key=self.key, exact_value=self.value, exact_mask=self.token_mask)


def exact_heads(call: OperatorCall, cache: ExactCache | None) -> tuple[torch.Tensor, ExactCache]:
    """Softmax of the exact heads over all keys: output (B, He, G, N, M), and the cache with the new tokens."""
    # Under autocast q and k are float32 (from RoPE) and v is bfloat16, the dtype in which softmax would run.
    value, past_mask = call.value, None
    query, key, layout = call.query.to(value.dtype), call.key.to(value.dtype), call.layout
    if cache is not None:
        past_mask = cache.token_mask
        key = torch.cat([cache.key.to(key.dtype), key], dim=2)
        value = torch.cat([cache.value.to(value.dtype), value], dim=2)
    output = exact_attention(
        query.flatten(1, 2),
        key,
        value,
        scaling=call.scaling,
        causal=call.causal,
        layout=layout,
        past_mask=past_mask,
        sliding_window=call.sliding_window,
        sink_logits=None if call.sink_logits is None else call.sink_logits.flatten(),
    ).unflatten(1, (-1, call.query.shape[2]))
    token_mask = _cache_valid(layout, past_mask, key.shape[2], len(key), key.device)
    if call.sliding_window is not None:  # later tokens see no more than this
        kept = slice(max(0, key.shape[2] - call.sliding_window + 1), None)
        key, value, token_mask = (
            key[:, :, kept],
            value[:, :, kept],
            None if token_mask is None else token_mask[:, kept],
        )
    return output, ExactCache(key, value, token_mask)


def _cache_valid(
    layout: TokenLayout, past_mask: torch.Tensor | None, total: int, batch: int, device: torch.device
) -> torch.Tensor | None:
    """The slots of the exact heads' cache that the next token may see: tokens of the row's last document."""
    if layout.is_plain and past_mask is None:
        return None
    token_mask = torch.ones(batch, total, dtype=torch.bool, device=device)
    if past_mask is not None:
        token_mask[:, : past_mask.shape[1]] &= past_mask.to(device)
    if layout.token_mask is not None:
        token_mask[:, total - layout.token_mask.shape[1] :] &= layout.token_mask.to(device)
    if layout.ordinal is not None:
        segment_ids = layout.ordinal.to(device)
        past = total - segment_ids.shape[1]
        token_mask &= torch.cat([segment_ids[:, :1].expand(-1, past), segment_ids], dim=1) == segment_ids[:, -1:]
    return token_mask


def count_only(call: OperatorCall) -> RFAState:
    """The state of a layer without linear heads: only the number of tokens."""
    state, layout = call.state or call.empty_state(), call.layout
    counted = torch.ones(len(call.query), call.query.shape[3], dtype=torch.bool)
    before = state.count
    if layout.token_mask is not None:
        counted = counted & layout.token_mask.cpu()
    if layout.ordinal is not None:
        ordinal = layout.ordinal.cpu()
        counted, before = counted & (ordinal == ordinal[:, -1:]), before * (ordinal[:, -1] == 0)
    return dataclasses.replace(state, count=before + counted.sum(1))
