"""`rfa_attention`, the operator on plain tensors, and `rfa_attention_reference`, its definition."""

import dataclasses
from collections.abc import Sequence

import torch

from hf_rfa.feature_maps import FarKernel
from hf_rfa.ops.bidirectional import chunked_bidirectional
from hf_rfa.ops.call import OperatorCall, PerHead
from hf_rfa.ops.chunked import chunked_causal
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.exact import exact_attention
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.recurrent import recurrent_step
from hf_rfa.ops.reference import reference_attention
from hf_rfa.ops.state import RFAState, accumulation_dtype


def rfa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    omega: torch.Tensor,
    feature_map: str = "positive",
    window: int = 64,
    sink_tokens: int = 4,
    alpha: PerHead = 1.0,
    gamma: PerHead = 1.0,
    proposal: torch.Tensor | None = None,
    scaling: float | None = None,
    causal: bool = True,
    valid: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    layout: TokenLayout | None = None,
    softmax_heads: Sequence[int] = (),
    sliding_window: int | None = None,
    sink_logits: torch.Tensor | None = None,
    initial_state: RFAState | None = None,
    output_final_state: bool = False,
    statistics: FarStatistics | None = None,
) -> torch.Tensor | tuple[torch.Tensor, RFAState]:
    """Random-feature attention, exact near and estimated far, in time and memory linear in the number of tokens.

        out_i = (sum_{near(i)} exp(s q_i.k_j) v_j + gamma psi(alpha q_i)^T S_i)
              / (sum_{near(i)} exp(s q_i.k_j)     + gamma psi(alpha q_i)^T z_i)

    with s = scaling, `near(i)` the chunk of i (of `window` tokens), the chunk before it and the first `sink_tokens`,
    and S, z the sums of psi(alpha k) [v, 1] over all other keys that i may see. Features, sums and the division are
    float32 (float64 for float64 inputs). Where the estimated far denominator is not positive the far part is dropped;
    with `window = 0` the output is zero there. Source: Peng et al. 2021 (RFA), Choromanski et al. 2021 (positive maps).

    Args:
        query: (B, H, N, D).
        key: (B, Hk, N, D), Hk dividing H: query head h reads key head h // (H / Hk). Never repeated.
        value: (B, Hk, N, M).
        omega: (Hk, m, D), rows N(0, I); `hf_rfa.omega.draw_omega` draws it.
        feature_map: 'trigonometric', 'positive', 'hyperbolic' or 'optimal_positive'.
        window: Chunk size, tokens; 0 = pure RFA (all keys estimated, no sinks).
        sink_tokens: At most `window`.
        alpha, gamma: A number, or one a key head (Hk,).
        proposal: (Hk,) A of the optimal positive features; None = the best one for |q'+k'|^2 of mean D / 2.
        scaling: Factor of q.k; None = D ** -0.5.
        causal: False for the bidirectional form (then near has the chunk behind, too).
        valid: (B, N) bool, False for padding, anywhere. Padding gets zeros and is seen by nobody.
        document: (B, N) int, equal within each packed document; nothing is seen across documents.
        layout: `valid` and `document` in one object, which layers may share; excludes both.
        softmax_heads: Key heads that are computed by exact softmax instead.
        sliding_window: The layer's own sliding window, tokens; only where every key head is exact, and causal.
        sink_logits: (H,) learned logits that add exp(logit) to the denominator (gpt-oss).
        initial_state: The state to continue from; the first document of each row continues it.
        output_final_state: Return the state after the last token, too.
        statistics: Counts how often a far part was dropped.

    Returns:
        The output (B, H, N, M) in value's dtype, or (output, RFAState) if `output_final_state`.

    Raises:
        ConfigError: A shape, a type or a value does not fit; the message names it.

    Example:
        >>> import torch, hf_rfa
        >>> from hf_rfa.omega import draw_omega
        >>> _ = torch.manual_seed(0)
        >>> q, k, v = torch.randn(1, 8, 300, 64), torch.randn(1, 2, 300, 64), torch.randn(1, 2, 300, 64)
        >>> omega = draw_omega(2, 64, 64, kind="orthogonal", seed=0, layer=0, draw=0)
        >>> out, state = hf_rfa.rfa_attention(q, k, v, omega=omega, alpha=0.25, output_final_state=True)
        >>> out.shape, int(state.count)
        (torch.Size([1, 8, 300, 64]), 300)
    """
    call = OperatorCall.check(query, key, value, omega, feature_map, window, sink_tokens, alpha, gamma, proposal, scaling,
                       valid, document, layout, softmax_heads, sliding_window, sink_logits, initial_state, causal)  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        output, state = _run(call, causal, initial_state, output_final_state, statistics)
    return (output, state) if state is not None else output


