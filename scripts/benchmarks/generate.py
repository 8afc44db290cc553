"""A whole model with `model.generate`: time per token and growth of memory, after a context that is in the cache.

A Llama from a config, random weights: 2 layers of width 512, 8 query and 2 key heads of dim 64, 8192 tokens. RFA's
cache is filled by a prefill in chunks, one row that the rows of the batch repeat; the original's `DynamicCache` is
filled with random keys and values, since a softmax prefill of 100k tokens would take longer than all the rest. Both
then get the token ids of the whole context, as a user would pass them.

`generate` itself concatenates the token ids and the padding mask of all tokens at every step. That grows with the
context whatever the attention is, so the time inside of the model's forward is given beside the whole.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_rfa
from benchmarks.decode import (
    FLAT_GOAL,
    RFA_STEPS,
    SOFTMAX_STEPS,
    SPEED_GOALS,
    decode_panels,
    kv_bytes,
    random_context,
    too_large,
)
from benchmarks.device import Meter
from benchmarks.memory import resident
from benchmarks.setting import DTYPES, Setting
from benchmarks.table import Result, Table
from hf_rfa.runtime.arguments import cache_argument, cache_of

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 2, 512, 1536, 8192
PREFILL_CHUNK = 4096  # tokens


@dataclass(frozen=True)
class Steps:
    """One run of `generate`, per token: seconds in all and in the model's forward, bytes by which memory grew."""

    seconds: float
    forward_seconds: float
    cache_growth: float
    held_growth: float


class StepRecorder:
    """Notes the time of the first and the last of some steps: a logits processor, and hooks around the forward."""

    def __init__(self, meter: Meter, cache: Any, steps: int) -> None:
        self._meter, self._cache, self._steps = meter, cache, steps
        self._times: list[float] = []
        self._sizes: list[tuple[int, int]] = []  # bytes of the cache, bytes held
        self._forward: list[float] = []
        self._calls = 0
        self._entered = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # To look at the sizes takes time, too: before the first step and after the last one.
        if self._calls == 0:
            self._look()
            self._times.append(self._meter.now())
        elif self._calls == self._steps:
            self._times.append(self._meter.now())
            self._look()
        self._calls += 1
        return scores

    def _look(self) -> None:
        self._sizes.append((hf_rfa.cache_bytes(self._cache), held_bytes(self._meter.device)))

    def enter(self, *_: object) -> None:
        self._entered = self._meter.now()

    def leave(self, *_: object) -> None:
        self._forward.append(self._meter.now() - self._entered)

    def result(self) -> Steps:
        """Per step, of those after the first forward, which stands in for the prefill."""
        begun, ended = self._times
        cache, held = ((after - before) / self._steps for before, after in zip(*self._sizes, strict=True))
        return Steps((ended - begun) / self._steps, statistics.mean(self._forward[1:]), cache, held)


