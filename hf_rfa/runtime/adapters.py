"""The adapters of a model, found by the modules that they hang in."""

from collections.abc import Iterator

from torch import nn

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.runtime.adapter import ADAPTER_NAME, RFAAdapter


def adapter_of(module: nn.Module) -> RFAAdapter | None:
    """The adapter of an attention module; None if it has none."""
    adapter = module._modules.get(ADAPTER_NAME)
    return adapter if isinstance(adapter, RFAAdapter) else None


def named_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, RFAAdapter]]:
    """(name of the attention module, the module, its adapter) of every layer, in the model's order."""
    for name, module in model.named_modules():
        adapter = adapter_of(module)
        if adapter is not None:
            yield name, module, adapter


def require_adapters(model: nn.Module) -> list[RFAAdapter]:
    """The adapters of a converted model; `UnsupportedModelError` if it is not converted."""
    adapters = [adapter for _, _, adapter in named_adapters(model)]
    if not adapters:
        raise UnsupportedModelError(
            f"The model is not converted. Got a {type(model).__name__} without adapters. Call "
            "`hf_rfa.convert(model)` first."
        )
    return adapters
