"""The class of a converted model: a subclass of its own class, with a few methods that know of the conversion.

Methods rather than hooks, because sentence-transformers calls `model.forward` and TRL the inner `model.model`, which
never reach the hooks of the outermost `__call__`. A class rather than attributes of the instance, because those would
keep the model alive after `del`, and would still refer to the first model in a copy or a replica. The subclass bears
the name of the model's own class; pickling, copying and `revert` know the original.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.generation.utils import GenerationMixin

from hf_rfa.runtime.adopted_cache import remember_recording
from hf_rfa.runtime.forward import ARGUMENTS, converted_forward
from hf_rfa.runtime.generation import generate, prepare_cache
from hf_rfa.runtime.newest_tokens import update_model_kwargs
from hf_rfa.runtime.record import INSIDE, ORIGINAL, RECORD, original_class
from hf_rfa.saving.hub import push_with_conversion
from hf_rfa.saving.peft_files import load_lora, teach_peft
from hf_rfa.saving.saver import save_with_conversion

#: Replacements of a class's own methods: each gets the model, the own method bound to it, then the call's arguments.
_MODEL_METHODS: dict[str, Callable[..., Any]] = {
    "forward": converted_forward,
    "save_pretrained": save_with_conversion,
    "push_to_hub": push_with_conversion,
    "load_adapter": load_lora,
}
_GENERATION_METHODS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "_prepare_cache_for_generation": prepare_cache,
    "_update_model_kwargs_for_generation": update_model_kwargs,
}


def enter(base: PreTrainedModel, adapted: set[int]) -> None:
    """Give every Transformers model in `base` that holds one of the `adapted` modules (by id) the converted class."""
    teach_peft()
    remember_recording()
    record = getattr(base, RECORD)
    for module in base.modules():
        if isinstance(module, PreTrainedModel) and any(id(part) in adapted for part in module.modules()):
            module.__dict__[INSIDE] = record
            module.__class__ = converted_class(type(module))
            replaced = module.__dict__.get("forward")
            if replaced is not None:  # for example by Accelerate, whose forward holds the class's method
                module.__dict__["forward"] = _forward_around(module, replaced)


def leave(base: nn.Module) -> None:
    """Give the models their own classes back. Wrappers that others have put around a forward keep working."""
    for module in base.modules():
        if module.__dict__.pop(INSIDE, None) is None:
            continue
        module.__class__ = original_class(module)
        own: Any = module.__dict__.get("forward")
        if getattr(own, "is_converted", False):
            module.__dict__["forward"] = own.__wrapped__


_classes: dict[Any, Any] = {}


def converted_class(original: Any) -> Any:
    """The subclass of `original`, made once, under its name."""
    if original not in _classes:
        _classes[original] = _subclass(original)
    return _classes[original]


def _subclass(original: Any) -> Any:
    methods = {**_MODEL_METHODS, **(_GENERATION_METHODS if issubclass(original, GenerationMixin) else {})}
    body: dict[str, Any] = {name: _method(original, name, answer) for name, answer in methods.items()}
    body |= {
        "__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__,
        "__reduce_ex__": _reduce, ORIGINAL: original,
        ARGUMENTS: tuple(inspect.signature(original.forward).parameters)[1:],
    }  # fmt: skip
    return type(original)(original.__name__, (original,), body)


def _method(original: Any, name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(getattr(original, name))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Looked up in each call: others replace methods of the class (Liger's kernels), before or after a conversion.
        # No bound method: where torch.compile breaks its graph it makes one anew by its name, which is this one's.
        return answer(self, functools.partial(getattr(original, name), self), *args, **kwargs)

    return method


def _forward_around(module: nn.Module, replaced: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(replaced)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return converted_forward(module, replaced, *args, **kwargs)

    forward.is_converted = True  # type: ignore[attr-defined]
    return forward


def _reduce(self: Any, protocol: Any) -> Any:
    reduced = object.__reduce_ex__(self, protocol)
    return _new, (original_class(self),), *reduced[2:]


def _new(original: type) -> Any:
    """An empty instance, for pickle and copy."""
    teach_peft()
    remember_recording()
    return object.__new__(converted_class(original))
