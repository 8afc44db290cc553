"""One forward and one backward pass of a model with exact heads, its layers shown their inputs and their gradients.

Each block of the model (a decoder layer, an encoder layer) is run again in the backward pass, so that of a text only
the inputs of the blocks are held between the passes. The blocks are the entries of `nn.ModuleList`s that hold the
attention modules; an attention module outside of any is held whole.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import PreTrainedModel

from hf_rfa.calibration.outputs import OutputReader, Outputs
from hf_rfa.errors import UnsupportedModelError
from hf_rfa.ops.attention import attend
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import adapter_of
from hf_rfa.runtime.arguments import CACHE_NAMES
from hf_rfa.runtime.calls import Interception, intercept
from hf_rfa.runtime.quiet import quiet_eval


@dataclass(frozen=True)
class LayerInputs:
    """What an observer of a layer is called with (`hf_rfa.runtime.calls.Interception`), without gradients."""

    adapter: RFAAdapter
    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    layout: TokenLayout
    settings: AttentionSettings
    exact: torch.Tensor

    def wide(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v in float32."""
        return self.query.float(), self.key.float(), self.value.float()

    def exact_output(self) -> torch.Tensor:
        """The exact output (B, H, N, M) in float32, computed again if the model's own is rounded to less."""
        if self.exact.dtype in (torch.float32, torch.float64):
            return self.exact.float()
        return attend(*self.wide(), self.adapter.kernel, self.settings, self.layout)[0]


#: Arguments by which blocks get a cache, in all versions of Transformers and of checkpoints' own code.
_CACHES = (*CACHE_NAMES, "past_key_value", "layer_past")
#: Is shown a layer's inputs in a forward pass; what it is for a layer's gradient, (B, H, N, M), in a backward pass.
Look = Callable[[LayerInputs], None]
Take = Callable[[LayerInputs, torch.Tensor], None]


class LayerGradients:
    """The passes over one model.

    Example::

        passes = LayerGradients(model, adapters)
        with passes.watching():
            outputs = passes.forward(inputs)
            for gradient in outputs.gradients([0], draws=1):
                passes.backward(outputs, gradient, {adapter: take for adapter in adapters})
    """

    def __init__(self, model: PreTrainedModel, adapters: Sequence[RFAAdapter]) -> None:
        self.model, self.reader = model, OutputReader(model)
        self.layers = {adapter: _Layer() for adapter in adapters if adapter.converted}
        observers: dict[RFAAdapter, Callable[..., None]] = dict.fromkeys(adapters, ignore)
        self._interception = Interception(observers=observers | self.layers)
        self._blocks = _blocks(model, self.layers)
        for adapter, layer in self.layers.items():
            layer.runs_again = any(adapter in inside for inside in self._blocks.values())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within the block the passes may be made: every head is exact, and no parameter gets a gradient."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            stack.enter_context(quiet_eval(self.model))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(intercept(self._interception))
            stack.enter_context(set_checkpoint_early_stop(False))  # or a layer's observer might not be reached
            for block, inside in self._blocks.items():
                stack.enter_context(self._run_again(block, inside))
            yield

    def forward(self, inputs: Mapping[str, Any], look: Mapping[RFAAdapter, Look] | None = None) -> Outputs:
        """Run a batch; `look` is shown the layers' inputs."""
        for adapter, layer in self.layers.items():
            layer.look, layer.take = (look or {}).get(adapter), None
            layer.calls.clear()
        return self.reader(inputs)

    def backward(
        self, outputs: Outputs, gradient: torch.Tensor, take: Mapping[RFAAdapter, Take], *, again: bool = False
    ) -> None:
        """The gradient of every layer's output to `take`, from that of `outputs`; again: whether more will follow.

        Raises:
            UnsupportedModelError: The model computes its output without a graph.
        """
        if not outputs.tensor.requires_grad:
            raise UnsupportedModelError(
                f"No gradient flows through {type(self.model).__name__} (it computes without a graph, or from none of "
                "its converted layers), so that it cannot be calibrated. Pass `calibrate=False`."
            )
        for adapter, layer in self.layers.items():
            layer.look, layer.take = None, take[adapter]
        outputs.tensor.backward(gradient, retain_graph=again)

    @contextlib.contextmanager
    def _run_again(self, block: nn.Module, inside: Sequence[RFAAdapter]) -> Iterator[None]:
        """Within the block, `block` is run again in the backward pass."""
        forward, own = block.forward, "forward" in vars(block)

        def run(*args: Any, **kwargs: Any) -> Any:
            for adapter in inside:
                self.layers[adapter].calls.clear()
            for name in _CACHES:  # run twice, a block would find its own keys in a cache
                if kwargs.get(name) is not None:
                    kwargs[name] = None
            with intercept(self._interception):  # a backward pass on a GPU has a thread of its own
                return forward(*args, **kwargs)

        def recomputed(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        block.forward = recomputed
        try:
            yield
        finally:
            if own:
                block.forward = forward
            else:
                del block.forward


@dataclass
class _Layer:
    """Observes the calls of one layer: the first time shown to `look`, with their gradients to `take`."""

    runs_again: bool = False
    look: Look | None = None
    take: Take | None = None
    calls: list[LayerInputs | None] = field(default_factory=list)

    def __call__(
        self, adapter: RFAAdapter, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        layout: TokenLayout, settings: AttentionSettings, exact: torch.Tensor,
    ) -> None:  # fmt: skip
        query, key, value = (x.detach() for x in (query, key, value))
        inputs = LayerInputs(adapter, module, query, key, value, layout, settings, exact.detach())
        again, number = self.take is not None, len(self.calls)
        # Between the passes a layer that runs again need not be held.
        self.calls.append(inputs if again else None)
        if not again and self.look is not None:
            with torch.no_grad():
                self.look(inputs)
        if not torch.is_grad_enabled():  # a model may ask for no graph
            return
        if not exact.requires_grad:  # the first layer: its inputs depend on nothing that has a gradient
            exact.requires_grad_()
        if again:
            return
        held = None if self.runs_again else inputs

        def arrived(gradient: torch.Tensor) -> None:
            known = self.calls[number] if held is None else held
            assert known is not None
            assert self.take is not None
            if held is None:
                self.calls[number] = None
            with torch.no_grad():
                self.take(known, gradient)

        exact.register_hook(arrived)


def ignore(*args: Any) -> None:
    """Observer that does nothing: its layer is exact."""


def _blocks(model: nn.Module, adapters: Mapping[RFAAdapter, Any]) -> dict[nn.Module, list[RFAAdapter]]:
    """The entries of the innermost lists around attention modules, with the adapters in each."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]

    def inside(entry: nn.Module) -> list[RFAAdapter]:
        found = (adapter_of(module) for module in entry.modules())
        return [adapter for adapter in found if adapter is not None and adapter in adapters]

    entries = [(entry, parent) for parent in lists for entry in parent]
    innermost = {adapter: parent for entry, parent in entries for adapter in inside(entry)}  # outer ones come first
    chosen = set(innermost.values())
    return {entry: inside(entry) for entry, parent in entries if parent in chosen}


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter gets a gradient, which nobody reads."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
