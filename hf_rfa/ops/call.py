"""The arguments of the operator, checked once, at the door."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from hf_rfa.errors import ConfigError
from hf_rfa.feature_maps import FarKernel, check_feature_map, optimal_proposal
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.state import RFAState, accumulation_dtype

PerHead = float | torch.Tensor


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """The checked arguments of one call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    far: FarKernel
    window: int
    sink_tokens: int
    scaling: float
    layout: TokenLayout
    softmax_heads: tuple[int, ...]
    sliding_window: int | None
    sink_logits: torch.Tensor | None

    @classmethod
    def check(
        cls, query, key, value, omega, feature_map, window, sink_tokens, alpha, gamma, proposal, scaling, valid,
        document, layout, softmax_heads, sliding_window, sink_logits, initial_state, causal,
    ) -> "OperatorCall":  # fmt: skip
        check_feature_map(feature_map)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4 or not tensor.is_floating_point():
                got = (
                    f"{tensor.dtype} {tuple(tensor.shape)}"
                    if isinstance(tensor, torch.Tensor)
                    else type(tensor).__name__
                )
                raise ConfigError(
                    f"`{name}` must be a floating-point tensor (batch, heads, seq, dim). Got {got}. Reshape it."
                )
        batch, heads, length, dim = query.shape
        key_heads = key.shape[1]
        _expect("key", key.shape, (batch, key_heads, length, dim), "(batch, key_heads, seq, head_dim of query)")
        _expect(
            "value", value.shape, (batch, key_heads, length, value.shape[-1]), "(batch, key_heads, seq, value_dim)"
        )
        if length == 0 or key_heads == 0 or heads % key_heads:
            raise ConfigError(
                f"There must be at least one token and a number of query heads that key heads divide. Got {length} tokens, "
                f"{heads} query heads, {key_heads} key heads. Pass key and value without repetition."
            )
        if omega.dim() != 3 or omega.shape[0] != key_heads or omega.shape[2] != dim:
            raise ConfigError(
                f"`omega` must have shape (key_heads, num_features, head_dim) = ({key_heads}, m, {dim}). Got "
                f"{tuple(omega.shape)}. Draw it with `hf_rfa.omega.draw_omega`."
            )
        if window < 0 or not sink_tokens >= 0 or (window and sink_tokens > window):
            raise ConfigError(
                f"`window` must be >= 0 and `sink_tokens` between 0 and `window`. Got window={window}, "
                f"sink_tokens={sink_tokens}. Set, for example, window=64, sink_tokens=4."
            )
        if layout is None:
            layout = TokenLayout(None if valid is None else valid.bool(), document)
        elif valid is not None or document is not None:
            raise ConfigError("`layout` already holds `valid` and `document`. Got both. Pass one or the other.")
        layout.check(batch, length)
        if sink_logits is not None:
            _expect("sink_logits", sink_logits.shape, (heads,), "(query heads,)")
        if any(not 0 <= head < key_heads for head in softmax_heads):
            raise ConfigError(
                f"`softmax_heads` must be key heads 0..{key_heads - 1}. Got {list(softmax_heads)}. Remove the others."
            )
        if sliding_window is not None and (len(set(softmax_heads)) < key_heads or not causal or sliding_window < 1):
            raise ConfigError(
                f"`sliding_window` belongs to causal layers whose key heads are all exact. Got {sliding_window}, causal="
                f"{causal}, softmax_heads={list(softmax_heads)}. Pass all key heads as `softmax_heads`."
            )
        if initial_state is not None and len(initial_state.count) != batch:
            raise ConfigError(
                f"`initial_state` must have as many rows as query. Got {len(initial_state.count)} instead of {batch}. "
                "Use `state.select_rows`."
            )
        wide = accumulation_dtype(query.dtype)

        def per_head(number: PerHead) -> torch.Tensor:
            tensor = torch.as_tensor(number, dtype=wide, device=query.device)
            return tensor.expand(key_heads) if tensor.dim() == 0 else tensor

        if proposal is None:
            proposal = optimal_proposal(torch.tensor(dim / 2), dim)
        far = FarKernel(
            feature_map, omega.to(query.device, wide), per_head(alpha), per_head(gamma), per_head(proposal)
        )
        for name in ("alpha", "gamma", "proposal"):
            _expect(name, getattr(far, name).shape, (key_heads,), "(key heads,)")
        scaling = dim**-0.5 if scaling is None else float(scaling)
        if scaling <= 0:
            raise ConfigError(
                f"`scaling` must be positive. Got {scaling}. Pass the factor that the model applies to q.k."
            )
        return cls(
            query,
            key,
            value,
            far,
            window,
            sink_tokens,
            scaling,
            layout,
            tuple(sorted(set(softmax_heads))),
            sliding_window,
            sink_logits,
        )

    def grouped(self, query: torch.Tensor, key_heads: int) -> torch.Tensor:
        """(B, H, N, D) -> (B, Hk, G, N, D)."""
        return query.unflatten(1, (key_heads, -1))

    def grouped_logits(self, key_heads: int) -> torch.Tensor | None:
        """(H,) -> (Hk, G)."""
        return None if self.sink_logits is None else self.sink_logits.unflatten(0, (key_heads, -1))


def _expect(name: str, got: Sequence[int], want: Sequence[int], meaning: str) -> None:
    if tuple(got) != tuple(want):
        raise ConfigError(
            f"`{name}` must have shape {meaning} = {tuple(want)}. Got {tuple(got)}. Reshape or slice it."
        )
