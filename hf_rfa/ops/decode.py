"""In-place decoding of one layer, token by token: a cache keeps this object between the steps of `generate`."""

import dataclasses
from typing import Any

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.dispatch import decoding_form
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.recurrent import RecurrentHeads
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.softmax_heads import ExactCache, exact_heads
from hf_rfa.ops.state import RFAState, accumulation_dtype

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Decoder:
    """`rfa_attention` for one token at a time: arguments are checked and prepared once, near keys written in place.

    For causal layers with linear heads; without gradients. The initial state is not modified, and a state that `state`
    has returned never changes.

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
        """Continue from `state`; valid as long as the kernel's tensors do not change.

        query (B, H, 1, D), key (B, Hk, 1, D), value (B, Hk, 1, M): the first token to come, which is not consumed.
        """
        call = OperatorCall.of(query, key, value, kernel, settings, TokenLayout(), state)
        wide = accumulation_dtype(query.dtype)
        self._groups: list[RecurrentHeads] = []
        self._fused: Any = None
        groups = call.groups()
        parts = [heads for heads, _ in groups]
        for _, group in groups:
            group.check_state()
        wide_groups = [(heads, group.to(wide)) for heads, group in groups]
        if groups and decoding_form(call) == "triton":
            # Imported here: not every machine has Triton, and the import takes a second.
            from hf_rfa.ops.triton.decoding import FusedHeads

            self._fused = FusedHeads(wide_groups)
        else:
            self._groups = [
                RecurrentHeads(group, group.state or group.empty_state(), prepare=True) for _, group in wide_groups
            ]
        self._exact = None
        if call.softmax_heads:
            exact = call.heads(call.softmax_heads).replace(state=None)
            self._exact = _ExactPart(exact, ExactCache.of_state(state))
            parts.append(list(call.softmax_heads))
        self._key_heads, self._wide, self._exact_heads = key.shape[1], wide, list(call.softmax_heads)
        self._kernel, self._settings, self._kinds = kernel, settings, _kinds(query, key, value)
        self._split = _Split(parts, query.device) if len(parts) > 1 else None

    def continues(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: FarKernel,
        settings: AttentionSettings,
    ) -> bool:  # fmt: skip
        """Whether this decoder was made for tokens of this kind, this very kernel and these settings."""
        same = self._kernel is kernel and settings.same_as(self._settings)
        return same and self._kinds == _kinds(query, key, value)

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: TokenLayout | None = None,
        statistics: FarStatistics | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """The output (B, H, 1, M) for one more token; see `rfa_attention` for the arguments."""
        layout = layout or TokenLayout()
        tokens = query.unflatten(1, (self._key_heads, -1)), key, value
        if self._fused is not None:
            return self._step_fused(tokens, layout, statistics).flatten(1, 2)
        if self._split is None:
            return self._linear(self._groups[0], tokens, layout, statistics).flatten(1, 2).to(value.dtype)
        of_parts = self._split.apart(tokens)
        pairs = zip(self._groups, of_parts, strict=False)
        answers = [self._linear(group, part, layout, statistics) for group, part in pairs]
        if self._exact is not None:
            answers.append(self._exact.step(*of_parts[-1], layout))
        return self._split.together([answer.to(value.dtype) for answer in answers]).flatten(1, 2)

    def state(self) -> RFAState:
        """The state after the last token."""
        if self._fused is None:
            first, *others = (group.state() for group in self._groups)
            state = dataclasses.replace(first, beside=tuple(others)) if others else first
        else:
            state = self._fused.state()
        return state if self._exact is None or self._exact.cache is None else self._exact.cache.into(state)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Continue with these rows (n,) int64 of the batch."""
        for group in (*self._groups, *(() if self._fused is None else (self._fused,))):
            group.select_rows(rows)
        if self._exact is not None:
            self._exact.select_rows(rows)

    def _step_fused(
        self, tokens: Tokens, layout: TokenLayout, statistics: FarStatistics | None
    ) -> torch.Tensor:  # fmt: skip
        """The output (B, Hk, G, 1, M) of all key heads, with the linear ones in two launches."""
        output: torch.Tensor = self._fused.step(*tokens, layout.token_mask, statistics)
        if self._exact is not None:
            query, key, value = (x[:, self._exact_heads] for x in tokens)
            exact = self._exact.step(query, key, value, layout)
            output[:, self._exact_heads] = exact.to(output.dtype)
        return output

    def _linear(
        self, group: RecurrentHeads, tokens: Tokens, layout: TokenLayout, statistics: FarStatistics | None
    ) -> torch.Tensor:
        query, key, value = (x.to(self._wide) for x in tokens)
        return group.step(query, key, value, layout.token_mask, statistics)


class _Split:
    """The key heads of a layer, split into parts that are computed separately."""

    def __init__(self, parts: list[list[int]], device: torch.device) -> None:
        order = [head for part in parts for head in part]
        self._parts = [torch.tensor(part, device=device) for part in parts]
        self._back = torch.tensor([order.index(head) for head in range(len(order))], device=device)

    def apart(self, tokens: Tokens) -> list[Tokens]:
        """q, k, v (B, Hk, ...) for each part."""
        query, key, value = tokens
        return [(query.index_select(1, i), key.index_select(1, i), value.index_select(1, i)) for i in self._parts]

    def together(self, answers: list[torch.Tensor]) -> torch.Tensor:
        """Join the outputs of the parts in the order of the heads."""
        return torch.cat(answers, dim=1).index_select(1, self._back)


class _ExactPart:
    """The exact heads of a layer that also has linear heads."""

    def __init__(self, call: OperatorCall, cache: ExactCache | None) -> None:
        self._call, self.cache = call, cache

    def step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
        """The output (B, He, G, 1, M) for one more token."""
        call = self._call.replace(query=query, key=key, value=value, layout=layout)
        output, self.cache = exact_heads(call, self.cache)
        return output

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.cache is not None:
            self.cache = self.cache.select_rows(rows)


def _kinds(*tokens: torch.Tensor) -> tuple[Any, ...]:
    """The kind of tokens a decoder is made for; tables made in inference mode cannot be written outside of it."""
    return torch.is_inference_mode_enabled(), [(t.shape, t.dtype, t.device) for t in tokens]
