"""Redrawing omega: by an explicit call, on a schedule in training, never in an attention forward."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_rfa.errors import ConfigError
from hf_rfa.runtime.adapters import require_adapters


def resample(model: nn.Module, draw: int | None = None) -> int:
    """Redraw omega in every converted layer and return the draw's number (the next one, if `draw` is None).

    A draw is a function of (seed, layer, draw number): every process and a resumed run get the same one. A cache that
    was filled before cannot be continued (`StaleStateError`).

    Example:
        >>> import hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), calibrate=False)
        >>> hf_rfa.resample(model), hf_rfa.resample(model, draw=7)
        (1, 7)
    """
    adapters = require_adapters(model)
    number = max(adapter.draw_number for adapter in adapters) + 1 if draw is None else draw
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ConfigError(f"`draw` must be a non-negative integer. Got {number!r}. Pass None for the next draw.")
    if any(adapter.config.omega == "learned" for adapter in adapters):
        raise ConfigError("The model's omega is learned: a new draw would undo what was trained. Do not resample it.")
    for adapter in adapters:
        adapter.redraw(number)
    return number


class ResampleCallback(TrainerCallback):
    """Redraws omega every k optimiser steps, as `RFAConfig(resample=k)` says; does nothing for other settings.

    With a `Trainer`: `Trainer(..., callbacks=[ResampleCallback()])`. In a plain loop: `callback.step(model)` after
    each `optimizer.step()`; its `state_dict` keeps the count (`accelerator.register_for_checkpointing(callback)`).

    Example:
        >>> import hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = LlamaForCausalLM(LlamaConfig(**size))
        >>> model = hf_rfa.convert(model, hf_rfa.RFAConfig(resample=2), calibrate=False)
        >>> callback = hf_rfa.ResampleCallback()
        >>> [callback.step(model) for _ in range(4)]
        [False, True, False, True]
    """

    def __init__(self) -> None:
        self.steps = 0

    def step(self, model: nn.Module) -> bool:
        """Count one optimiser step; returns whether omega was redrawn."""
        self.steps += 1
        return self._redraw(model, self.steps)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Called by the Trainer; its own step count survives a resume."""
        if model is not None:
            self.steps = state.global_step
            self._redraw(model, self.steps)

    def state_dict(self) -> dict[str, int]:
        """The number of steps counted."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict`."""
        self.steps = state["steps"]

    def _redraw(self, model: nn.Module, steps: int) -> bool:
        every = require_adapters(model)[0].config.resample
        if not isinstance(every, int) or steps % every:
            return False
        resample(model)
        return True
