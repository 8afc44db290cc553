"""The mask function registered as "rfa": padding and packing in O(N), no N x N mask."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.softmax import QUERY_BLOCK, MaskBlock
from hf_rfa.runtime.calls import ForwardCall, travelling_call


@dataclass(frozen=True)
class MaskRows:
    """A mask that is more than causality, padding and packing, made in blocks of rows.

    Attributes:
        arguments: Those of Transformers' own mask functions.
        sliding: Whether it is nothing but a causal window of old tokens, which exact attention can follow. Under
            compilation, which cannot ask, whether it may be; adapters know from the dry run.
    """

    arguments: dict[str, Any]
    sliding: bool
    _blocks: list[MaskBlock] = field(default_factory=list, repr=False, compare=False)

    def blocks(self) -> list[MaskBlock]:
        """The mask, each block without columns that none of its rows sees; made once for all layers of a forward."""
        if not self._blocks:
            queries, keys = self.arguments["q_length"], self.arguments["kv_length"]
            start = 0
            while start < queries:  # `range` would make a constant of a traced length
                stop = min(start + QUERY_BLOCK, queries)
                self._blocks.append(self._block(start, stop, keys))
                start += QUERY_BLOCK
        return self._blocks

    def last(self, queries: int) -> "MaskRows":
        """The rows of the last `queries` tokens."""
        length = self.arguments["q_length"]
        offset = self.arguments["q_offset"] + length - queries
        return MaskRows({**self.arguments, "q_offset": offset, "q_length": queries}, self.sliding)

    def _block(self, start: int, stop: int, keys: int) -> MaskBlock:
        arguments = {**self.arguments, "q_offset": self.arguments["q_offset"] + start, "q_length": stop - start}
        visible = sdpa_mask(**arguments, allow_is_causal_skip=False)
        assert visible is not None
        low, high = 0, keys
        if not torch.compiler.is_compiling():
            seen = visible.any(dim=2).any(dim=0)[0].nonzero().flatten()
            low, high = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)
        return MaskBlock(start, stop, low, high, visible[..., low:high])


@dataclass(frozen=True)
class RFAMask:
    """All that the attention function must know besides q, k, v; the model passes it on in place of a mask tensor.

    Attributes:
        causal: Whether a token sees only the tokens before it.
        padding: (B, T) over old and new tokens, 0 or False for padding; None if no padding mask was given.
        segment_ids: (B, N) number of each new token's packed document; None if each row is one document.
        rows: The mask itself, where the other fields cannot express it: windows and chunks of local layers, and
            anything else that a model combines its mask with. Such layers stay softmax.
        keys: Number of old and new tokens.
        call: The forward that made it, if layers that run again in the backward pass need it.
    """

    causal: bool
    padding: torch.Tensor | None = None
    segment_ids: torch.Tensor | None = None
    rows: MaskRows | None = None
    keys: int = 0
    call: ForwardCall | None = field(default=None, repr=False, compare=False)
    _layouts: dict[int, TokenLayout] = field(default_factory=dict, repr=False, compare=False)
    _token_masks: list[torch.Tensor | None] = field(default_factory=list, repr=False, compare=False)

    @property
    def shape(self) -> tuple[int]:
        """(keys,); Transformers asks when an outer model passes its finished mask to an inner one (PaliGemma)."""
        return (self.keys,)

    @property
    def ndim(self) -> int:
        """1: nothing that Transformers takes for a 2-D or a 4-D mask."""
        return 1

    def __getitem__(self, index: Any) -> "RFAMask":
        """mask[:, :, -n:, :], the rows of the last n queries, as Gemma 4 asks for where no others are needed."""
        whole, last = slice(None), index[2] if isinstance(index, tuple) and len(index) == 4 else None
        if not isinstance(last, slice) or index[:2] != (whole, whole) or index[3] != whole or last.start is None:
            raise UnsupportedModelError(
                f"A model takes its attention mask apart (mask[{index}]), which random features cannot follow. Keep "
                "softmax attention for this model."
            )
        if last.start == 0:  # logits_to_keep=0: all of them
            return self
        rows = None if self.rows is None else self.rows.last(-last.start)
        return dataclasses.replace(self, rows=rows, _layouts={}, _token_masks=[])

    @property
    def token_mask(self) -> torch.Tensor | None:
        """(B, T) bool over old and new tokens, False for padding; None if there is none.

        Searched for padding when first asked for. A decoding step never asks: its past is a state.
        """
        if self.padding is None or torch.compiler.is_compiling():
            return None if self.padding is None else self.padding.bool()
        if not self._token_masks:
            self._token_masks.append(_padded(self.padding))
        return self._token_masks[0]

    def layout(self, length: int) -> TokenLayout:
        """Padding and packing of the last `length` tokens, one object for all layers."""
        if torch.compiler.is_compiling():  # a length looked up among others would be a constant of the graph
            return TokenLayout(None if self.token_mask is None else self.token_mask[:, -length:], self.segment_ids)
        if length not in self._layouts:
            # Padding in the past alone is accounted for in the state.
            self._layouts[length] = TokenLayout(
                None if self.padding is None else _padded(self.padding[:, -length:]), self.segment_ids
            )
        return self._layouts[length]


def rfa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | RFAMask | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> RFAMask | None:
    """Called by Transformers' `create_causal_mask` and its relatives; None if every token sees every other."""
    call = travelling_call()
    if isinstance(attention_mask, RFAMask):
        return attention_mask  # made by an outer model, as the 4-D masks that Transformers passes on
    padding = attention_mask
    if padding is not None and padding.dim() != 2:
        raise UnsupportedModelError(
            "Only 2-D attention masks (batch, tokens) can be used with random features. Got shape "
            f"{tuple(padding.shape)}. Describe padding by a 2-D mask and packing by `position_ids`."
        )
    causal: bool | None = mask_function is not bidirectional_mask_function
    segment_ids, limited = None, False
    if use_vmap:
        causal = None
    elif mask_function not in (causal_mask_function, bidirectional_mask_function):
        causal, segment_ids, limited = _probe(mask_function, batch_size, q_length, int(q_offset), torch.device(device))
    rows = None
    if limited or causal is None or local_size is not None:
        arguments = {
            "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": int(q_offset),
            "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": padding, "use_vmap": use_vmap,
            "device": device,
        }  # fmt: skip
        rows = MaskRows(arguments, sliding=bool(causal))
    if padding is not None:
        padding = padding[:, -max(kv_length, q_length) :]
    mask = RFAMask(bool(causal), padding, segment_ids, rows, kv_length, call)
    said = causal or segment_ids is not None or rows is not None or call is not None
    return mask if said or mask.token_mask is not None else None


