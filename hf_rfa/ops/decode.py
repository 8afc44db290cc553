"""Token after token of one layer, in place: what a cache keeps between the steps of `generate`."""

from typing import Any

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.recurrent import RecurrentHeads
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.softmax_heads import ExactCache, exact_heads
from hf_rfa.ops.state import RFAState, accumulation_dtype

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Decoder:
    """`rfa_attention` of one token at a time: its arguments checked and prepared once, its near keys written in place.

    For causal layers with linear heads; without gradients. The state that it begins with stays as it is, and what
    `state` hands out never changes.

    Example:
        >>> import torch, hf_rfa
        >>> from hf_rfa.features.omega import draw_omega
        >>> from hf_rfa.ops.arguments import operator_arguments
        >>> from hf_rfa.ops.decode import Decoder
        >>> _ = torch.manual_seed(0)
        >>> q, k, v = (torch.randn(1, 2, 301, 16) for _ in range(3))
        >>> options = {"omega": draw_omega(2, 32, 16, kind="sphere", seed=0, layer=0, draw=0), "alpha": 0.25}
        >>> kernel, settings, _ = operator_arguments(q, k, v, **options)
        >>> whole = hf_rfa.rfa_attention(q, k, v, **options)
        >>> first, last = ([t[:, :, part] for t in (q, k, v)] for part in (slice(300), slice(300, 301)))
        >>> _, state = hf_rfa.rfa_attention(*first, **options, output_final_state=True)
        >>> decoder = Decoder(*last, kernel, settings, state)
        >>> bool((decoder.step(*last) - whole[:, :, 300:]).abs().max() < 1e-5)
        True
    """

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: FarKernel,
        settings: AttentionSettings, state: RFAState | None,
    ) -> None:  # fmt: skip
        """Goes on from `state`, for as long as the kernel's tensors are what they are now.

        query (B, H, 1, D), key (B, Hk, 1, D), value (B, Hk, 1, M): the first token that will come, not yet read.
        """
        call = OperatorCall.of(query, key, value, kernel, settings, TokenLayout(), state)
        linear = call.heads(call.linear_heads) if call.softmax_heads else call
        linear.check_state()
        wide = linear.to(accumulation_dtype(query.dtype))
        self._heads = RecurrentHeads(wide, state or linear.empty_state(), prepare=True)
        self._key_heads, self._wide = key.shape[1], wide.query.dtype
        self._kernel, self._settings, self._kinds = kernel, settings, _kinds(query, key, value)
        self._exact = _ExactPart(call, ExactCache.of_state(state)) if call.softmax_heads else None

    def continues(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: FarKernel,
        settings: AttentionSettings,
    ) -> bool:  # fmt: skip
        """Whether it is made for such tokens, for this very kernel and for these settings."""
        same = self._kernel is kernel and settings.same_as(self._settings)
        return same and self._kinds == _kinds(query, key, value)

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: TokenLayout | None = None,
        statistics: FarStatistics | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The output (B, H, 1, M) of one more token; see `rfa_attention` for the arguments."""
        layout = layout or TokenLayout()
        tokens = query.unflatten(1, (self._key_heads, -1)), key, value
        if self._exact is None:
            return self._linear(*tokens, layout, statistics).flatten(1, 2).to(value.dtype)
        linear, exact = self._exact.split(tokens)
        parts = self._linear(*linear, layout, statistics), self._exact.step(*exact, layout)
        return self._exact.join([part.to(value.dtype) for part in parts]).flatten(1, 2)

    def state(self) -> RFAState:
        """The state after the last token."""
        state, cache = self._heads.state(), None if self._exact is None else self._exact.cache
        return state if cache is None else cache.into(state)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows (n,) int64 of the batch."""
        self._heads.select_rows(rows)
        if self._exact is not None:
            self._exact.select_rows(rows)

    def _linear(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: TokenLayout,
        statistics: FarStatistics | None,
    ) -> torch.Tensor:  # fmt: skip
        wide = self._wide
        return self._heads.step(query.to(wide), key.to(wide), value.to(wide), layout.token_mask, statistics)


class _ExactPart:
    """The exact heads of a layer that has linear ones, too."""

    def __init__(self, call: OperatorCall, cache: ExactCache | None) -> None:
        self._call, self.cache = call.heads(call.softmax_heads).replace(state=None), cache
        order = call.linear_heads + list(call.softmax_heads)
        back = [order.index(head) for head in range(len(order))]
        device = call.query.device
        self._linear_index, self._exact_index, self._back = (
            torch.tensor(heads, device=device) for heads in (call.linear_heads, call.softmax_heads, back)
        )

    def split(self, tokens: Tokens) -> tuple[Tokens, Tokens]:
        """q, k, v (B, Hk, ...) of the linear and of the exact heads."""
        query, key, value = tokens
        linear, exact = (
            (query.index_select(1, index), key.index_select(1, index), value.index_select(1, index))
            for index in (self._linear_index, self._exact_index)
        )
        return linear, exact

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The reverse."""
        return torch.cat(parts, dim=1).index_select(1, self._back)

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """The output (B, He, G, 1, M) of one more token."""
        call = self._call.replace(query=query, key=key, value=value, layout=layout)
        output, self.cache = exact_heads(call, self.cache)
        return output

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.cache is not None:
            self.cache = self.cache.select_rows(rows)


def _kinds(*tokens: torch.Tensor) -> tuple[Any, ...]:
    """What a decoder was made for; outside of inference mode nobody may write into tables that were made in it."""
    return torch.is_inference_mode_enabled(), [(t.shape, t.dtype, t.device) for t in tokens]
