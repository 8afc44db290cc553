"""Forwards that a cache layer can take back, whole or in part."""

from dataclasses import dataclass

import torch

from hf_rfa.features.maps import FarKernel
from hf_rfa.ops.attention import attend
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.state import RFAState


@dataclass(frozen=True)
class RecordedStep:
    """One forward: the state before it and the tokens that it added."""

    before: RFAState | None
    key: torch.Tensor
    value: torch.Tensor
    kernel: FarKernel
    settings: AttentionSettings
    layout: TokenLayout

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.key.shape[2]

    def replay(self, kept: int) -> RFAState | None:
        """The state after the first `kept` tokens."""
        if not kept:
            return self.before
        token_mask = None if self.layout.token_mask is None else self.layout.token_mask[:, :kept]
        key, value = self.key[:, :, :kept], self.value[:, :, :kept]
        return state_after(key, value, self.kernel, self.settings, TokenLayout(token_mask), self.before)


def state_after(
    key: torch.Tensor, value: torch.Tensor, kernel: FarKernel, settings: AttentionSettings, layout: TokenLayout,
    before: RFAState | None,
) -> RFAState:  # fmt: skip
    """The state after these keys and values, which does not depend on the queries."""
    settings = settings.replace(sink_logits=None)
    _, state = attend(key, key, value, kernel, settings, layout, before, output_final_state=True)
    assert state is not None
    return state
