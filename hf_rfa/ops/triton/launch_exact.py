"""Launches of the exact part's kernels for calls that keep keys, and what is gathered from the pool around them."""

from typing import TYPE_CHECKING, Any

import torch

from hf_rfa.ops.causal.pool import Pool
from hf_rfa.ops.triton.exact import exact_key_gradients, exact_outputs, exact_query_gradients
from hf_rfa.ops.triton.sizes import on_device, tile_size

if TYPE_CHECKING:
    from hf_rfa.ops.triton.launch import Inputs, Launch

#: The most entries of a list that a program looks up at a time.
LIST_TILE = 64
#: Warps of a program: four are as many rows of tensor cores as a chunk of 64 queries has.
EXACT_WARPS = 4


def evicted_tokens(x: "Inputs", continues: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, Hk, T, D or M) in the order in which they are evicted, so that they are read as chunks.

    continues: whether the call continues a state, whose keys may be evicted. Places where nothing is evicted hold some
    other token, which has the log-scale -inf.
    """
    assert x.evicted is not None
    index = x.evicted.clamp_min(0).unsqueeze(1)
    pairs = zip(_of_state(x), (x.key, x.value), strict=True)
    keys, values = (Pool(of_state, tokens, continues).take(index).view(tokens.shape) for of_state, tokens in pairs)
    return keys, values


def outputs(launch: "Launch") -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax (B, Hk, G, T, M) over the exact keys of each query, and its log-normaliser, both in float32."""
    x = launch.inputs
    tokens = (launch.batch, launch.heads, launch.groups, launch.length)
    output, log = x.kv_state.new_empty(*tokens, x.value.shape[-1]), x.kv_state.new_empty(tokens)
    of_state = _of_state(x)
    exact_outputs[(launch.chunks, launch.all * launch.groups)](
        x.query, x.key, x.value, *of_state, x.listed, launch.codes, launch.flags, output, log, *_strides(x),
        *_sizes(launch, of_state[0]), **_tiles(launch),
    )  # fmt: skip
    return output, log


def gradients(
    launch: "Launch", above: torch.Tensor, inner: torch.Tensor, far: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Gradients of queries, keys, values, sinks and kept keys, given those of the output and of the far part.

    far: "query" (B, Hk, G, T, D), and those of the evicted "key" and "value" (B, Hk, T, D or M); all float32.
    """
    x = launch.inputs
    of_state = _of_state(x)
    tensors = (
        x.query, x.key, x.value, *of_state, above, x.listed, launch.codes, launch.flags, inner, launch.log_total,
    )  # fmt: skip
    query, far_query = torch.empty_like(x.query), far["query"].contiguous()
    pools = [_of_pool(launch, rows, far[name]) for name, rows in zip(("key", "value"), of_state, strict=True)]
    strides, sizes = (*_strides(x), *above.stride()[:4]), _sizes(launch, of_state[0])
    with on_device(x.query):
        exact_query_gradients[(launch.chunks, launch.all * launch.groups)](
            *tensors, far_query, query, *strides, *query.stride()[:4], *sizes, **_tiles(launch)
        )
        exact_key_gradients[(launch.chunks, launch.all)](*tensors, *pools, *strides, *sizes, **_tiles(launch))
    found = {"query": query}
    for name, pool in zip(("key", "value"), pools, strict=True):
        sinks, kept = x.sink_key.shape[2], of_state[0].shape[2] - x.sink_key.shape[2]
        rows = pool.view(launch.batch, launch.heads, *pool.shape[1:]).to(x.query.dtype)
        parts = rows.split([sinks, kept, launch.length], dim=2)
        found |= dict(zip((f"sink_{name}", f"kept_{name}", name), parts, strict=True))
    return found


def _of_pool(launch: "Launch", of_state: torch.Tensor, evicted: torch.Tensor) -> torch.Tensor:
    """The pool's gradient (A, E + T, D) with that of the evicted tokens (B, Hk, T, D), of which none occurs twice."""
    index = launch.inputs.evicted
    assert index is not None
    pool = evicted.new_zeros(launch.all, of_state.shape[2] + launch.length, evicted.shape[-1])
    # Places where nothing is evicted have a gradient of zero.
    starts = torch.arange(launch.all, device=index.device).unsqueeze(1) * pool.shape[1]
    rows = (index.clamp_min(0) + starts).flatten()
    pool.view(-1, pool.shape[-1]).index_add_(0, rows, evicted.reshape(-1, pool.shape[-1]))
    return pool


def _of_state(x: "Inputs") -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, Hk, s + K, D or M) of the state: its sinks, then its kept keys."""
    assert x.kept_key is not None
    assert x.kept_value is not None
    return torch.cat([x.sink_key, x.kept_key], dim=2), torch.cat([x.sink_value, x.kept_value], dim=2)


def _strides(x: "Inputs") -> tuple[int, ...]:
    return *x.query.stride()[:4], *x.key.stride()[:3], *x.value.stride()[:3]


def _sizes(launch: "Launch", of_state: torch.Tensor) -> tuple[Any, ...]:
    sizes = (launch.code_row, launch.flag_row, launch.heads, launch.groups, launch.length, launch.chunks)
    return *sizes, of_state.shape[2], launch.settings.scaling


def _tiles(launch: "Launch") -> dict[str, Any]:
    listed = launch.inputs.listed
    assert listed is not None
    tiles = {name: launch.tiles[name] for name in ("D", "BD", "M", "BM", "C", "BC", "PRECISION")}
    count = listed.shape[2]
    whole = min(LIST_TILE, tile_size(count))
    lists = {"N": count, "BN": whole, "BR": tile_size(count % whole)}
    return tiles | lists | {"num_warps": EXACT_WARPS, "num_stages": 1}
