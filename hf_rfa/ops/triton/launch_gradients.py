"""Kernel launches of the backward pass, and the torch operations around them."""

import torch
import triton

from hf_rfa.ops.triton import launch_exact
from hf_rfa.ops.triton.flows import block_flows, inner_products, scan_flows
from hf_rfa.ops.triton.key_gradients import key_gradients
from hf_rfa.ops.triton.launch import SCAN_STAGES, SCAN_TILE, Launch
from hf_rfa.ops.triton.query_gradients import query_gradients
from hf_rfa.ops.triton.sizes import on_device

#: Tokens per program of `inner_products`.
INNER_TILE = 64
#: Warps of the programs that keep the far sums, or their gradients, in their registers; of those without a near part.
GRADIENT_WARPS, FAR_GRADIENT_WARPS = 4, 8


def gradients(
    launch: Launch, output: torch.Tensor, d_output: torch.Tensor | None, d_kv_state: torch.Tensor | None, learned: bool
) -> dict[str, torch.Tensor]:
    """Gradients of `Inputs` by name, given those of the output and of the far sums after the last chunk.

    `learned`: whether those of the far kernel's parameters are wanted. `log_max` gets none: it only says what
    `kv_state` is divided by.
    """
    x, settings = launch.inputs, launch.settings
    every, blocks, chunks, length = launch.all, launch.blocks, launch.chunks, launch.length
    tokens = (launch.batch, launch.heads, launch.groups, length)
    above = torch.zeros_like(output) if d_output is None else d_output.to(output.dtype)
    above = above if above.stride(-1) == 1 else above.contiguous()
    flow = x.kv_state.new_zeros(every, launch.size) if d_kv_state is None else launch.flat(d_kv_state)
    inner = x.kv_state.new_empty(tokens)
    flows = x.kv_state.new_empty(every, blocks, launch.size)
    sizes = (launch.code_row, launch.flag_row, launch.heads, launch.groups, length, chunks)
    queries, keys, values = x.query.stride()[:4], launch.far_key.stride()[:3], launch.far_value.stride()[:3]
    # With kept keys these are gradients of the far part alone, to which those of the exact part are added.
    kind = torch.float32 if launch.keeps else x.query.dtype
    tensors = {"query": x.query, "key": launch.far_key, "value": launch.far_value}
    found = {name: torch.empty_like(tensor, dtype=kind) for name, tensor in tensors.items()}
    found |= {name: torch.empty_like(getattr(x, name)) for name in ("query_r", "query_scale", "key_r", "key_scale")}
    sinks = launch.sinks["S"] if settings.window else 0
    sink_rows = [
        x.kv_state.new_empty(every, chunks if sinks else 0, sinks, t.shape[-1]) for t in (x.sink_key, x.sink_value)
    ]
    key_blocks = triton.cdiv(chunks + launch.tiles["DELAY"], settings.block)
    query_maps, key_maps = (_sums_of_maps(launch, count, learned) for count in (blocks, key_blocks))
    options = {"num_warps": FAR_GRADIENT_WARPS if launch.keeps else GRADIENT_WARPS, "num_stages": 1}
    shares = {"LEARNED": int(learned), **launch.tiles, **launch.near, **options}
    with on_device(x.query):
        inner_products[(triton.cdiv(length, INNER_TILE), every * launch.groups)](
            above, output, inner, *above.stride()[:4], *output.stride()[:4], launch.heads, launch.groups, length,
            M=launch.tiles["M"], BM=launch.tiles["BM"], BT=INNER_TILE,
        )  # fmt: skip
        block_flows[(launch.parts * blocks, every)](
            x.query, launch.far_key, above, x.query_r, x.key_r, x.key_scale, inner, launch.log_weight, *launch.maps(),
            launch.far_codes, launch.flags, launch.peaks, flows, *queries, *keys, *above.stride()[:4], *sizes, blocks,
            settings.block, **launch.part_tiles, **launch.part_options,
        )  # fmt: skip
        scan_flows[(triton.cdiv(launch.size, SCAN_TILE), every)](
            flows, _block_decay(launch), flow, blocks, launch.size, BE=SCAN_TILE, STAGES=SCAN_STAGES
        )
        query_gradients[(blocks, every)](
            x.query, launch.far_key, launch.far_value, above, x.query_r, x.key_r, x.key_scale, inner, launch.log_total,
            launch.log_weight, *launch.maps(), x.sink_key, x.sink_value, launch.far_codes, launch.flags,
            launch.sink_chunks, launch.states, launch.peaks, found["query"], found["query_r"], found["query_scale"],
            *sink_rows, *query_maps, *queries, *keys, *values, *above.stride()[:4], *found["query"].stride()[:4],
            *sizes, blocks, settings.block, settings.scaling, **launch.sinks, **shares,
        )  # fmt: skip
        key_gradients[(key_blocks, every)](
            x.query, launch.far_key, launch.far_value, above, x.query_r, x.key_r, x.key_scale, inner, launch.log_total,
            launch.log_weight, *launch.maps(), launch.far_codes, launch.flags, flows, launch.peaks, found["key"],
            found["value"], found["key_r"], found["key_scale"], *key_maps, *queries, *keys, *values,
            *above.stride()[:4], *found["key"].stride()[:3], *found["value"].stride()[:3], *sizes, blocks, key_blocks,
            settings.block, settings.scaling, **shares,
        )  # fmt: skip
    if launch.keeps:
        found |= launch_exact.gradients(launch, above, inner, found)
    else:
        for name, rows in zip(("key", "value"), sink_rows, strict=True):
            found[f"sink_{name}"] = _give_sinks(launch, found[name], rows)
    if learned:
        for side, maps in (("query", query_maps), ("key", key_maps)):
            for name, rows in zip(("weight", "bias", "shift"), maps, strict=True):
                found[f"{side}_{name}"] = rows.unflatten(0, (launch.batch, -1)).sum((0, 2))
    if x.sink_logits is not None:
        share = (x.sink_logits.unsqueeze(-1) - launch.log_total).exp()
        found["sink_logits"] = -(inner * share).sum((0, 3))
    return found | {"kv_state": launch.matrix(flow)}


