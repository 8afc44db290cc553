"""The mask function registered as "rfa": padding and packing in O(N), no N x N mask."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.ops.layout import TokenLayout


@dataclass(frozen=True)
class RFAMask:
    """What the attention function must know besides q, k, v; handed through the model in place of a mask tensor.

    Attributes:
        causal: Whether a token sees only what comes before it.
        valid: (B, T) bool over old and new tokens, False for padding; None if there is none.
        document: (B, N) number of each new token's packed document; None for one a row.
        limited: Whether the mask hides old tokens, as a layer's own sliding window does.
    """

    causal: bool
    valid: torch.Tensor | None = None
    document: torch.Tensor | None = None
    limited: bool = False
    _layouts: dict[int, TokenLayout] = field(default_factory=dict, repr=False, compare=False)

    def layout(self, length: int) -> TokenLayout:
        """Padding and packing of the last `length` tokens, one object for all layers."""
        if length not in self._layouts:
            valid = None if self.valid is None else self.valid[:, -length:]
            if valid is not None and not torch.compiler.is_compiling() and bool(valid.all()):
                valid = None  # the padding lies in the past, whose states know of it
            self._layouts[length] = TokenLayout(valid, self.document)
        return self._layouts[length]


def rfa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> RFAMask | None:
    """Called by Transformers' `create_causal_mask` and its relatives. None stands for nothing to say: no padding."""
    if use_vmap:
        raise UnsupportedModelError(
            "The model combines its mask with a function of its own, which random features cannot follow. Keep "
            "softmax for this model, or call it without that feature (for example without image tokens)."
        )
    causal = mask_function is not bidirectional_mask_function
    document, limited = None, False
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        causal, document, limited = _probe(mask_function, batch_size, q_length, int(q_offset), torch.device(device))
    valid = attention_mask
    if valid is not None and valid.dim() != 2:
        raise UnsupportedModelError(
            "Only 2-D attention masks (batch, tokens) can be used with random features. Got shape "
            f"{tuple(valid.shape)}. Describe padding by a 2-D mask and packing by `position_ids`."
        )
    if valid is not None:
        valid = valid[:, -max(kv_length, q_length) :].bool()
        if not torch.compiler.is_compiling() and bool(valid.all()):
            valid = None
    if valid is None and document is None and not limited:
        return None
    return RFAMask(causal, valid, document, limited)


def _probe(
    mask_function: Callable[..., Any], batch: int, length: int, offset: int, device: torch.device
) -> tuple[bool, torch.Tensor | None, bool]:
    """What a composed mask function means, asked at O(N) pairs: (causal, document, limited).

    A packed mask hides a token's neighbour at a border; a sliding one hides the document's first token.
    """
    rows = torch.arange(batch, device=device)[:, None]
    tokens = offset + torch.arange(length, device=device)[None]

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        answer = mask_function(rows, torch.zeros_like(rows), query, key)
        return torch.as_tensor(answer, device=device).expand(batch, query.shape[1])

    forward = (
        sees(tokens[:, :-1], tokens[:, 1:]) if length > 1 else torch.zeros(batch, 0, dtype=torch.bool, device=device)
    )
    joined = sees(tokens[:, 1:], tokens[:, :-1]) if length > 1 else forward
    causal = not bool(forward.any())
    if not causal and not bool(forward.all()):
        raise UnsupportedModelError(
            "The model's mask is neither causal nor bidirectional (some tokens see ahead, others do not), which "
            "random features cannot follow. Keep softmax for this model, or call it without that feature."
        )
    document = torch.cat([torch.zeros(batch, 1, dtype=torch.int64, device=device), (~joined).cumsum(1)], dim=1)
    first = torch.searchsorted(document, document)
    limited = not bool(sees(tokens.expand(batch, -1), offset + first).all()) or (
        offset > 0 and not bool(sees(tokens, tokens * 0).all())
    )
    packed = bool((~joined).any())
    return causal, document if packed else None, limited