def held_bytes(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else resident("VmRSS")


def generate(
    meter: Meter, setting: Setting, *, batches: Sequence[int], contexts: Sequence[int], repeats: int, limit: float
) -> Result:
    """One row for each batch and context; the original is left out where it needs more than `limit` GiB."""
    original, converted = models(setting)
    ids = torch.randint(VOCABULARY, (1, max(contexts) + 1), generator=torch.Generator().manual_seed(0))
    ids = ids.to(setting.device)
    prefilled = prefill_contexts(converted, ids, contexts)
    first = contexts[0]
    table = Table(
        "batch", "context", "softmax (ms/token)", "RFA (ms/token)", "softmax / RFA", "goal", f"RFA to {first:,}",
        "forward alone: softmax", "RFA", f"RFA to {first:,}", "goal", "cache growth (B/token): softmax", "RFA",
        "held (KiB/token): softmax", "RFA",
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for batch in batches:
        fitting = [n for n in contexts if not too_large(kv_bytes(setting, batch, n, LAYERS), limit)]
        past = random_context(setting, batch, max(fitting, default=1))  # of every layer
        jobs: dict[tuple[str, int], Callable[[], Steps]] = {}
        for context in contexts:
            prompt = ids[:, : context + 1].expand(batch, -1)
            if context in fitting:
                jobs["softmax", context] = _softmax_job(meter, original, past, context, prompt)
            jobs["RFA", context] = _rfa_job(meter, converted, prefilled[context], prompt)
        found = {key: median_steps(runs) for key, runs in _turns(jobs, repeats).items()}
        for context in contexts:
            softmax, rfa, least = found.get(("softmax", context)), found["RFA", context], found["RFA", first]
            rows.append(_row(batch, context, softmax, rfa))
            table.add(batch, f"{context:,}", *_cells(context, softmax, rfa, least))
    return Result(rows, table.lines, decode_panels(rows, 1e3, "ms/token"))


def models(setting: Setting, layers: int = LAYERS) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """The original and its conversion, every head linear; nothing is calibrated, which costs no time either way."""
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=layers, vocab_size=VOCABULARY,
        num_attention_heads=setting.heads, num_key_value_heads=setting.key_heads, head_dim=setting.head_dim,
        max_position_embeddings=2**18, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = LlamaForCausalLM(config).eval().to(setting.device, DTYPES[setting.dtype])
    options = hf_rfa.RFAConfig(
        feature_map=setting.feature_map, num_features=setting.num_features, window=setting.window,
        sink_tokens=setting.sinks, kept_keys=setting.kept_keys,
    )  # fmt: skip
    return original, hf_rfa.convert(copy.deepcopy(original), options, calibrate=False)


@torch.no_grad()
def prefill_contexts(model: LlamaForCausalLM, ids: Tensor, contexts: Sequence[int]) -> dict[int, Any]:
    """The cache of one row after each context, ascending, from one prefill."""
    caches, cache, done = {}, None, 0
    for context in sorted(contexts):
        while done < context:
            stop = min(done + PREFILL_CHUNK, context)
            past = {cache_argument(model): cache}
            output = model(input_ids=ids[:, done:stop], **past, use_cache=True, logits_to_keep=1)
            cache, done = cache_of(output), stop
        caches[context] = copy.deepcopy(cache)
    return caches


def _rfa_job(meter: Meter, model: LlamaForCausalLM, prefilled: Any, prompt: Tensor) -> Callable[[], Steps]:
    def run() -> Steps:
        cache = copy.deepcopy(prefilled)
        cache.batch_repeat_interleave(len(prompt))
        return timed_generate(meter, model, cache, prompt, RFA_STEPS)

    return run


def _softmax_job(
    meter: Meter, model: LlamaForCausalLM, past: tuple[Tensor, Tensor], context: int, prompt: Tensor
) -> Callable[[], Steps]:
    def run() -> Steps:
        cache = DynamicCache(config=model.config)
        for layer in range(LAYERS):
            cache.update(*(t[:, :, :context] for t in past), layer)
        return timed_generate(meter, model, cache, prompt, SOFTMAX_STEPS)

    return run


def timed_generate(meter: Meter, model: LlamaForCausalLM, cache: Any, prompt: Tensor, steps: int) -> Steps:
    """`generate` after a filled cache: the last token of `prompt` (B, N) is the one that the cache has not seen."""
    recorder = StepRecorder(meter, cache, steps)
    hooks = [model.register_forward_pre_hook(recorder.enter), model.register_forward_hook(recorder.leave)]
    try:
        model.generate(
            prompt, **{cache_argument(model): cache}, max_new_tokens=steps + 1, do_sample=False,
            logits_processor=[recorder],
        )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    return recorder.result()


def _turns(jobs: dict[tuple[str, int], Callable[[], Steps]], repeats: int) -> dict[tuple[str, int], list[Steps]]:
    """All jobs in turn, after one round that is not counted."""
    rounds = [{key: job() for key, job in jobs.items()} for _ in range(repeats + 1)]
    return {key: [one[key] for one in rounds[1:]] for key in jobs}


def median_steps(runs: Sequence[Steps]) -> Steps:
    return Steps(*(statistics.median(values) for values in zip(*(vars(run).values() for run in runs), strict=True)))


def _row(batch: int, context: int, softmax: Steps | None, rfa: Steps) -> dict[str, Any]:
    row: dict[str, Any] = {"batch": batch, "context": context}
    for name in ("seconds", "forward_seconds", "cache_growth", "held_growth"):
        row[f"softmax_{name}"] = getattr(softmax, name, None)
        row[f"rfa_{name}"] = getattr(rfa, name)
    return row


def _cells(context: int, softmax: Steps | None, rfa: Steps, first: Steps) -> list[str]:
    def of_softmax(text: Callable[[Steps], str]) -> str:
        return "-" if softmax is None else text(softmax)

    return [
        of_softmax(lambda s: f"{s.seconds * 1e3:,.2f}"),
        f"{rfa.seconds * 1e3:,.2f}",
        of_softmax(lambda s: f"{s.seconds / rfa.seconds:.1f}"),
        SPEED_GOALS.get(context, "").replace("≥ 10", "> 1"),  # 10 times is asked of the attention alone
        f"{rfa.seconds / first.seconds:.2f}",
        of_softmax(lambda s: f"{s.forward_seconds * 1e3:,.2f}"),
        f"{rfa.forward_seconds * 1e3:,.2f}",
        f"{rfa.forward_seconds / first.forward_seconds:.2f}",
        FLAT_GOAL[1] if context == FLAT_GOAL[0] else "",
        of_softmax(lambda s: f"{s.cache_growth:,.0f}"),
        f"{rfa.cache_growth:,.0f}",
        of_softmax(lambda s: f"{s.held_growth / 1024:,.1f}"),
        f"{rfa.held_growth / 1024:,.1f}",
    ]