def _block_decay(launch: Launch) -> torch.Tensor:
    """(A, blocks): the share of the far sums before a block that is left behind it."""
    first = torch.arange(launch.blocks, device=launch.peaks.device) * launch.settings.block
    last = (first + launch.settings.block).clamp_max(launch.chunks)
    before, after = launch.peaks[:, first], launch.peaks[:, last]
    shrink = (before - after.masked_fill(after == -torch.inf, 0.0)).exp()
    return (shrink * (launch.kept != 0)).contiguous()


def _sums_of_maps(launch: Launch, blocks: int, learned: bool) -> tuple[torch.Tensor, ...]:
    """Buffers for the gradients of W, b and the shifts, separate per block."""
    rows = (launch.all, blocks, launch.projected) if learned else (0, blocks, launch.projected)
    new = launch.inputs.kv_state.new_empty
    return new(*rows, launch.inputs.query.shape[-1]), new(rows), new(rows)


def _give_sinks(launch: Launch, whole: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Add the gradients of each chunk's sinks (A, n, s, D) to those of their tokens (B, Hk, T, D).

    Returns the gradients of the state's sinks (B, Hk, s, D).
    """
    sinks = launch.inputs.sink_key.shape[2]
    if not rows.shape[2]:
        return whole.new_zeros(launch.batch, launch.heads, sinks, whole.shape[-1])
    rows = rows.unflatten(0, (launch.batch, launch.heads))
    chunks = launch.sink_chunks.to(torch.int64)[:, None, :, None, None].expand_as(rows)
    of_state = torch.where(chunks < 0, rows, 0.0).sum(2)
    by_chunk = torch.zeros_like(rows).scatter_add_(2, chunks.clamp_min(0), torch.where(chunks < 0, 0.0, rows))
    chunk = launch.tiles["C"]
    for slot in range(sinks):  # a strided view: this slot of every chunk
        place = whole[:, :, slot::chunk]
        place += by_chunk[:, :, : place.shape[2], slot].to(whole.dtype)
    return of_state
