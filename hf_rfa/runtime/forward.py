"""The forward of a converted model: everything that has to happen once per forward, however it is called.

Every Transformers model in a converted one answers a forward by `converted_forward` (see `converted_class`); the
outermost one begins the `ForwardCall`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.runtime.calls import (
    ForwardCall,
    current_forward,
    current_interception,
    forward_call,
    in_backward_pass,
    refuse_in_graph,
)
from hf_rfa.runtime.packing import refuse_packing, refuse_packing_beside_a_cache
from hf_rfa.runtime.record import INSIDE, Conversion
from hf_rfa.runtime.refusals import refuse_attention_weights, refuse_shared_keys
from hf_rfa.runtime.resampling import resample

#: The attribute of a converted class that holds the names of its forward's arguments, without `self`.
ARGUMENTS = "_rfa_forward_arguments"


def converted_forward(model: Any, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A forward of a converted model, or of a Transformers model inside one; `own` is its class's, bound to it."""
    record = model.__dict__.get(INSIDE)
    if record is None:  # reverted, and called through a wrapper from before
        return own(*args, **kwargs)
    named = {**dict(zip(getattr(type(model), ARGUMENTS), args, strict=False)), **kwargs}
    _refuse_tracing(model)
    refuse_attention_weights(model, named)
    refuse_shared_keys(named)
    if record.config.most_kept_keys and isinstance(kwargs.get("logits_to_keep"), int) and model.base_model is model:
        # Gemma 4 would ask the layers that share keys for these tokens alone, whose kept keys all queries decide; what
        # the head is asked for is its own affair.
        kwargs["logits_to_keep"] = 0
    if torch.compiler.is_compiling():
        refuse_in_graph()
        _refuse_redraws_in_graph(model, record)
        return own(*args, **kwargs)
    outer = current_forward()
    if outer is not None and outer.record == id(record):
        return own(*args, **kwargs)
    check = refuse_packing_beside_a_cache if record.packs else refuse_packing
    check(model, named)
    draw = _draw(model, record)
    with forward_call(ForwardCall(id(record), draw, current_interception())):
        return own(*args, **kwargs)


def _draw(model: nn.Module, record: Conversion) -> int | None:
    """The draw of this forward: a new one per training forward with `RFAConfig(resample="forward")`, else None."""
    if record.config.resample != "forward" or not (model.training and torch.is_grad_enabled()):
        return None
    if in_backward_pass():
        raise UnsupportedModelError(
            "A forward of the whole model runs again in the backward pass (torch.utils.checkpoint around it), where "
            'resample="forward" would draw another omega. Checkpoint its layers (the activation checkpointing of '
            "Transformers), or use RFAConfig(resample=k) with `hf_rfa.ResampleCallback`."
        )
    return resample(model)


def _refuse_redraws_in_graph(model: nn.Module, record: Conversion) -> None:
    if record.config.resample == "forward" and model.training:
        raise UnsupportedModelError(
            'A graph cannot draw omega, which resample="forward" does in every training forward. Use '
            "RFAConfig(resample=k) with `hf_rfa.ResampleCallback`, or train without torch.compile."
        )


def _refuse_tracing(model: nn.Module) -> None:
    if torch.jit.is_tracing():
        raise UnsupportedModelError(
            f"torch.jit.trace would freeze where the padding of its example lies in {type(model).__name__}. Use "
            "`torch.export.export(model, ...)` or `torch.compile(model)`, which keep it an input."
        )
