"""`attend`, the operator; `rfa_attention`, the same on plain tensors; `rfa_attention_reference`, its definition."""

import dataclasses
from collections.abc import Sequence

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.compiled import linear_heads_of_graph
from hf_rfa.ops.dispatch import causal_form, form_of_call
from hf_rfa.ops.joined_groups import Groups, join_groups, split_state
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.linear import linear_heads
from hf_rfa.ops.reference import reference_attention
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.softmax_heads import ExactCache, count_only, exact_heads
from hf_rfa.ops.state import RFAState

PerHead = float | torch.Tensor


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel: FarKernel,
    settings: AttentionSettings,
    layout: TokenLayout,
    state: RFAState | None = None,
    *,
    statistics: FarStatistics | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, RFAState | None]:
    """`rfa_attention`, given a layer's far kernel, its settings and the layout of the new tokens.

    Args:
        query, key, value: (B, H, N, D), (B, Hk, N, D), (B, Hk, N, M).
        state: The state to continue from.
        statistics: Counts how often the far part was dropped.

    Returns:
        The output (B, H, N, M) in value's dtype, and the state after the last token if `output_final_state`.

    Raises:
        ConfigError: A shape, a type or a value does not fit; the message names it.
    """
    call = OperatorCall.of(query, key, value, kernel, settings, layout, state)
    call = call.replace(output_final_state=output_final_state, statistics=statistics)
    with torch.autocast(query.device.type, enabled=False):
        return _run(call)


