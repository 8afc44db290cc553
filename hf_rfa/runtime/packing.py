"""Refusals of calls that pack several documents into a row."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.runtime.arguments import CACHE_NAMES


def refuse_packing(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Refuse all packing: the dry run showed that plain positions do not keep this model's documents apart."""
    if is_packed(kwargs) and not _has_rows_of_positions(kwargs):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep packed documents apart: it does not tell all of its layers where "
            "a document ends. Pad the documents instead, one per row."
        )
    refuse_packing_beside_a_cache(model, kwargs)


def refuse_packing_beside_a_cache(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Refuse packing beside a cache, where Transformers does not look for documents."""
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
    """Whether a call packs several documents into a row. False under compilation: asking breaks the graph."""
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
    """Whether a call has four positions per token, (4, B, N), as Qwen2-VL and its relatives do."""
    positions = kwargs.get("position_ids")
    return isinstance(positions, torch.Tensor) and positions.dim() == 3 and len(positions) == 4
