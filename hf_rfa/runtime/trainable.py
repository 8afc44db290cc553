"""Which tensors of a module an optimiser trains."""

from collections.abc import Iterable

from torch import nn


def make_parameters(module: nn.Module, names: Iterable[str]) -> None:
    """Turn the module's buffers of these names into Parameters."""
    for name in names:
        if name in module._buffers:
            tensor = getattr(module, name)
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(tensor))


def freeze(module: nn.Module) -> set[str]:
    """Train none of the module's own Parameters; the names of those that were trained."""
    trained = {name for name, parameter in module.named_parameters(recurse=False) if parameter.requires_grad}
    for name in trained:
        getattr(module, name).requires_grad_(False)
    return trained


def unfreeze(module: nn.Module, names: Iterable[str]) -> None:
    """Train the Parameters of these names."""
    for name in names:
        getattr(module, name).requires_grad_(True)
