"""The `_attn_implementation` of every config object in a model, switched part by part."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_rfa.errors import ConfigError
from hf_rfa.runtime.record import IMPLEMENTATION, Implementations


class OwnConfigs:
    """Gives a model config objects of its own: `AutoModel.from_config` shares the caller's among all models it makes.

    All modules of the model (and of its wrappers) that hold one of its config objects get the same copy. `undo` puts
    the originals back if a conversion fails.
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel) -> None:
        copies: dict[int, Any] = {}
        for config, _ in implementations(base):  # outer ones first: copying one copies those inside it
            copy.deepcopy(config, copies)
        self._replaced = [
            (module, name, value)
            for module in {id(m): m for m in (*model.modules(), *base.modules())}.values()
            for name, value in vars(module).items()
            if isinstance(value, PreTrainedConfig) and id(value) in copies
        ]
        for module, name, value in self._replaced:
            module.__dict__[name] = copies[id(value)]

    def undo(self) -> None:
        """Put the originals back."""
        for module, name, value in self._replaced:
            module.__dict__[name] = value


def implementations(model: PreTrainedModel) -> Implementations:
    """Every config object in the model, with its current implementation."""
    found: dict[int, Any] = {}
    for module in [model, *model.modules()]:
        if isinstance(module, PreTrainedModel):
            _collect(module.config, found)
    return [(config, config._attn_implementation) for config in found.values()]


def switch(model: PreTrainedModel, before: Implementations, submodels: Sequence[str] | None) -> None:
    """Switch the model to "rfa", except the sub-configs that `submodels` leaves out."""
    named = [name for name in model.config.sub_configs if getattr(model.config, name, None) is not None]
    unknown = [] if submodels is None else [name for name in submodels if name not in named]
    if unknown or (submodels is not None and (isinstance(submodels, str) or not submodels)):
        raise ConfigError(
            f"`submodels` must list sub-configs of {type(model.config).__name__}: {named}. Got {submodels!r}. Leave "
            "it out to convert every part that is reached."
        )
    left_out: dict[int, Any] = {}
    for name in named:
        if submodels is not None and name not in submodels:
            _collect(getattr(model.config, name), left_out)
    restore([(config, old if id(config) in left_out else IMPLEMENTATION) for config, old in before])


def keep_unreached(model: PreTrainedModel, before: Implementations, reached: Iterable[nn.Module]) -> list[str]:
    """Restore the attention of the parts without any of the `reached` attention modules; returns their names."""
    inside = {id(module) for module in reached}
    names = {name for name, module in model.named_modules() if id(module) in inside}
    around = {name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)} | names | {""}
    modules = dict(model.named_modules())
    used = {id(modules[name].config) for name in around if hasattr(modules.get(name), "config")}
    switched = {id(config) for config, _ in before if config._attn_implementation == IMPLEMENTATION}
    restore([(c, IMPLEMENTATION if id(c) in used & switched else old) for c, old in before])
    parts = [
        name
        for name, module in modules.items()
        if isinstance(module, PreTrainedModel) and id(module.config) in switched - used
    ]
    return [name for name in parts if not any(name.startswith(f"{other}.") for other in parts)]


def restore(before: Implementations) -> None:
    """Set every config object's implementation."""
    for config, implementation in before:
        config._attn_implementation = implementation


def _collect(config: Any, found: dict[int, Any]) -> None:
    if config is not None and id(config) not in found:
        found[id(config)] = config
        for name in config.sub_configs:
            _collect(getattr(config, name, None), found)