def padding_of(mask: torch.Tensor) -> RFAMask | None:
    """The `RFAMask` of a 4-D mask (B, 1, 1, T) of a bidirectional layer: the same keys for all queries, so padding.

    None for any other mask. Some models build such a mask from a 2-D one, as bool or as 0 and a very negative number.
    """
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return None
    token_mask = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] > torch.finfo(mask.dtype).min / 2
    if not torch.compiler.is_compiling() and mask.dtype != torch.bool and bool(mask[:, 0, 0][token_mask].any()):
        return None
    return RFAMask(causal=False, padding=token_mask, keys=mask.shape[-1], call=travelling_call())


def _padded(padding: torch.Tensor) -> torch.Tensor | None:
    """`padding` as bool; None if there is none in it."""
    token_mask = padding.bool()
    return None if bool(token_mask.all()) else token_mask


def _probe(
    mask_function: Callable[..., Any], batch: int, length: int, offset: int, device: torch.device
) -> tuple[bool | None, torch.Tensor | None, bool]:
    """(causal, segment_ids, limited) of a composed mask function, found by asking it about O(N) pairs.

    A packed mask hides a token's neighbour at a border; a sliding one hides the document's first token. causal is None
    if the mask is neither causal nor bidirectional.
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
    segment_ids = torch.cat([torch.zeros(batch, 1, dtype=torch.int64, device=device), (~joined).cumsum(1)], dim=1)
    if torch.compiler.is_compiling():
        # Nothing can be asked of tensors then. What Transformers composes without vmap is causal with packing, which
        # it always looks for when it is traced; local layers whose mask is another one go by the mask itself.
        return True, segment_ids, False
    causal = not bool(forward.any())
    if not causal and not bool(forward.all()):
        return None, None, True
    first = torch.searchsorted(segment_ids, segment_ids)
    limited = not bool(sees(tokens.expand(batch, -1), offset + first).all()) or (
        offset > 0 and not bool(sees(tokens, tokens * 0).all())
    )
    packed = bool((~joined).any())
    return causal, segment_ids if packed else None, limited
