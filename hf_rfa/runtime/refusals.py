"""Refusals of calls that ask for something that random features cannot express."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rfa.errors import UnsupportedModelError

#: Extra inputs of attention functions that change the scores in ways that random features cannot express.
REFUSED = {
    "softcap": "logit soft-capping",
    "position_bias": "a position bias added to the scores",
    "relative_position_bias": "a position bias added to the scores",
    "attention_bias": "a bias added to the scores",
    "block_table": "continuous batching",
    "head_mask": "a head mask",
    "topk_indices": "sparse attention indices",
    "indices": "sparse attention indices",
}

_NO_WEIGHTS = (
    "Random-feature attention never makes the attention weights. Got output_attentions=True, as an argument or in the "
    "model's config. Call `hf_rfa.revert(model)` first, or drop it."
)


def check_inputs(module: nn.Module, mask: Any, extras: dict[str, Any]) -> None:
    """Raise `UnsupportedModelError`, naming the feature, for inputs that random features cannot express."""
    if isinstance(mask, torch.Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} got a mask tensor of shape {tuple(mask.shape)}: masks of one's own (4-D) "
            "cannot be followed by random features. Describe padding by a 2-D `attention_mask` and packing by "
            "`position_ids`."
        )
    for name, meaning in REFUSED.items():
        if extras.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses {meaning} (`{name}`), which random features cannot express. Keep "
                "softmax attention for this model."
            )
    if extras.get("output_attentions"):
        raise UnsupportedModelError(_NO_WEIGHTS)


def refuse_shared_keys(kwargs: Mapping[str, Any]) -> None:
    """Refuse to return keys and values: with a cache, Gemma 3n and 4 would return those of the new tokens alone."""
    if kwargs.get("return_shared_kv_states"):
        raise UnsupportedModelError(
            "A converted model keeps no keys and values of all tokens to hand out. Got return_shared_kv_states=True "
            "(an assistant that reads the keys of its target, such as Gemma4Assistant, asks for it). Drop it, or use "
            "an assistant with keys of its own."
        )


def refuse_attention_weights(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Refuse `output_attentions`, which some models ignore, returning empty tuples."""
    asked = kwargs.get("output_attentions")
    if asked if asked is not None else getattr(model.config, "output_attentions", False):
        raise UnsupportedModelError(_NO_WEIGHTS)
