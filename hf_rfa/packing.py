"""Packed documents are kept apart or refused: not every model tells its layers where a document ends.

Transformers finds the documents of a row in `position_ids` that begin anew, where there is neither a mask nor a cache.
Some models do not pass the positions on, and recurrent layers carry one document's state into the next.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_rfa.cache_names import CACHE_NAMES
from hf_rfa.errors import UnsupportedModelError
from hf_rfa.example_inputs import accepts
from hf_rfa.quiet import quiet_eval

#: Largest change of a document's outputs, relative to the largest, that another one before it may make: rounding.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE_ROUNDING = 3e-2


def keeps_documents_apart(model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """Whether the second of two documents packed by `position_ids` is blind to the first, tried on the dry run's ids.

    True for models that take no `position_ids`: nothing can be packed there.
    """
    ids = inputs.get("input_ids")
    if not accepts(model, "position_ids") or model.config.is_encoder_decoder or not isinstance(ids, torch.Tensor):
        return True
    length, half = ids.shape[1], ids.shape[1] // 2
    slots = torch.arange(length, device=ids.device)
    more: dict[str, Any] = {"position_ids": torch.where(slots < half, slots, slots - half)[None].expand(len(ids), -1)}
    if accepts(model, "use_cache"):
        more["use_cache"] = False
    other = torch.cat([ids[:, :half].flip(1).roll(1, 1), ids[:, half:]], dim=1)
    try:
        with quiet_eval(model):
            one, two = (_token_outputs(model(input_ids=tokens, **more), length) for tokens in (ids, other))
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        return False  # such a call is not for this model, packed or not
    if one is None or two is None:
        return False
    change = (one - two)[:, half:].abs().max() / one.abs().max().clamp_min(torch.finfo(one.dtype).tiny)
    return bool(change <= _ROUNDING.get(one.dtype, _COARSE_ROUNDING))


def refuse_packing(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """For models that do not keep packed documents apart by plain positions, as the dry run tried them."""
    if is_packed(kwargs) and not _has_rows_of_positions(kwargs):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep packed documents apart: it does not tell all of its layers where "
            "a document ends. Pad the documents instead, one a row."
        )
    refuse_packing_beside_a_cache(model, kwargs)


def refuse_packing_beside_a_cache(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """For all others: beside a cache Transformers does not look for documents."""
    if not is_packed(kwargs):
        return
    asked = kwargs.get("use_cache")
    if any(kwargs.get(name) is not None for name in CACHE_NAMES) or (
        asked if asked is not None else getattr(model.config.get_text_config(), "use_cache", False)
    ):
        raise UnsupportedModelError(
            "Packed documents (`position_ids` that begin anew) are not kept apart beside a cache. Got use_cache=True, "
            "which is the model's default, or a cache. Pass use_cache=False and no cache."
        )


def is_packed(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call describes several documents in a row; not asked under compilation, where it costs the graph."""
    positions: Any = kwargs.get("position_ids")
    if torch.compiler.is_compiling() or kwargs.get("attention_mask") is not None:
        return False
    lengths = kwargs.get("cu_seq_lens_q")
    if isinstance(lengths, torch.Tensor) and len(lengths) > 2:
        return True
    documents = kwargs.get("seq_idx")
    if isinstance(documents, torch.Tensor) and bool((documents.diff(dim=-1) != 0).any()):
        return True
    if _has_rows_of_positions(kwargs):
        positions = positions[0]  # those of the text, in which Transformers looks for documents
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return False
    return bool((positions.diff(dim=1) != 1).any())


def _has_rows_of_positions(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call gives four positions a token, (4, B, N), as Qwen2-VL and its relatives know them."""
    positions = kwargs.get("position_ids")
    return isinstance(positions, torch.Tensor) and positions.dim() == 3 and len(positions) == 4


def _token_outputs(output: Any, length: int) -> torch.Tensor | None:
    """The first output with one row of numbers a token."""
    for value in output.values():
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] == length:
            return value
    return None
