"""Calls of a kind with random tokens: a small one whose numbers are compared, one of the caller's size for timing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.chunks import PURE_CHUNK
from hf_rfa.ops.first_use.kind import LARGEST_SIZE, Kind
from hf_rfa.ops.layout import TokenLayout

#: Size of the entries of queries and keys: logits vary, and no estimate comes near zero, where rounding is everything.
TOKEN_SIZE = 0.5
#: Tempering of the far kernel, for the same reason.
ALPHA = 0.25
#: Limit of the far part's weight where the kernel has one: many queries of these tokens are above it, others below.
FAR_LIMIT = 0.5


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call, and those of its tensors that have a gradient by name."""

    call: OperatorCall
    leaves: dict[str, torch.Tensor]


def small_problem(kind: Kind, device: torch.device) -> Problem:
    """One row and two key heads."""
    return problem(kind, device, batch=1, heads=2, length=small_length(kind))


def small_length(kind: Kind) -> int:
    """Tokens after which every head keeps keys, has evicted some, and has far ones."""
    chunk = kind.window or PURE_CHUNK
    return (kind.kept_keys // chunk + 5) * chunk + chunk // 2 + 1


def timed_problem(kind: Kind, call: OperatorCall) -> Problem:
    """One of the size of `call`, or of `LARGEST_SIZE` if that is smaller."""
    batch, heads, _, length, _ = call.query.shape
    batch = max(1, min(batch, LARGEST_SIZE // (heads * length)))
    return problem(kind, call.query.device, batch=batch, heads=heads, length=min(length, LARGEST_SIZE // heads))


def problem(kind: Kind, device: torch.device, *, batch: int, heads: int, length: int) -> Problem:
    """A call of that kind; its tensors are drawn on the device, from a generator of their own."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
        return size * torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    tokens = (batch, heads, length)
    dtype = getattr(torch, kind.dtype)
    leaves = {
        "query": draw(batch, heads, kind.groups, length, kind.head_dim, size=TOKEN_SIZE).to(dtype),
        "key": draw(*tokens, kind.head_dim, size=TOKEN_SIZE).to(dtype),
        "value": draw(*tokens, kind.value_dim).to(dtype),
    }
    far = _far_kernel(kind, heads, draw)
    if kind.learned:
        leaves |= {name: tensor for name, tensor in far.items() if name != "far_limit"}  # which has no gradient
    if kind.sink_logits:
        leaves["sink_logits"] = draw(heads, kind.groups, size=0.1)
    for leaf in leaves.values():
        leaf.requires_grad_()
    maps = tuple(kind.maps[head % len(kind.maps)] for head in range(heads))
    call = OperatorCall(
        leaves["query"], leaves["key"], leaves["value"], FarKernel(maps, **far), causal=True, window=kind.window,
        sink_tokens=kind.sink_tokens, scaling=kind.head_dim**-0.5, layout=TokenLayout(), softmax_heads=(),
        sliding_window=None, sink_logits=leaves.get("sink_logits"), state=None,
        kept_of_heads=(kind.kept_keys,) * heads,
    )  # fmt: skip
    # Of gamma the output of pure RFA does not depend.
    return Problem(call, {name: leaf for name, leaf in leaves.items() if kind.window or name != "gamma"})


def _far_kernel(kind: Kind, heads: int, draw: Callable[..., torch.Tensor]) -> dict[str, Any]:
    dim, ones = kind.head_dim, torch.ones_like(draw(heads))
    tensors = {
        "omega": draw(heads, kind.rows, dim), "alpha": ALPHA * ones, "gamma": 1.0 * ones, "proposal": -0.1 * ones,
        "query_center": draw(heads, dim, size=0.1), "key_center": draw(heads, dim, size=0.1),
    }  # fmt: skip
    for name in kind.options:
        if name == "far_limit":
            tensors[name] = FAR_LIMIT * ones
        elif name.endswith("_transform"):
            tensors[name] = torch.eye(dim, device=ones.device) + draw(heads, dim, dim, size=0.1 * dim**-0.5)
        else:
            tensors[name] = TOKEN_SIZE * dim**0.5 * ones  # about half of the tokens are longer
    return tensors
