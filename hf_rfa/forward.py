"""The forward of a converted model: what has to happen once in each, whoever calls it and however.

sentence-transformers calls `model.forward`, TRL the inner `model.model`, Accelerate wraps what it finds: so nothing of
this hangs on hooks of the outermost `__call__`. Every Transformers model in a converted one has a stand-in for its
`forward`; the first of them that a call reaches begins the `ForwardCall`.
"""

import inspect
import weakref
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rfa.calls import (
    ForwardCall,
    current_forward,
    current_interception,
    forward_call,
    in_backward_pass,
    refuse_in_graph,
)
from hf_rfa.errors import UnsupportedModelError
from hf_rfa.packing import refuse_packing, refuse_packing_beside_a_cache
from hf_rfa.record import RECORD
from hf_rfa.refusals import refuse_attention_weights
from hf_rfa.resample import resample
from hf_rfa.standins import StandIn


class ModelForward(StandIn):
    """Stands in for the `forward` of a Transformers model that is a converted one, or lies in one."""

    __slots__ = ("_base", "_names")
    method = "forward"

    def __init__(self, module: PreTrainedModel, base: PreTrainedModel) -> None:
        super().__init__(module)
        self._base: Any = weakref.ref(base)
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_base": self._base()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "_base"})
        self._base = weakref.ref(state["_base"])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed:
            return self.original(*args, **kwargs)
        model, base = self.module, self._base()
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        _refuse_tracing(model)
        refuse_attention_weights(model, named)
        if torch.compiler.is_compiling():
            refuse_in_graph()
            _refuse_redraws_in_graph(model, base)
            return self.original(*args, **kwargs)
        outer = current_forward()
        if outer is not None and outer.model == id(base):
            return self.original(*args, **kwargs)
        conversion = getattr(base, RECORD, None)  # None while `convert` looks at the model
        if conversion is not None:
            check = refuse_packing_beside_a_cache if conversion.packs else refuse_packing
            check(model, named)
        draw = None if conversion is None else _draw(model, base, conversion.config.resample)
        with forward_call(ForwardCall(id(base), draw, current_interception())):
            return self.original(*args, **kwargs)


def _draw(model: nn.Module, base: nn.Module, schedule: Any) -> int | None:
    """The draw of this forward: a new one in each training forward with `RFAConfig(resample="forward")`."""
    if schedule != "forward" or not (model.training and torch.is_grad_enabled()):
        return None
    if in_backward_pass():
        raise UnsupportedModelError(
            "A forward of the whole model runs again in the backward pass (torch.utils.checkpoint around it), where "
            'resample="forward" would draw another omega. Checkpoint its layers '
            "(`model.gradient_checkpointing_enable()`), or use RFAConfig(resample=k) with `hf_rfa.ResampleCallback`."
        )
    return resample(base)


def _refuse_redraws_in_graph(model: nn.Module, base: nn.Module) -> None:
    conversion = getattr(base, RECORD, None)
    if conversion is not None and conversion.config.resample == "forward" and model.training:
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
