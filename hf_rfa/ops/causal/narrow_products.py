"""Products in bfloat16, for calls whose q, k and v are bfloat16 on a CPU that multiplies it faster than float32.

What is rounded to bfloat16 enters sums linearly: features, weighted values, far sums as a chunk reads them, and in the
backward pass the attention weights and the gradients. Each product adds up in float32 and is rounded once; the far
sums themselves are kept and added up in float32. Whatever becomes an exponent stays float32, since an error of 2^-9
would grow with its size: omega.x, q.k, maxima and normalisers; so does the whole exact part of the forward pass.
"""

import functools
import math

import torch

from hf_rfa.features.far_kernel import FarKernel

#: Below this size of a product nothing is gained.
SMALLEST = 32
LOG2E = math.log2(math.e)


def narrow_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, far: FarKernel, window: int
) -> bool:  # fmt: skip
    """Whether a call multiplies in bfloat16: only maps whose features are positive, so that no sum cancels."""
    narrow = query.dtype == key.dtype == value.dtype == torch.bfloat16 and query.device.type == "cpu"
    sizes = (window, query.shape[-1], value.shape[-1], far.num_components)
    return narrow and set(far.feature_maps) == {"hyperbolic"} and min(sizes) >= SMALLEST and multiplies_bfloat16()


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16 products, and torch a library that uses them."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # of torch 2.6 and later
    known = [getattr(torch.cpu, name) for name in names if hasattr(torch.cpu, name)]
    return torch.backends.mkldnn.is_available() and any(supported() for supported in known)


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """x (A, n, R, F) as bfloat16 (A * n, R, F), contiguous or the transpose of what is, as x is."""
    if x.mT.is_contiguous():
        return x.mT.to(torch.bfloat16).flatten(0, 1).mT
    return x.to(torch.bfloat16, memory_format=torch.contiguous_format).flatten(0, 1)


def product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """left @ right, both bfloat16 (A * n, ...), in `out` (A, n, ...)."""
    return out.copy_(torch.bmm(left, right).view_as(out))


def read_states(
    key: torch.Tensor, extended: torch.Tensor, shrink: torch.Tensor, state: torch.Tensor, states: torch.Tensor
) -> torch.Tensor:
    """S^T (A * n, M + 1, F) in bfloat16 as each chunk reads it, in the buffer `states`; advances `state` in place.

    key: (A * n, C, F) features, extended (A, n, C, M + 1); shrink (A, n): see `causal.block.Sums`.
    """
    rows, chunks = shrink.shape
    added = torch.bmm(narrowed(extended).mT, key).float().unflatten(0, (rows, chunks))
    for read, new, factor in zip(states.unbind(1), added.unbind(1), shrink[..., None, None].unbind(1), strict=True):
        read.copy_(state)
        torch.addcmul(new, state, factor, out=state)
    return states.flatten(0, 1)


def near_gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    normaliser: torch.Tensor, mask: torch.Tensor, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `causal.near.near_gradients`; the gradients are rounded to bfloat16, and float32."""
    shape, whole_key = query.shape[:2], key.reshape(-1, *key.shape[2:])
    above, narrow_query, narrow_value = (narrowed(x) for x in (gradient, query, value))
    narrow_key = whole_key.to(torch.bfloat16)
    weights = torch.bmm(query.flatten(0, 1), whole_key.mT).mul_(scaling * LOG2E).view(*query.shape[:3], -1)
    weights.add_(mask).sub_((normaliser * LOG2E).unsqueeze(-1)).exp2_()
    inner = (gradient * output).sum(-1, keepdim=True)
    of_value = torch.bmm(weights.to(torch.bfloat16).flatten(0, 1).mT, above)
    scores = torch.bmm(above, narrow_value.mT).view_as(weights) - inner
    scores = scores.mul_(weights).mul_(scaling).to(torch.bfloat16).flatten(0, 1)
    found = torch.bmm(scores, narrow_key), torch.bmm(scores.mT, narrow_query), of_value
    of_query, of_key, of_value = (x.float().unflatten(0, shape) for x in found)
    return of_query, of_key, of_value
