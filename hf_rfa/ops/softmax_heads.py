"""The key heads of a converted layer that stay exact softmax, with a KV cache of their own in the layer's state."""

import dataclasses

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.softmax import exact_attention
from hf_rfa.ops.state import RFAState


@dataclasses.dataclass(frozen=True)
class ExactCache:
    """Keys (B, He, T, D) and values (B, He, T, M) of the exact heads; valid (B, T) bool, None if all hold a token."""

    key: torch.Tensor
    value: torch.Tensor
    valid: torch.Tensor | None

    @classmethod
    def of_state(cls, state: RFAState | None) -> "ExactCache | None":
        """What a state holds of the exact heads."""
        if state is None or state.exact_key is None or state.exact_value is None:
            return None
        return cls(state.exact_key, state.exact_value, state.exact_valid)

    def select_rows(self, rows: torch.Tensor) -> "ExactCache":
        """That of some rows (n,) int64 of the batch."""
        rows = rows.to(self.key.device)
        valid = None if self.valid is None else self.valid.index_select(0, rows)
        return ExactCache(self.key.index_select(0, rows), self.value.index_select(0, rows), valid)

    def into(self, state: RFAState) -> RFAState:
        """The state with this in it."""
        return dataclasses.replace(state, exact_key=self.key, exact_value=self.value, exact_valid=self.valid)


def exact_heads(call: OperatorCall, cache: ExactCache | None) -> tuple[torch.Tensor, ExactCache]:
    """A call of exact heads over all keys; the output (B, He, G, N, M) and the cache with the new tokens in it."""
    # Under autocast q and k come in float32 (from RoPE), v in bfloat16: the dtype in which softmax would run.
    value, past_valid = call.value, None
    query, key, layout = call.query.to(value.dtype), call.key.to(value.dtype), call.layout
    if cache is not None:
        past_valid = cache.valid
        key = torch.cat([cache.key.to(key.dtype), key], dim=2)
        value = torch.cat([cache.value.to(value.dtype), value], dim=2)
    output = exact_attention(
        query.flatten(1, 2),
        key,
        value,
        scaling=call.scaling,
        causal=call.causal,
        layout=layout,
        past_valid=past_valid,
        sliding_window=call.sliding_window,
        sink_logits=None if call.sink_logits is None else call.sink_logits.flatten(),
    ).unflatten(1, (-1, call.query.shape[2]))
    valid = _cache_valid(layout, past_valid, key.shape[2], len(key), key.device)
    if call.sliding_window is not None:  # no later token sees more
        kept = slice(max(0, key.shape[2] - call.sliding_window + 1), None)
        key, value, valid = key[:, :, kept], value[:, :, kept], None if valid is None else valid[:, kept]
    return output, ExactCache(key, value, valid)


def _cache_valid(
    layout: TokenLayout, past_valid: torch.Tensor | None, total: int, batch: int, device: torch.device
) -> torch.Tensor | None:
    """Which slots of the exact heads' cache the next token may see: tokens of the row's last document."""
    if layout.is_plain and past_valid is None:
        return None
    valid = torch.ones(batch, total, dtype=torch.bool, device=device)
    if past_valid is not None:
        valid[:, : past_valid.shape[1]] &= past_valid.to(device)
    if layout.valid is not None:
        valid[:, total - layout.valid.shape[1] :] &= layout.valid.to(device)
    if layout.ordinal is not None:
        document = layout.ordinal.to(device)
        past = total - document.shape[1]
        valid &= torch.cat([document[:, :1].expand(-1, past), document], dim=1) == document[:, -1:]
    return valid


def count_only(call: OperatorCall) -> RFAState:
    """The state of a layer without linear heads: nothing but the number of tokens."""
    state, layout = call.state or call.empty_state(), call.layout
    counted = torch.ones(len(call.query), call.query.shape[3], dtype=torch.bool)
    before = state.count
    if layout.valid is not None:
        counted = counted & layout.valid.cpu()
    if layout.ordinal is not None:
        ordinal = layout.ordinal.cpu()
        counted, before = counted & (ordinal == ordinal[:, -1:]), before * (ordinal[:, -1] == 0)
    return dataclasses.replace(state, count=before + counted.sum(1))
