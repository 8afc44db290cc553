"""The dry run of `convert`: which modules really send their attention through the interface, and with what.

On a model that does not use the interface, any registered `attn_implementation` loads without complaint and the
model's own attention runs. So a short forward is watched, and softmax outside of the interface is noticed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_rfa.runtime.adapter import ADAPTER_NAME, RFAAdapter
from hf_rfa.runtime.attention_call import mask_of_its_own, shares_keys
from hf_rfa.runtime.calls import Interception, intercept, layer_call
from hf_rfa.runtime.quiet import quiet_eval
from hf_rfa.runtime.record import IMPLEMENTATION


@dataclass
class AttentionCalls:
    """The calls of one attention module in the dry run."""

    module: nn.Module
    key_heads: int
    head_dim: int
    cross: bool
    sliding_window: int | None
    masked: bool
    causal: bool
    count: int = 0


@dataclass
class DryRun:
    """Every attention module in the order of its first call, and softmax seen outside of the interface."""

    exact = True
    calls: dict[int, AttentionCalls] = field(default_factory=dict)
    lengths: set[int] = field(default_factory=set)
    foreign: list[tuple[int, int]] = field(default_factory=list)
    inside: int = 0

    @contextmanager
    def call(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, extras: dict[str, Any]
    ) -> Iterator[None]:
        """Note one call of the attention function; softmax inside it is expected."""
        self.lengths |= {query.shape[2], key.shape[2]}
        if id(module) not in self.calls:
            self.calls[id(module)] = AttentionCalls(
                module,
                key.shape[1],
                key.shape[3],
                cross=key.shape[2] != query.shape[2] and not shares_keys(module),
                sliding_window=extras.get("sliding_window"),
                masked=mask_of_its_own(mask, extras) is not None,
                causal=mask.causal
                if mask is not None and hasattr(mask, "causal")
                else bool(getattr(module, "is_causal", True)),
            )
        self.calls[id(module)].count += 1
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """From here on softmax is expected."""
        self.inside += 1

    def leave(self) -> None:
        """End what `enter` began."""
        self.inside -= 1

    def foreign_attention(self) -> bool:
        """Whether a softmax over tokens was computed outside of the interface."""
        return any(rows in self.lengths and columns in self.lengths for rows, columns in self.foreign)


class _SoftmaxWatch(TorchFunctionMode):
    """Notes the last two dimensions of every softmax of a tensor with three or more, outside of our own function."""

    NAMES = (torch.softmax, torch.Tensor.softmax, F.softmax, F.scaled_dot_product_attention)

    def __init__(self, run: DryRun) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.NAMES and not self.run.inside:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            if func is F.scaled_dot_product_attention:
                self.run.foreign.append((tensors[0].shape[-2], tensors[1].shape[-2]))
            elif tensors and tensors[0].dim() >= 3:
                self.run.foreign.append((tensors[0].shape[-2], tensors[0].shape[-1]))
        return func(*args, **kwargs)


def watch(model: nn.Module, inputs: Mapping[str, Any]) -> DryRun:
    """Run the model once on `inputs`, all heads exact, and note every attention call."""
    run = DryRun()
    with intercept(Interception(recorder=run)), _SoftmaxWatch(run), quiet_eval(model), _parts_left_out(model, run):
        model(**inputs)
    return run


@dataclass
class CallCount:
    """How often each converted module attends in the dry run, and the most in one forward of its own."""

    exact = False
    total: dict[int, int] = field(default_factory=dict)
    in_a_forward: dict[int, int] = field(default_factory=dict)

    @contextmanager
    def call(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, extras: dict[str, Any]
    ) -> Iterator[None]:
        """Note one call of the attention function."""
        yield
        adapter = module._modules[ADAPTER_NAME]
        assert isinstance(adapter, RFAAdapter)
        name, turns = id(module), layer_call(adapter).turns
        self.total[name] = self.total.get(name, 0) + 1
        self.in_a_forward[name] = max(turns, self.in_a_forward.get(name, 0))


def count_calls(model: nn.Module, inputs: Mapping[str, Any]) -> CallCount:
    """Run the converted model once on `inputs` and count its calls."""
    count = CallCount()
    with intercept(Interception(recorder=count)), quiet_eval(model):
        model(**inputs)
    return count


@contextmanager
def _parts_left_out(model: nn.Module, run: DryRun) -> Iterator[None]:
    """Softmax in the parts that are left out is expected."""
    handles = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != IMPLEMENTATION:
            handles.append(module.register_forward_pre_hook(lambda *_: run.enter()))
            handles.append(module.register_forward_hook(lambda *_: run.leave(), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
