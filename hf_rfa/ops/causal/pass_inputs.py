"""The tensors that a pass of the chunked form reads."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PassInputs:
    """Tensors of a pass, in the aligned order of `plan`; the last chunk may be cut short.

    query (B, Hk, G, T, D); key, value (B, Hk, T, D or M); sink_key, sink_value (B, Hk, s, D or M), those of the
    state; all of these in any dtype, see `wide`. decay (B, Hk, n, C), log g summed from each chunk's first slot, or
    None; sink_logits (Hk, G) or None; kv_state (B, Hk, F, M + 1), log_max (B, Hk), the state before the first slot.

    With kept keys: kept_key, kept_value (B, Hk, K, D or M), those of the state; the first fields of
    `exact_pass.Choice`; with a gate, far_decay (A, n, C), log g summed from behind the `evicted` keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sink_key: torch.Tensor
    sink_value: torch.Tensor
    decay: torch.Tensor | None
    sink_logits: torch.Tensor | None
    kv_state: torch.Tensor
    log_max: torch.Tensor
    kept_key: torch.Tensor | None = None
    kept_value: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    kept_mask: torch.Tensor | None = None
    evicted: torch.Tensor | None = None
    evicted_mask: torch.Tensor | None = None
    far_decay: torch.Tensor | None = None
    near: torch.Tensor | None = None
    near_log: torch.Tensor | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the computation: float32 or float64."""
        return self.kv_state.dtype