def rfa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    omega: torch.Tensor,
    feature_map: str | Sequence[str] = "positive",
    window: int = 64,
    sink_tokens: int = 4,
    kept_keys: int | Sequence[int] = 0,
    alpha: PerHead = 1.0,
    gamma: PerHead = 1.0,
    proposal: PerHead | None = None,
    query_center: torch.Tensor | None = None,
    key_center: torch.Tensor | None = None,
    query_transform: torch.Tensor | None = None,
    key_transform: torch.Tensor | None = None,
    query_radius: PerHead | None = None,
    key_radius: PerHead | None = None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    far_limit: PerHead | None = None,
    scaling: float | None = None,
    causal: bool = True,
    token_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    layout: TokenLayout | None = None,
    softmax_heads: Sequence[int] = (),
    sliding_window: int | None = None,
    sink_logits: torch.Tensor | None = None,
    initial_state: RFAState | None = None,
    output_final_state: bool = False,
    statistics: FarStatistics | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, RFAState]:
    """Random-feature attention, exact near and estimated far, in time and memory linear in the number of tokens.

        out_i = (sum_{near(i)} exp(s q_i.k_j) v_j + gamma psi(alpha q_i)^T S_i)
              / (sum_{near(i)} exp(s q_i.k_j)     + gamma psi(alpha q_i)^T z_i)

    with s = scaling, `near(i)` the chunk of i (of `window` tokens), the chunk before it and the first `sink_tokens`,
    and S, z the sums of psi(alpha k) [v, 1] over all other keys that i may see. Features, sums and the division are
    float32 (float64 for float64 inputs). Where the estimated far denominator is not positive the far part is dropped;
    with `window = 0` the output is zero there. Source: Peng et al. 2021, Choromanski et al. 2021.

    Args:
        query: (B, H, N, D).
        key: (B, Hk, N, D), Hk divides H: query head h reads key head h // (H / Hk). Keys are never repeated.
        value: (B, Hk, N, M).
        omega: (Hk, m, D), rows N(0, I); `hf_rfa.features.omega.draw_omega` draws it.
        feature_map: 'trigonometric', 'positive', 'hyperbolic' or 'optimal_positive'; or one per key head, all with
            the same number of components ('trigonometric' with 'hyperbolic').
        window: Chunk size, tokens; 0 = pure RFA (all keys estimated, no sinks).
        sink_tokens: At most `window`.
        kept_keys: K, the number of far keys per key head that stay exact: those with the largest mean weight from the
            queries that saw them exactly. They are chosen again at each chunk boundary, see `hf_rfa.ops.kept_keys`,
            in the bidirectional form once per document, see `hf_rfa.ops.kept_encoder_keys`. 0 = none. Or one number
            per key head.
        alpha, gamma: A number, or one per key head (Hk,).
        proposal: (Hk,) A of the optimal positive features; None = the best one for |q'+k'|^2 of mean D / 2.
        query_center, key_center: (Hk, D) b and c. Far keys are estimated as exp(alpha^2 s (q-b).(k-c)) exp(s b.(k-c))
            exp(s q.c): the mean is exact for alpha = 1, the terms in b and c for any alpha. None = zero.
        query_transform, key_transform: (Hk, D, D) A and A^-T, the change of variable q.k = (A q).(A^-T k) in the
            estimated part. None = the identity.
        query_radius, key_radius: A number, or one per key head: bounds of |A (q - b)| and |A^-T (k - c)|; longer
            vectors are clipped. 0 or None = no bound.
        gate_weight, gate_bias: (Hk, D), (Hk,) w and b of a forget gate: the weight of far key j for query i is
            multiplied by prod_{t=j+1..i} sigmoid(w.k_t + b) over the tokens of the document. Causal only; None = none.
        far_limit: A number, or one per key head: the far part's sum of weights is scaled down to so many times the
            exact keys' where its estimate is more. The factor is a constant in the backward pass, and without a window
            there is none. 0 or None = no limit.
        scaling: Factor of q.k; None = D ** -0.5.
        causal: False for the bidirectional form (the following chunk is then near, too).
        token_mask: (B, N) bool, False for padding, anywhere. Padding gets zeros, and no token sees it.
        segment_ids: (B, N) int, equal within each packed document; nothing is seen across documents.
        layout: `token_mask` and `segment_ids` in one object, which layers may share; excludes both.
        softmax_heads: Key heads computed by exact softmax instead.
        sliding_window: The layer's own sliding window, tokens; only where every key head is exact, and causal.
        sink_logits: (H,) learned logits that add exp(logit) to the denominator (gpt-oss).
        initial_state: The state to continue from; the first document of each row continues it.
        output_final_state: Also return the state after the last token.
        statistics: Counts how often the far part was dropped.
        backend: The implementation for causal calls of more than one token: 'chunked' (PyTorch), 'triton' (fused
            kernels for GPUs) or 'auto': the kernels where they are right and faster, see `hf_rfa.ops.dispatch`.

    Returns:
        The output (B, H, N, M) in value's dtype, or (output, RFAState) if `output_final_state`.

    Raises:
        ConfigError: A shape, a type or a value does not fit; the message names it.

    Example:
        >>> import torch, hf_rfa
        >>> from hf_rfa.features.omega import draw_omega
        >>> _ = torch.manual_seed(0)
        >>> q, k, v = torch.randn(1, 8, 300, 64), torch.randn(1, 2, 300, 64), torch.randn(1, 2, 300, 64)
        >>> omega = draw_omega(2, 64, 64, kind="orthogonal", seed=0, layer=0, draw=0)
        >>> out, state = hf_rfa.rfa_attention(q, k, v, omega=omega, alpha=0.25, output_final_state=True)
        >>> out.shape, int(state.count)
        (torch.Size([1, 8, 300, 64]), 300)
    """
    kernel, settings, layout = operator_arguments(
        query, key, value, omega=omega, feature_map=feature_map, window=window, sink_tokens=sink_tokens,
        kept_keys=kept_keys, alpha=alpha, gamma=gamma, proposal=proposal, scaling=scaling, causal=causal,
        token_mask=token_mask, segment_ids=segment_ids, layout=layout, softmax_heads=softmax_heads,
        sliding_window=sliding_window,
        sink_logits=sink_logits, query_center=query_center, key_center=key_center, query_transform=query_transform,
        key_transform=key_transform, query_radius=query_radius, key_radius=key_radius, gate_weight=gate_weight,
        gate_bias=gate_bias, far_limit=far_limit, backend=backend,
    )  # fmt: skip
    output, state = attend(
        query, key, value, kernel, settings, layout, initial_state,
        statistics=statistics, output_final_state=output_final_state,
    )  # fmt: skip
    return (output, state) if state is not None else output


