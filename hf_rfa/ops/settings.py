"""`AttentionSettings`: the arguments of the operator besides tensors, far kernel, layout and state."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

#: Possible values of `backend`, see `ops.dispatch`.
BACKENDS = ("auto", "chunked", "triton")


@dataclass(frozen=True, kw_only=True)
class AttentionSettings:
    """How a layer attends, the same for all of its calls. `OperatorCall.of` checks it against the tensors.

    Args:
        window: Chunk size, tokens; 0 = pure RFA.
        sink_tokens: Number of first tokens of a document that every query sees exactly; at most `window`.
        kept_keys: K, the number of far keys per linear key head that stay exact, see `ops.kept_keys` and, without
            causality, `ops.kept_encoder_keys`; needs a window. Or one number per key head.
        scaling: Factor of q.k, usually D ** -0.5.
        causal: False for the bidirectional form.
        softmax_heads: Key heads computed by exact softmax.
        sliding_window: The layer's own sliding window, tokens; only where every key head is exact, and causal.
        sink_logits: (H,) learned logits that add exp(logit) to the denominator, or None.
        backend: The implementation of causal calls, one of `BACKENDS`; see `ops.dispatch`.
    """

    window: int = 64
    sink_tokens: int = 4
    kept_keys: int | tuple[int, ...] = 0
    scaling: float
    causal: bool = True
    softmax_heads: tuple[int, ...] = ()
    sliding_window: int | None = None
    sink_logits: torch.Tensor | None = dataclasses.field(default=None, compare=False)
    backend: str = "auto"

    def replace(self, **changes: Any) -> "AttentionSettings":
        """The settings with some fields changed."""
        return dataclasses.replace(self, **changes)

    def same_as(self, other: "AttentionSettings") -> bool:
        """Whether all fields are equal; sink logits must be the same tensor object."""
        return self == other and self.sink_logits is other.sink_logits
