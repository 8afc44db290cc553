"""Causal RFA of a call, computed by the Triton kernels."""

import dataclasses
import functools

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.chunked import final_state, lay_out
from hf_rfa.ops.causal.keeping import with_kept_keys
from hf_rfa.ops.chunks import tokens_of
from hf_rfa.ops.state import RFAState
from hf_rfa.ops.tiles import ShortRule
from hf_rfa.ops.triton.fold import form_of
from hf_rfa.ops.triton.fold_tokens import fold_keys, fold_queries
from hf_rfa.ops.triton.function import Inputs, Settings, causal_attention
from hf_rfa.ops.triton.kept import choose_keys, fold_evicted

#: Chunks per program: fewer if there would otherwise be too few programs for the device.
BLOCKS = (8, 4, 2, 1)


def triton_causal(call: OperatorCall, short: ShortRule | None = None) -> tuple[torch.Tensor, RFAState | None]:
    """Causal RFA of a call with q, k and v in their own dtype and the far kernel in float32.

    Its heads may keep different numbers of keys, see `ops.joined_groups`.

    Returns the output (B, Hk, G, N, M) in value's dtype, zero for the `short` documents, and the state after the last
    token, or None if it is not wanted.
    """
    aligned = lay_out(call, short)
    x, plan = aligned.inputs, aligned.plan
    choice = choose_keys(aligned, call) if call.most_kept else None
    query = fold_queries(x.query, call.far, call.scaling)
    key = fold_keys(x.key, call.far, call.scaling) if choice is None else fold_evicted(aligned, call, choice)
    form = form_of(call.far)
    inputs = Inputs(
        x.query, x.key, x.value, x.sink_key, x.sink_value, x.sink_logits, x.kv_state, x.log_max, *vars(query).values(),
        *vars(key).values(),
    )  # fmt: skip
    inputs = dataclasses.replace(inputs, log_limit=call.far.log_limit())
    if choice is not None:
        inputs = dataclasses.replace(
            inputs, kept_key=x.kept_key, kept_value=x.kept_value, listed=choice.listed, evicted=choice.evicted
        )
    settings = Settings(
        plan, call.window, call.scaling, form, _map_codes(call.far.feature_maps, x.query.device),
        _block(plan.token_mask.shape[1], x.key.shape[0] * x.key.shape[1], x.query.device), call.statistics,
    )  # fmt: skip
    output, kv_state, peak = causal_attention(inputs, settings)
    final = final_state(aligned, kv_state, peak, call.window) if call.output_final_state else None
    if final is not None and choice is not None:
        final = with_kept_keys(final, choice.last, choice.mass, x, aligned.state, plan)
    return tokens_of(output, plan, call.query.shape[3]), final


@functools.lru_cache(maxsize=64)
def _map_codes(maps: tuple[str, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([int(name == "trigonometric") for name in maps], dtype=torch.int32, device=device)


def _block(chunks: int, heads: int, device: torch.device) -> int:
    """L, the chunks per program: long runs write fewer states, short ones fill the device."""
    wanted = 2 * _processors(device)
    return next((size for size in BLOCKS if -(-chunks // size) * heads >= wanted), BLOCKS[-1])


@functools.lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter counts as a small device, so that tests run over several chunks."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