def rfa_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    omega: torch.Tensor,
    feature_map: str | Sequence[str] = "positive",
    window: int = 64,
    sink_tokens: int = 4,
    kept_keys: int | Sequence[int] = 0,
    alpha: PerHead = 1.0,
    gamma: PerHead = 1.0,
    proposal: PerHead | None = None,
    query_center: torch.Tensor | None = None,
    key_center: torch.Tensor | None = None,
    query_transform: torch.Tensor | None = None,
    key_transform: torch.Tensor | None = None,
    query_radius: PerHead | None = None,
    key_radius: PerHead | None = None,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    far_limit: PerHead | None = None,
    scaling: float | None = None,
    causal: bool = True,
    token_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    initial_state: RFAState | None = None,
    output_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, RFAState]:
    """The definition of `rfa_attention`: same arguments, quadratic in N, computed and returned in float64.

    Example:
        >>> import torch, hf_rfa
        >>> from hf_rfa.features.omega import draw_omega
        >>> _ = torch.manual_seed(0)
        >>> q, k, v = (torch.randn(1, 2, 150, 16) for _ in range(3))
        >>> omega = draw_omega(2, 32, 16, kind="gaussian", seed=0, layer=0, draw=0)
        >>> slow = hf_rfa.rfa_attention_reference(q, k, v, omega=omega, window=32)
        >>> fast = hf_rfa.rfa_attention(q, k, v, omega=omega, window=32)
        >>> bool((fast - slow).abs().max() < 1e-5)
        True
    """
    query, key, value = query.double(), key.double(), value.double()
    kernel, settings, layout = operator_arguments(
        query, key, value, omega=omega, feature_map=feature_map, window=window, sink_tokens=sink_tokens,
        kept_keys=kept_keys, alpha=alpha, gamma=gamma, proposal=proposal, scaling=scaling, causal=causal,
        token_mask=token_mask, segment_ids=segment_ids,
        sink_logits=sink_logits, query_center=query_center, key_center=key_center, query_transform=query_transform,
        key_transform=key_transform, query_radius=query_radius, key_radius=key_radius, gate_weight=gate_weight,
        gate_bias=gate_bias, far_limit=far_limit,
    )  # fmt: skip
    call = OperatorCall.of(query, key, value, kernel, settings, layout, initial_state)
    call = call.replace(output_final_state=output_final_state)
    output, states = query.new_empty(*call.query.shape[:-1], value.shape[-1]), []
    for heads, group in call.groups():
        group.check_state()
        part, state = reference_attention(group)
        output = _put(output, heads, part)
        states.append(state)
    state = _joined(states)
    return output.flatten(1, 2) if state is None else (output.flatten(1, 2), state)


def _run(call: OperatorCall) -> tuple[torch.Tensor, RFAState | None]:
    """Run the linear and the exact key heads separately and join their outputs: (B, H, N, M)."""
    groups = call.groups()
    if len(groups) == 1 and groups[0][1] is call:
        output, state = _linear(call)
        return output.flatten(1, 2).to(call.value.dtype), state
    if not groups:
        output, cache = exact_heads(call, ExactCache.of_state(call.state))
        state = cache.into(count_only(call.heads([]))) if call.output_final_state else None
        return output.flatten(1, 2).to(call.value.dtype), state
    output = call.query.new_empty(*call.query.shape[:-1], call.value.shape[-1], dtype=call.value.dtype)
    parts, state = _groups(call, groups)
    for heads, part in parts:
        output = _put(output, heads, part)
    if call.softmax_heads:
        part, cache = exact_heads(call.heads(call.softmax_heads), ExactCache.of_state(call.state))
        output = _put(output, call.softmax_heads, part)
        state = state and cache.into(state)
    return output.flatten(1, 2), state


def _groups(call: OperatorCall, groups: Groups) -> tuple[list[tuple[list[int], torch.Tensor]], RFAState | None]:
    """Outputs of the linear heads, each with the heads that it is of, and their states as one.

    Kernels compute all groups together; else, as within a graph, they run one after the other.
    """
    if len(groups) > 1 and not torch.compiler.is_compiling() and form_of_call(call) == "causal":
        form = causal_form(call)
        if form == "triton":
            for _, group in groups:
                group.check_state()
            output, state = linear_heads(join_groups(call, groups))
            states = [] if state is None else split_state(state, call, groups)
            return [(call.linear_heads, output)], _joined(states)
        groups = [(heads, group.replace(backend=form)) for heads, group in groups]  # which are not to be asked again
    parts, found = [], []
    for heads, group in groups:
        part, state = _linear(group)
        parts.append((heads, part))
        found.append(state)
    return parts, _joined(found)


def _joined(states: Sequence[RFAState | None]) -> RFAState | None:
    """Join the states of several groups of heads; None if there are none."""
    found = [state for state in states if state is not None]
    return dataclasses.replace(found[0], beside=tuple(found[1:])) if found else None


def _put(output: torch.Tensor, heads: Sequence[int], part: torch.Tensor) -> torch.Tensor:
    """`output` (B, Hk, G, N, M) with the results of some key heads filled in."""
    return output.index_copy(1, torch.tensor(heads, device=output.device), part.to(output.dtype))


def _linear(call: OperatorCall) -> tuple[torch.Tensor, RFAState | None]:
    """Check the state and run the linear heads; (B, Hk, G, N, M)."""
    call.check_state()
    run = linear_heads_of_graph if torch.compiler.is_compiling() else linear_heads
    return run(call)
