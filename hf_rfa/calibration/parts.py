"""A layer with every head linear, and its near and far part before they are joined: what `calibrate` fits."""

import torch

from hf_rfa.ops.bidirectional import BidirectionalPass
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.chunked import CausalPass
from hf_rfa.ops.chunks import from_chunks
from hf_rfa.ops.combine import Part
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import RFAAdapter


def linear_settings(adapter: RFAAdapter, settings: AttentionSettings) -> AttentionSettings:
    """How a layer attends with every key head linear, made of the settings of its exact call."""
    config = adapter.config
    return settings.replace(
        window=config.window, sink_tokens=config.sink_tokens, kept_keys=adapter.kept_keys, softmax_heads=(),
        sliding_window=None,
    )  # fmt: skip


def attention_parts(call: OperatorCall) -> tuple[Part | None, Part]:
    """The near and the far part of every query, (B, Hk, G, N, M) and (B, Hk, G, N); the far one without gamma.

    There is no near part if `window = 0`. The call must be in float32 or float64 and have no exact heads.
    """
    groups = call.groups()
    if len(groups) == 1:
        return _parts_of_group(call)
    found = [_parts_of_group(group) for _, group in groups]
    order = [head for heads, _ in groups for head in heads]
    back = torch.tensor([order.index(head) for head in range(len(order))], device=call.query.device)
    near = [near for near, _ in found if near is not None]
    return _beside(near, back) if near else None, _beside([far for _, far in found], back)


def _beside(parts: list[Part], back: torch.Tensor) -> Part:
    """The parts of several groups of key heads, in the order of the heads."""
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Part(*(torch.cat(field, dim=1).index_select(1, back) for field in fields))


def _parts_of_group(call: OperatorCall) -> tuple[Part | None, Part]:
    run = CausalPass(call) if call.causal else BidirectionalPass(call)
    blocks = [(near, far) for _, near, far in run.blocks()]
    groups, length = call.query.shape[2:4]

    def join(parts: list[Part]) -> Part:
        def tokens(tensors: list[torch.Tensor]) -> torch.Tensor:
            return from_chunks(torch.cat(tensors, dim=2), run.plan, groups, length)

        # -inf times the zero of padding would be NaN.
        log_scale = [p.log_scale.clamp_min(torch.finfo(p.log_scale.dtype).min).unsqueeze(-1) for p in parts]
        return Part(
            tokens([p.numerator for p in parts]),
            tokens([p.denominator.unsqueeze(-1) for p in parts]).squeeze(-1),
            tokens(log_scale).squeeze(-1),
        )

    near = [near for near, _ in blocks if near is not None]
    return join(near) if near else None, join([far for _, far in blocks])
