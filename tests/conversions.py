"""Converted tiny models, and what is looked at in them."""

import dataclasses
from typing import Any

import torch
from families import SHORT, Builder, attention_modules, build, outputs_of, token_ids
from transformers import PreTrainedModel

import hf_rfa
from hf_rfa import RFAConfig
from hf_rfa.runtime.adapter import RFAAdapter


def converted(
    model: str | Builder | PreTrainedModel = "llama",
    config: RFAConfig = SHORT,
    *,
    calibrate: Any = False,
    **changes: Any,
) -> PreTrainedModel:
    """A model, or the tiny one of a family, converted with `config` and `changes` to it; not calibrated by default."""
    if not isinstance(model, torch.nn.Module):
        model = build(model)
    return hf_rfa.convert(model, dataclasses.replace(config, **changes), calibrate=calibrate)


def redrawn(model: str | Builder | PreTrainedModel = "llama", draw: int = 3) -> PreTrainedModel:
    """`converted`, with a draw that no conversion begins with: converting again instead of loading shows."""
    model = converted(model)
    hf_rfa.resample(model, draw=draw)
    return model


def adapters(model: PreTrainedModel) -> list[RFAAdapter]:
    """The adapters, in the model's order."""
    return [module.rfa for module in attention_modules(model)]


def same_outputs(one: PreTrainedModel, two: PreTrainedModel) -> bool:
    """Whether two language models give the same logits, bit for bit."""
    inputs = {"input_ids": token_ids(), "use_cache": False}
    return torch.equal(outputs_of(one, inputs), outputs_of(two, inputs))


def training_flags(model: PreTrainedModel) -> dict[str, bool]:
    """Which modules are in training mode, by name."""
    return {name: module.training for name, module in model.named_modules()}
