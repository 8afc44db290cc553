"""The dry run of `convert`: which modules really send their attention through the interface, and with what.

On a model that does not use the interface, any registered `attn_implementation` loads without complaint and the
model's own attention runs. So nothing is believed: a short forward is watched, and softmax elsewhere is noticed.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hf_rfa.attention import recorder
from hf_rfa.devices import execution_device
from hf_rfa.errors import UnsupportedModelError

#: Two primes, so that no other dimension of a tiny model is mistaken for a sequence length.
TEXT_TOKENS, DECODER_TOKENS = 37, 29


@dataclass
class AttentionCalls:
    """What one attention module asked for."""

    module: nn.Module
    key_heads: int
    head_dim: int
    cross: bool
    sliding_window: int | None
    causal: bool
    count: int = 0


@dataclass
class DryRun:
    """Every attention module in the order of its first call, and softmax seen outside of the interface."""

    calls: dict[int, AttentionCalls] = field(default_factory=dict)
    lengths: set[int] = field(default_factory=set)
    foreign: list[tuple[int, int]] = field(default_factory=list)
    inside: bool = False

    @contextmanager
    def call(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: Any, extras: dict[str, Any]
    ) -> Iterator[None]:
        """Note one call of the attention function; softmax in it is our own."""
        self.lengths |= {query.shape[2], key.shape[2]}
        if id(module) not in self.calls:
            self.calls[id(module)] = AttentionCalls(
                module,
                key.shape[1],
                key.shape[3],
                cross=key.shape[2] != query.shape[2],
                sliding_window=extras.get("sliding_window"),
                causal=mask.causal
                if mask is not None and hasattr(mask, "causal")
                else bool(getattr(module, "is_causal", True)),
            )
        self.calls[id(module)].count += 1
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    def foreign_attention(self) -> bool:
        """Whether a softmax over tokens was computed outside of the interface."""
        return any(rows in self.lengths and columns in self.lengths for rows, columns in self.foreign)


class _SoftmaxWatch(TorchFunctionMode):
    """Notes the last two dimensions of every softmax over at least three, but for those of our own function."""

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
    token = recorder.set(run)
    try:
        with _SoftmaxWatch(run), quiet_eval(model):
            model(**inputs)
    finally:
        recorder.reset(token)
    return run


@contextmanager
def quiet_eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients that leaves training flags and the global random state as they were."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def guess_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """Small inputs for a dry run, from the model's config; `UnsupportedModelError` where they cannot be guessed."""
    config = model.config
    device = execution_device(model)
    if device.type == "meta":
        raise UnsupportedModelError("The model's weights are on the meta device. Load them before `hf_rfa.convert`.")
    name = model.main_input_name
    inputs: dict[str, Any] = {"use_cache": False} if _accepts(model, "use_cache") else {}
    if name == "input_ids":
        text = config.get_text_config()
        inputs[name] = _token_ids(text, TEXT_TOKENS, device)
    elif name == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        dtype = next(model.parameters()).dtype
        inputs[name] = torch.zeros(1, getattr(vision, "num_channels", 3), height, width, device=device, dtype=dtype)
    elif getattr(model, "dummy_inputs", None):
        inputs |= {
            key: value.to(device)
            for key, value in copy.copy(model.dummy_inputs).items()
            if isinstance(value, torch.Tensor)
        }
    if name not in inputs:
        raise UnsupportedModelError(
            f"`convert` does not know what to feed {type(model).__name__} (its main input is {name!r}) in its dry "
            f"run. Pass "
            "`convert(model, config, example_inputs={...})` with a small batch."
        )
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _token_ids(config.get_text_config(decoder=True), DECODER_TOKENS, device)
    return inputs


def _token_ids(config: Any, length: int, device: torch.device) -> torch.Tensor:
    longest = getattr(config, "max_position_embeddings", None) or length
    length = min(length, longest - 4) if longest > 8 else longest  # some models count positions from 2 on
    vocabulary = getattr(config, "vocab_size", 16) or 16
    # Ordinary tokens: the first few are often padding, which some models mask; image placeholders are high.
    return (5 + torch.arange(length) % max(1, min(vocabulary, 64) - 5)).clamp_max(vocabulary - 1)[None].to(device)


def _accepts(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