def rfa_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    omega: torch.Tensor,
    feature_map: str = "positive",
    window: int = 64,
    sink_tokens: int = 4,
    alpha: PerHead = 1.0,
    gamma: PerHead = 1.0,
    proposal: torch.Tensor | None = None,
    scaling: float | None = None,
    causal: bool = True,
    valid: torch.Tensor | None = None,
    document: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    initial_state: RFAState | None = None,
    output_final_state: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, RFAState]:
    """The definition of `rfa_attention`: same arguments, quadratic in N, computed and returned in float64.

    Example:
        >>> import torch, hf_rfa
        >>> from hf_rfa.omega import draw_omega
        >>> _ = torch.manual_seed(0)
        >>> q, k, v = (torch.randn(1, 2, 150, 16) for _ in range(3))
        >>> omega = draw_omega(2, 32, 16, kind="gaussian", seed=0, layer=0, draw=0)
        >>> slow = hf_rfa.rfa_attention_reference(q, k, v, omega=omega, window=32)
        >>> fast = hf_rfa.rfa_attention(q, k, v, omega=omega, window=32)
        >>> bool((fast - slow).abs().max() < 1e-5)
        True
    """
    call = OperatorCall.check(query.double(), key.double(), value.double(), omega, feature_map, window, sink_tokens, alpha,
                       gamma, proposal, scaling, valid, document, None, (), None, sink_logits, initial_state, causal)  # fmt: skip
    output, state = reference_attention(
        call.grouped(call.query, key.shape[1]), call.key, call.value, call.far.to(torch.float64), causal=causal,
        window=window, sink_tokens=sink_tokens, scaling=call.scaling, layout=call.layout, initial_state=initial_state,
        output_final_state=output_final_state, sink_logits=call.grouped_logits(key.shape[1]),
    )  # fmt: skip
    output = output.flatten(1, 2)
    return (output, state) if state is not None else output


def _run(
    call: OperatorCall,
    causal: bool,
    initial_state: RFAState | None,
    output_final_state: bool,
    statistics: FarStatistics | None,
) -> tuple[torch.Tensor, RFAState | None]:
    """Split the key heads into linear and exact ones, run each, and put them together again."""
    key_heads = call.key.shape[1]
    query = call.grouped(call.query, key_heads)
    logits = call.grouped_logits(key_heads)
    if not call.softmax_heads:
        output, state = _linear(
            call, query, call.key, call.value, call.far, logits, causal, initial_state, output_final_state, statistics
        )
        return output.flatten(1, 2).to(call.value.dtype), state if output_final_state else None
    exact = torch.tensor(call.softmax_heads, device=query.device)
    linear = torch.tensor(
        [h for h in range(key_heads) if h not in call.softmax_heads], device=query.device, dtype=torch.int64
    )
    output = query.new_empty(*query.shape[:-1], call.value.shape[-1], dtype=call.value.dtype)
    state = None
    if len(linear):
        part, state = _linear(
            call, query[:, linear], call.key[:, linear], call.value[:, linear], call.far.select(linear),
            None if logits is None else logits[linear], causal, initial_state, output_final_state, statistics,
        )  # fmt: skip
        output = output.index_copy(1, linear, part.to(output.dtype))
    exact_output, key, value, valid = _exact(
        call, query[:, exact], exact, None if logits is None else logits[exact], causal, initial_state
    )
    output = output.index_copy(1, exact, exact_output.to(output.dtype))
    if output_final_state:
        state = state or _count_only(call, initial_state)
        state = dataclasses.replace(state, exact_key=key, exact_value=value, exact_valid=valid)
        return output.flatten(1, 2), state
    return output.flatten(1, 2), None


