"""Documents without far keys: all their tokens are near to each other, so exact attention suffices.

With a window of C tokens these are the documents of at most 2C tokens that continue no state and leave none. Many of
them share a tile (`ops.tiles`), so that they cost only their own tokens, without whole chunks, features or far sums.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.near import near_attention, near_gradients
from hf_rfa.ops.recomputing import FirstOrder
from hf_rfa.ops.state import accumulation_dtype
from hf_rfa.ops.tiles import (
    ShortPlan,
    Tiles,
    put_blocks,
    put_rows,
    rows_of_heads,
    take_rows,
    taken_blocks,
    token_rows,
    zero_rows,
)


def short_documents(call: OperatorCall, plan: ShortPlan) -> torch.Tensor:
    """The output (B, Hk, G, N, M) for the short documents of a call, zero for all other tokens.

    In value's dtype without gradients, else in the accumulation dtype. The far kernel's tensors get zero gradients.
    """
    logits = call.sink_logits
    far = [t for f in fields(call.far) if isinstance(t := getattr(call.far, f.name), torch.Tensor)]
    tensors = (call.query, call.key, call.value, *(() if logits is None else (logits,)), *far)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dtype = accumulation_dtype(call.value.dtype) if trained else call.value.dtype
    settings = _Settings(plan, call.scaling, call.causal, dtype)
    output, _ = _ShortDocuments.apply(settings, call.query, call.key, call.value, logits, *far)
    return output


@dataclass(frozen=True)
class _Settings:
    """Arguments of the attention of short documents besides tensors; `dtype` is that of the output."""

    plan: ShortPlan
    scaling: float
    causal: bool
    dtype: torch.dtype

    def blocks(self) -> Iterator[Tiles]:
        """A few tiles of one size at a time."""
        for tiles in self.plan.tiles:
            yield from tiles.split()


class _ShortDocuments(torch.autograd.Function):
    """(output (B, Hk, G, N, M), log of the denominator per slot), from settings, q, k, v, sink logits, far kernel."""

    @staticmethod
    def forward(
        settings: _Settings, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        sink_logits: torch.Tensor | None, *far: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        groups, wide = query.shape[2], accumulation_dtype(query.dtype)
        rows = [token_rows(x) for x in (query.movedim(2, 3).flatten(3), key, value)]
        shape = (*query.shape[:2], query.shape[3], groups * value.shape[-1])
        whole, output = zero_rows(value, shape, settings.dtype)
        normalisers = []
        for tiles in settings.blocks():
            source = rows_of_heads(tiles.source, key.shape[1])
            q, k, v = (take_rows(x, source).to(wide) for x in rows)
            q = q.unflatten(-1, (groups, -1)).flatten(2, 3)
            answer, log_total = near_attention(q, k, v, _mask(tiles, settings.causal, groups, wide), settings.scaling)
            if sink_logits is not None:
                logits = _logits(sink_logits, answer)
                total = torch.logaddexp(log_total, logits)
                answer, log_total = answer * (log_total - total).exp().unsqueeze(-1), total
            put_rows(whole, answer, tiles)
            normalisers.append(log_total.flatten())
        return output.unflatten(3, (groups, -1)).movedim(3, 2), torch.cat(normalisers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        settings, *tensors = inputs
        ctx.settings = settings
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor | None, _: None) -> Any:
        # Like the forms for longer documents: only the bidirectional one has second derivatives.
        if above is not None and torch.is_grad_enabled() and not ctx.settings.causal:
            return _differentiable_gradients(ctx, above)
        with torch.no_grad():
            found = _first_gradients(ctx, above)
        if torch.is_grad_enabled():
            return FirstOrder.apply(len(found), *found, *ctx.saved_tensors, above)
        return found


def _first_gradients(ctx: Any, above: torch.Tensor | None) -> Any:
    query, key, value, sink_logits, *far, output, normalisers = ctx.saved_tensors
    nothing = _zeros(far, ctx.needs_input_grad[5:])
    if above is None:
        return None, None, None, None, None, *nothing
    with torch.autocast(query.device.type, enabled=False):
        gradients = _gradients(ctx.settings, query, key, value, sink_logits, output, normalisers, above)
    return None, *gradients, *nothing


def _differentiable_gradients(ctx: Any, above: torch.Tensor) -> Any:
    """The same gradients in differentiable steps: the forward pass again, with an explicit matrix of weights."""
    inputs, far = ctx.saved_tensors[:4], ctx.saved_tensors[4:-2]
    # New tensors: if k was computed from q, the gradient of q must not include the path through k.
    query, key, value, sink_logits = inputs = [None if x is None else x.view_as(x) for x in inputs]
    settings, wanted, groups = ctx.settings, ctx.needs_input_grad, query.shape[2]
    with torch.autocast(query.device.type, enabled=False):
        rows = [token_rows(x) for x in (query.movedim(2, 3).flatten(3), key, value)]
        blocks, wide = [], accumulation_dtype(query.dtype)
        for tiles, taken in taken_blocks(settings.plan, rows, key.shape[1]):
            q, k, v = (x.to(wide) for x in taken)
            scores = q.unflatten(-1, (groups, -1)).flatten(2, 3) @ k.mT * settings.scaling
            scores = scores + _mask(tiles, settings.causal, groups, wide)
            total = scores.logsumexp(-1)
            if sink_logits is not None:
                total = torch.logaddexp(total, _logits(sink_logits, total))
            blocks.append((tiles, (scores - total.unsqueeze(-1)).exp() @ v))
        output = put_blocks(blocks, (*query.shape[:-1], value.shape[-1])).to(settings.dtype)
        sources = [x for x, need in zip(inputs, wanted[1:5], strict=True) if need]
        found = iter(torch.autograd.grad(output, sources, above, create_graph=True) if sources else ())
        gradients = [next(found) if need else None for need in wanted[1:5]]
    return None, *gradients, *_zeros(far, wanted[5:])


def _zeros(far: Sequence[torch.Tensor], wanted: Sequence[bool]) -> list[torch.Tensor | None]:
    return [torch.zeros_like(x) if need else None for x, need in zip(far, wanted, strict=True)]


def _gradients(
    settings: _Settings, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sink_logits: torch.Tensor | None,
    output: torch.Tensor, normalisers: torch.Tensor, above: torch.Tensor,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and the sink logits, given that of the output, `above`."""
    groups, wide = query.shape[2], accumulation_dtype(query.dtype)
    rows = [token_rows(x) for x in (*(x.movedim(2, 3).flatten(3) for x in (query, output, above)), key, value)]
    # The queries of a group together, as in the rows.
    shapes = [(*key.shape[:3], x.shape[-1] * (groups if x is query else 1)) for x in (query, key, value)]
    targets = [zero_rows(x, shape, x.dtype) for x, shape in zip((query, key, value), shapes, strict=True)]
    of_logits = None if sink_logits is None else torch.zeros_like(sink_logits, dtype=wide)
    position = 0
    for tiles in settings.blocks():
        source = rows_of_heads(tiles.source, key.shape[1])
        q, answer, gradient, k, v = (take_rows(x, source).to(wide) for x in rows)
        q, answer, gradient = (x.unflatten(-1, (groups, -1)).flatten(2, 3) for x in (q, answer, gradient))
        log_total = normalisers[position : position + answer[..., 0].numel()].view(answer.shape[:-1])
        position += log_total.numel()
        mask = _mask(tiles, settings.causal, groups, wide)
        found = near_gradients(gradient, q, k, v, answer, log_total, mask, settings.scaling)
        for (whole, _), x in zip(targets, found, strict=True):
            put_rows(whole, x, tiles)
        if sink_logits is not None:
            taken = (gradient * answer).sum(-1) * (_logits(sink_logits, answer) - log_total).exp()
            of_logits -= (taken.unflatten(2, (-1, groups)) * (tiles.segment_ids >= 0)[:, None, :, None]).sum((0, 2))
    of_query, of_key, of_value = (gradient for _, gradient in targets)
    if sink_logits is not None and of_logits is not None:
        of_logits = of_logits.to(sink_logits.dtype)
    return [of_query.unflatten(3, (groups, -1)).movedim(3, 2), of_key, of_value, of_logits]


def _mask(tiles: Tiles, causal: bool, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """(t, 1, T * G, T): 0 where a query sees a key, else -inf."""
    hidden = ~tiles.visible(causal)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return mask.repeat_interleave(groups, 1).unsqueeze(1)


def _logits(sink_logits: torch.Tensor, beside: torch.Tensor) -> torch.Tensor:
    """Sink logits (Hk, G) expanded to (Hk, T * G), to match `beside` (t, Hk, T * G, ...)."""
    return sink_logits.to(beside.dtype).repeat(1, beside.shape[2] // sink_logits.shape[1])
