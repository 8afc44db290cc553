"""Whether a model keeps packed documents apart: not every one tells its layers where a document ends.

Transformers finds the documents of a row in `position_ids` that begin anew, where there is neither a mask nor a cache.
Some models do not pass the positions on, and recurrent layers carry one document's state into the next.
"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_rfa.runtime.arguments import accepts
from hf_rfa.runtime.quiet import quiet_eval

#: Largest change of a document's outputs, relative to the largest output, that rounding explains.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE_ROUNDING = 3e-2


def keeps_documents_apart(model: PreTrainedModel, inputs: Mapping[str, Any]) -> bool:
    """Whether the second of two documents packed by `position_ids` ignores the first, tried on the dry run's ids.

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
        return False  # the model rejects this call, packed or not
    if one is None or two is None:
        return False
    change = (one - two)[:, half:].abs().max() / one.abs().max().clamp_min(torch.finfo(one.dtype).tiny)
    return bool(change <= _ROUNDING.get(one.dtype, _COARSE_ROUNDING))


def _token_outputs(output: Any, length: int) -> torch.Tensor | None:
    """The first output with one vector per token; None if there is none."""
    for value in output.values():
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] == length:
            return value
    return None
