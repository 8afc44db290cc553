"""One call of the attention function: the arguments that Transformers passes (`AttentionCall`), and those of the
operator that are made of them (`AttendInputs`).

Neither is frozen, which would cost microseconds in every decoding step; nothing writes to them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.attention import attend
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.state import RFAState
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.calls import Interception
from hf_rfa.runtime.mask import MaskRows, RFAMask


@dataclass(eq=False)
class AttendInputs:
    """The arguments of `attend` for the new tokens of one layer, except the state to continue from.

    Attributes:
        query, key, value: (B, H, N, D), (B, Hk, N, D), (B, Hk, N, M).
        statistics: Counts dropped far parts; None for feature maps that drop none.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kernel: FarKernel
    settings: AttentionSettings
    layout: TokenLayout
    statistics: FarStatistics | None = None

    @property
    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """query, key, value."""
        return self.query, self.key, self.value

    def attend(
        self, state: RFAState | None = None, *, output_final_state: bool = False
    ) -> tuple[torch.Tensor, RFAState | None]:
        """`attend` of these tokens after `state`: the output (B, H, N, M), and the state after them if asked for."""
        return attend(
            *self.tokens, self.kernel, self.settings, self.layout, state,
            statistics=self.statistics, output_final_state=output_final_state,
        )  # fmt: skip


@dataclass(eq=False)
class AttentionCall:
    """The arguments that Transformers passes to the attention function of one layer.

    Attributes:
        adapter: The module's; None in the dry run of `convert`.
        query, key, value: (B, H, N, D), (B, Hk, T, D), (B, Hk, T, M).
        mask: None if no mask was given.
        scaling: Factor of q.k.
        dropout: The rate; 0 outside of training.
        is_causal: None if the model does not pass it.
        extras: The function's other arguments, by name.
        draw: The draw of omega to use; None for the adapter's current one.
        interception: See `Interception`.
    """

    module: nn.Module
    adapter: RFAAdapter | None
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: RFAMask | None
    scaling: float
    dropout: float
    is_causal: bool | None
    extras: dict[str, Any]
    draw: int | None
    interception: Interception

    @property
    def sink_logits(self) -> torch.Tensor | None:
        """(H,) logits that the layer has learned to add to the denominator (gpt-oss)."""
        return self.extras.get("s_aux")

    @property
    def causal(self) -> bool:
        """Whether a token sees only the tokens before it."""
        if self.mask is not None:
            return self.mask.causal
        # The convention of Transformers' own sdpa function.
        return bool(self.is_causal if self.is_causal is not None else getattr(self.module, "is_causal", True))

    @property
    def past_mask(self) -> torch.Tensor | None:
        """(B, T - N) bool over the tokens before the new ones, False for padding; None if there is no padding."""
        token_mask = None if self.mask is None else self.mask.token_mask
        return None if token_mask is None else token_mask[:, : -self.query.shape[2]]

    @property
    def rows(self) -> MaskRows | None:
        """The layer's mask if nothing simpler describes it; see `mask_of_its_own`."""
        return None if self.mask is None else mask_of_its_own(self.mask, self.extras)

    @property
    def over_another_sequence(self) -> bool:
        """Whether queries and keys are of different tokens."""
        return self.key.shape[2] != self.query.shape[2]

    def settings(self, **more: Any) -> AttentionSettings:
        """The operator's settings: those that the model passes, and `more` of the adapter's."""
        causal, sliding_window = self.causal, self.extras.get("sliding_window")
        if sliding_window is not None and not causal:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} has a sliding window on both sides and no mask that says so. Keep "
                "softmax for this model."
            )
        return AttentionSettings(
            scaling=self.scaling, causal=causal, sink_logits=self.extras.get("s_aux"), sliding_window=sliding_window,
            **more,
        )  # fmt: skip

    def layout(self) -> TokenLayout:
        """Padding and packing of the new tokens.

        Documents come from the mask (`position_ids`), else from what padding-free collators pass.
        """
        mask, length, device = self.mask, self.query.shape[2], self.query.device
        lengths, segment_ids = self.extras.get("cu_seq_lens_q"), self.extras.get("seq_idx")
        if segment_ids is None and lengths is not None:
            slots = torch.arange(length, device=device)
            segment_ids = torch.searchsorted(lengths.to(device, torch.int64), slots, right=True)[None]
        if segment_ids is not None and (mask is None or mask.segment_ids is None):
            token_mask = None if mask is None or mask.token_mask is None else mask.token_mask[:, -length:]
            return TokenLayout(token_mask, segment_ids.to(device))
        return TokenLayout() if mask is None else mask.layout(length)

    def with_all_queries(self) -> "AttentionCall":
        """The call with a query for each key, where a layer with shared keys is asked for the last tokens alone.

        The missing queries are zeros, in front; `rfa_attention_forward` drops their outputs.
        """
        missing = self.key.shape[2] - self.query.shape[2]
        if missing <= 0 or not shares_keys(self.module):
            return self
        if self.adapter is not None and self.adapter.kept_keys and self.adapter.kind == "linear":
            raise UnsupportedModelError(
                f"The queries of all tokens decide which keys {type(self.module).__name__} keeps. Got those of the "
                f"last {self.query.shape[2]} of {self.key.shape[2]}. Pass `logits_to_keep` by name, or none, or "
                "convert with RFAConfig(kept_keys=0)."
            )
        return dataclasses.replace(self, query=F.pad(self.query, (0, 0, missing, 0)))


def mask_of_its_own(mask: Any, extras: dict[str, Any]) -> MaskRows | None:
    """A layer's mask if it is more than causality, padding, packing and a sliding window that the layer names."""
    rows = mask.rows if isinstance(mask, RFAMask) else None
    named = rows is not None and rows.sliding and extras.get("sliding_window") is not None
    return None if named else rows


def shares_keys(module: nn.Module) -> bool:
    """Whether a module attends to the keys and values of an earlier one (Gemma 3n, Gemma 4)."""
    return bool(getattr(module, "is_kv_shared_layer", False))
