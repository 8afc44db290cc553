"""`distill`: attention transfer. Each layer's far kernels learn to reproduce its softmax output on the same inputs.

The model's own weights stay frozen and each layer passes on its softmax output, so that every layer has the inputs of
the original and no gradient crosses a layer. Source: Zhang et al. 2024 (LoLCATs), attention transfer.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from hf_rfa.calibration.batches import ModelInput, batches_of, call_arguments
from hf_rfa.calibration.layer_gradients import ignore
from hf_rfa.distillation.config import DistillConfig
from hf_rfa.distillation.layer_transfer import LayerTransfer
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.calls import Interception, intercept
from hf_rfa.runtime.quiet import plain_torch, quiet_eval
from hf_rfa.runtime.record import base_model, conversion_config, store_config

CHECKPOINT = "distill.pt"
WARMUP_SHARE = 0.05


@dataclass
class Transfer:
    """The result of `distill`: the loss of each layer in each step."""

    steps: int = 0
    losses: list[dict[int, float]] = field(default_factory=list)  # {layer: loss}, one per step

    def mean(self, steps: int = 20) -> dict[int, float]:
        """Per layer, the mean loss of the last `steps` steps."""
        last = self.losses[-steps:]
        return {layer: sum(row[layer] for row in last) / len(last) for layer in last[-1]} if last else {}


def distill(model: nn.Module, batches: Any, config: DistillConfig) -> Transfer:
    """Train the far kernels of a converted model towards its own softmax layers; only the adapters are changed.

    The loss of a layer is the squared error of its output after the output projection W, relative to the output,

        loss = sum |W (rfa - softmax)|^2 / sum |W softmax|^2 + weight_loss * CE(softmax weights, estimated weights)

    and Adam trains centres, changes of variable, alpha, gamma and, if it is to be learned, omega. Memory is linear in
    the number of tokens: the teacher is exact attention without an N x N tensor.

    Args:
        model: A converted model, best after `calibrate`, with any feature map.
        batches: An iterable, one item per step, of token ids (batch, seq), single rows of them, or dictionaries of the
            model's arguments (see `hf_rfa.calibration.batches.batches_of`); the same sequence on every resume.
        config: See `hf_rfa.DistillConfig`.

    Returns:
        The loss of each layer in each step.

    Raises:
        ConfigError: A config that does not fit the model, nothing to train, an item that is not a batch, or batches
            that end before `config.steps`.
        CheckpointError: The checkpoint cannot be read or belongs to another run.
        FloatingPointError: A loss is NaN or infinite; the message names layer and step. The kernels are those of the
            step before.
        UnsupportedModelError: The model is not converted.

    Example:
        >>> import torch, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> config = hf_rfa.RFAConfig(window=16, num_features=8)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), config, calibrate=False)
        >>> settings = hf_rfa.DistillConfig(steps=3, progress=False)
        >>> result = hf_rfa.distill(model, [torch.randint(64, (2, 96))] * 3, settings)
        >>> result.steps, sorted(result.losses[0])
        (3, [0, 1])
    """
    learned = conversion_config(model).omega == "learned"
    if learned and config.omega == "random":
        raise ConfigError("omega of this model is learned and is not redrawn. Got omega='random'. Pass 'learned'.")
    base = base_model(model)
    adapters = [adapter for _, _, adapter in named_adapters(base)]
    with plain_torch():
        layers = {
            adapter.layer: LayerTransfer(adapter, config)
            for adapter in adapters
            if adapter.converted and len(adapter.softmax_heads) < adapter.key_heads
        }
        if not layers:
            raise ConfigError("Every key head of the model is exact, so that there is nothing to train.")
        if config.weight_loss and not any(layer.positive_heads for layer in layers.values()):
            raise ConfigError(
                "`weight_loss` needs heads whose estimated weights are positive. Got the trigonometric map "
                "everywhere. Set weight_loss=0 or convert with another `feature_map`."
            )
        if config.cluster_scale != 1 and not any("clustered" in adapter.feature_maps for adapter in adapters):
            raise ConfigError(
                "`cluster_scale` is for the clustered map, which no head of this model has. Got "
                f"{config.cluster_scale}. Leave it out, or convert with `feature_map='clustered'`."
            )
        optimizers = {number: torch.optim.Adam(layer.tensors.values(), lr=0.0) for number, layer in layers.items()}
        path = None if config.output is None else Path(config.output) / CHECKPOINT
        done = _load(path, layers, optimizers, config.steps) if path is not None and config.resume else Transfer()
        bar = tqdm(
            total=config.steps, initial=done.steps, desc="attention transfer", unit="step", leave=False,
            disable=not config.progress,
        )  # fmt: skip
        try:
            for batch in _batches(batches_of(batches, base, name="batches"), done.steps, config.steps):
                _forward(base, adapters, layers, batch, done.steps)
                _check_finite(layers, done.steps)
                for number, layer in layers.items():
                    nn.utils.clip_grad_norm_(layer.tensors.values(), config.max_grad_norm)
                    rate = config.learning_rate * _schedule(done.steps, config.steps)
                    optimizers[number].param_groups[0]["lr"] = rate
                    optimizers[number].step()
                    optimizers[number].zero_grad()
                done.losses.append({number: layer.loss for number, layer in layers.items()})
                done.steps += 1
                bar.set_postfix(loss=f"{sum(done.losses[-1].values()) / len(layers):.4f}", refresh=False)
                bar.update()
                if path is not None and (done.steps % config.save_every == 0 or done.steps == config.steps):
                    _save(path, layers, optimizers, done)
        finally:
            bar.close()
            for layer in layers.values():
                layer.write_back()
            if config.omega == "learned" and done.steps and not learned:
                _mark_learned(model, adapters)
        return done


def _forward(
    base: Any, adapters: list[RFAAdapter], layers: Mapping[int, LayerTransfer], batch: ModelInput, step: int
) -> None:
    """One pass of the original, in which each layer computes the gradient of its own loss."""
    for layer in layers.values():
        layer.begin(step)
    observers = {adapter: layers.get(adapter.layer, ignore) for adapter in adapters}
    with intercept(Interception(observers=observers)), quiet_eval(base):
        base(**call_arguments(base, batch))


def _check_finite(layers: Mapping[int, LayerTransfer], step: int) -> None:
    for number, layer in layers.items():
        gradients = [t.grad for t in layer.tensors.values() if t.grad is not None]
        if not math.isfinite(layer.loss) or not all(bool(g.isfinite().all()) for g in gradients):
            raise FloatingPointError(
                f"The loss of layer {number} is {layer.loss}, or its gradient is not finite, at step {step + 1}. The "
                "kernels are those of the step before. Lower `learning_rate` or calibrate the model first."
            )


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def _batches(batches: Iterable[ModelInput], first: int, steps: int) -> Iterator[ModelInput]:
    number = first
    for batch in islice(batches, first, steps):
        yield batch
        number += 1
    if number < steps:
        raise ConfigError(f"The batches ended after {number} of {steps} steps. Pass more, or lower `steps`.")


def _mark_learned(model: nn.Module, adapters: list[RFAAdapter]) -> None:
    """Record that omega was trained and is never redrawn."""
    config = replace(conversion_config(model), omega="learned", resample="never")
    store_config(model, config)
    for adapter in adapters:
        adapter.config = config
        if adapter.converted:
            adapter.learn()


def _save(path: Path, layers: Mapping[int, LayerTransfer], optimizers: Mapping[int, Any], done: Transfer) -> None:
    state = {
        "tensors": {number: layer.state() for number, layer in layers.items()},
        "optimizers": {number: optimizer.state_dict() for number, optimizer in optimizers.items()},
        "losses": done.losses,
    }
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        os.replace(partial, path)  # a run killed while saving keeps the checkpoint before
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"Could not save step {done.steps} to {str(path)!r}: {error}") from error


def _load(path: Path, layers: Mapping[int, LayerTransfer], optimizers: Mapping[int, Any], steps: int) -> Transfer:
    if not path.exists():
        return Transfer()
    try:
        state = torch.load(path, weights_only=True)
        losses = list(state["losses"])
        for number, layer in layers.items():
            layer.load(state["tensors"][number])
            optimizers[number].load_state_dict(state["optimizers"][number])
    except Exception as error:  # torch lets through any error of its readers
        raise CheckpointError(
            f"Cannot resume from {str(path)!r}: {error} Delete it, or start without `resume`."
        ) from error
    if len(losses) > steps:
        raise CheckpointError(f"{str(path)!r} has {len(losses)} steps, more than `steps`={steps}. Raise `steps`.")
    return Transfer(len(losses), losses)
