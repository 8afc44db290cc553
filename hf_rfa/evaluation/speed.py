"""Costs of a model: prefill time, decoding speed, bytes of the cache, peak memory of a GPU."""

import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from hf_rfa.errors import ConfigError
from hf_rfa.runtime.arguments import cache_argument, cache_of
from hf_rfa.runtime.cache import cache_bytes
from hf_rfa.runtime.quiet import evaluation_mode


@dataclass(frozen=True)
class Speed:
    """Cost of one model at one context length, batch size 1; times are medians."""

    context: int  # tokens of the prompt
    prefill_seconds: float
    decode_tokens_per_second: float
    cache_bytes: int  # after the prefill
    peak_bytes: int | None  # peak allocation on the GPU, weights included; None on a CPU


def prefill(model: PreTrainedModel, ids: Tensor) -> tuple[Cache, Tensor]:
    """Runs the prompt `ids` (n,) and returns the filled cache and the greedy next token (1, 1)."""
    # Logits of all positions would take more memory than the attention; nearly every causal LM can skip them.
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=ids[None].to(model.device), use_cache=True, **last_only)
    return cache_of(output), output.logits[:, -1:].argmax(-1)


def decode(model: PreTrainedModel, cache: Cache, token: Tensor, steps: int) -> Tensor:
    """Greedy decoding of `steps` tokens after `token` (1, 1); returns the last one (1, 1)."""
    for _ in range(steps):
        token = model(input_ids=token, **{cache_argument(model): cache}, use_cache=True).logits[:, -1:].argmax(-1)
    return token


def measure_speed(
    models: Mapping[str, PreTrainedModel],
    ids: Tensor,
    context: int,
    new_tokens: int = 32,
    repeats: int = 3,
    after_run: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Speed]:
    """Cost of each model at a prompt of `context` tokens.

    The models take turns (a b c a b c ...) and medians are returned, so that a moment in which the machine is slow
    favours none of them. An untimed run on a short prompt warms each model up.

    Args:
        models: name -> model; all on the same device.
        ids: token ids (N,), N >= context.
        new_tokens: tokens that are decoded after the prompt, greedily.
        repeats: timed turns of each model.
        after_run: called after each turn of each model, for a progress bar.
        clock: returns seconds; `time.process_time` counts this process alone, if others use the cores too.
    """
    if len(ids) < context:
        raise ConfigError(f"A prompt of {context} tokens needs as many. Got {len(ids)}. Pass more text.")
    if new_tokens < 1 or repeats < 1:
        raise ConfigError(f"`new_tokens` and `repeats` must be at least 1. Got {new_tokens} and {repeats}.")
    prompt = ids[:context]
    prefills: dict[str, list[float]] = {name: [] for name in models}
    decodes: dict[str, list[float]] = {name: [] for name in models}
    sizes: dict[str, int] = {}
    peaks: dict[str, int | None] = {}
    with evaluation_mode(*models.values()):
        for model in models.values():
            decode(model, *prefill(model, prompt[:256]), steps=1)
        for _ in range(repeats):
            for name, model in models.items():
                on_gpu = model.device.type == "cuda"
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(model.device)
                start = _now(model, clock)
                cache, token = prefill(model, prompt)
                filled = _now(model, clock)
                sizes[name] = cache_bytes(cache)
                begun = _now(model, clock)
                decode(model, cache, token, new_tokens)
                decodes[name].append(_now(model, clock) - begun)
                prefills[name].append(filled - start)
                peaks[name] = torch.cuda.max_memory_allocated(model.device) if on_gpu else None
                after_run()
    return {
        name: Speed(
            context=context,
            prefill_seconds=statistics.median(prefills[name]),
            decode_tokens_per_second=new_tokens / statistics.median(decodes[name]),
            cache_bytes=sizes[name],
            peak_bytes=peaks[name],
        )
        for name in models
    }


def _now(model: PreTrainedModel, clock: Callable[[], float]) -> float:
    """Seconds on the clock, once the device has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return clock()