def _linear(
    call: OperatorCall, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, far: FarKernel, logits: torch.Tensor | None,
    causal: bool, initial_state: RFAState | None, output_final_state: bool, statistics: FarStatistics | None,
) -> tuple[torch.Tensor, RFAState | None]:  # fmt: skip
    """The linear heads: one token by the recurrent step, more by the chunked forms."""
    wide = accumulation_dtype(query.dtype)
    q, k, v = query.to(wide), key.to(wide), value.to(wide)
    shared = {
        "window": call.window,
        "scaling": call.scaling,
        "layout": call.layout,
        "sink_logits": logits,
        "statistics": statistics,
    }
    if causal and query.shape[3] == 1 and call.layout.document is None:
        state = initial_state or RFAState.empty(
            len(query), key, value, far.num_components, call.window, call.sink_tokens
        )
        return recurrent_step(q, k, v, far, initial_state=state, **shared)
    run = chunked_causal if causal else chunked_bidirectional
    output, state = run(
        q,
        k,
        v,
        far,
        sink_tokens=call.sink_tokens,
        initial_state=initial_state,
        output_final_state=output_final_state,
        **shared,
    )
    if state is not None:  # the near keys are kept as they came: half the bytes for bfloat16
        like = {"near_key": key, "sink_key": key, "near_value": value, "sink_value": value}
        state = dataclasses.replace(state, **{name: getattr(state, name).to(t.dtype) for name, t in like.items()})
    return output, state


def _exact(
    call: OperatorCall,
    query: torch.Tensor,
    heads: torch.Tensor,
    logits: torch.Tensor | None,
    causal: bool,
    state: RFAState | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The exact heads over their whole KV cache; returns the output (B, He, G, N, M) and the cache."""
    key, value, past_valid = call.key[:, heads], call.value[:, heads], None
    layout = call.layout
    if state is not None and state.exact_key is not None and state.exact_value is not None:
        past_valid = state.exact_valid
        key = torch.cat([state.exact_key.to(key.dtype), key], dim=2)
        value = torch.cat([state.exact_value.to(value.dtype), value], dim=2)
    groups = query.shape[2]
    output = exact_attention(
        query.flatten(1, 2), key, value, scaling=call.scaling, causal=causal, layout=layout, past_valid=past_valid,
        sliding_window=call.sliding_window,
        sink_logits=None if logits is None else logits.flatten(),
    ).unflatten(1, (-1, groups))  # fmt: skip
    valid = _cache_valid(layout, past_valid, key.shape[2], len(query), key.device)
    if call.sliding_window is not None:  # no later token sees more
        kept = slice(max(0, key.shape[2] - call.sliding_window + 1), None)
        key, value, valid = key[:, :, kept], value[:, :, kept], None if valid is None else valid[:, kept]
    return output, key, value, valid


def _cache_valid(
    layout: TokenLayout, past_valid: torch.Tensor | None, total: int, batch: int, device: torch.device
) -> torch.Tensor | None:
    """Which slots of the exact heads' cache the next token may see: tokens of the row's last document."""
    if layout.is_plain and past_valid is None:
        return None
    valid = torch.ones(batch, total, dtype=torch.bool, device=device)
    for source, start in ((past_valid, 0), (layout.valid, None)):
        if source is not None:
            span = slice(0, source.shape[1]) if start == 0 else slice(total - source.shape[1], total)
            valid[:, span] &= source.to(device)
    if layout.document is not None:
        document = layout.document.to(device)
        past = total - document.shape[1]
        valid &= torch.cat([document[:, :1].expand(-1, past), document], dim=1) == document[:, -1:]
    return valid


def _count_only(call: OperatorCall, initial_state: RFAState | None) -> RFAState:
    """The state of a layer without linear heads: nothing but the number of tokens."""
    none = torch.zeros(0, dtype=torch.int64, device=call.key.device)
    key, value = call.key[:, none], call.value[:, none]
    state = initial_state or RFAState.empty(
        len(call.query), key, value, call.far.num_components, call.window, call.sink_tokens
    )
    length = call.query.shape[2]
    steps = torch.full_like(state.count, length) if call.layout.valid is None else call.layout.valid.sum(1).cpu()
    return dataclasses.replace(state, count=state.count + steps)
