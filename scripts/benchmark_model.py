"""A whole model: prefill and decoding, original beside converted, on a GPU or a CPU.

    python scripts/benchmark_model.py --device cuda --shape smollm2-135m --context 32768
    python scripts/benchmark_model.py --device cuda --shape llama-1b --context 32768
    python scripts/benchmark_model.py --model MODEL --converted FOLDER --dtype float32 --context 1024 --clock cpu

Without `--model` weights are random and nothing is calibrated: neither changes the time. Every key head is linear but
`--exact`, a share of them in each layer. With `--model` the original and folders that `hf-rfa convert` made of it are
timed. The original runs PyTorch's `scaled_dot_product_attention`. A prefill is one forward pass of one row; a decoding
step is one more token of each of `--batch` rows that all have the prefill's context, by the model's forward pass
alone: `generate` adds the same to both. What is compared takes turns; a figure is the median. On a CPU: one thread.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.device import CLOCKS, Meter
from benchmarks.setting import DTYPES
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.options import Settings, option
from hf_rfa.runtime.arguments import cache_argument, cache_of

#: Of the published models; the vocabulary is small where only the last token's logits are computed.
SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command."""

    shape: str = option("Whose shape the model has: " + ", ".join(SHAPES) + ".", "smollm2-135m", group="Model")
    model: str | None = option("Folder or hub id of an original to time instead.", None, group="Model")
    converted: tuple[str, ...] = option("Folders converted from it.", (), group="Model")
    exact: float = option("Share of the key heads that stay exact.", 0.0, group="Model", least=0, below=1)
    kept_keys: int = option("Far keys per key head that stay exact.", 128, group="Model", least=0)
    backend: str = option("Form of the linear heads: auto, triton or chunked.", "auto", group="Model")
    device: str = option("cpu or cuda.", "cpu", group="Measuring")
    clock: str = option(
        "wall, or cpu: the time of the one thread, where others use the cores.", "wall", group="Measuring"
    )
    dtype: str = option("Of the weights: " + ", ".join(DTYPES) + ".", "bfloat16", group="Measuring")
    context: int = option("Tokens of the prefill.", 32768, group="Measuring", least=1)
    batch: tuple[int, ...] = option("Rows that decode at once.", (1, 64), group="Measuring")
    steps: int = option("Decoding steps that are timed at once.", 16, group="Measuring", least=1)
    repeats: int = option("Runs, after one that is not counted.", 3, group="Measuring", least=1)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(Options, sys.argv[1:] if arguments is None else arguments, __doc__)
    for name, known in (("shape", SHAPES), ("dtype", DTYPES), ("clock", CLOCKS)):
        if getattr(options, name) not in known:
            raise SystemExit(f"--{name} must be one of {', '.join(known)}. Got {getattr(options, name)}.")
    if options.device == "cpu":
        torch.set_num_threads(1)
    meter = Meter(options.device, options.clock)
    models = load(options) if options.model else build(options)
    words = models["original"].config.get_text_config().vocab_size
    ids = torch.randint(words, (1, options.context), generator=torch.Generator().manual_seed(0)).to(options.device)
    print(f"{options.model or options.shape}, {options.dtype}, {options.context:,} tokens, {meter.name()}", flush=True)
    caches: dict[str, Any] = {}
    with torch.no_grad():
        show("prefill", medians(prefill_jobs(meter, models, ids, caches), options.repeats), options.context)
        for name, cache in caches.items():
            print(f"  {hf_rfa.cache_bytes(cache) / 1e6:10,.1f} MB of cache  {name}")
        for batch in options.batch:
            tokens = ids[:, :1].expand(batch, 1)
            jobs = {name: decoding_job(meter, models[name], caches[name], tokens, options.steps) for name in models}
            show(f"decoding, {batch} rows", medians(jobs, options.repeats), batch * options.steps)


def build(options: Options) -> dict[str, LlamaForCausalLM]:
    """The original and the converted model."""
    shape = LlamaConfig(**SHAPES[options.shape], max_position_embeddings=2**18, bos_token_id=1, eos_token_id=None)
    with torch.random.fork_rng(devices=[]), torch.device(options.device):
        torch.manual_seed(0)
        original = LlamaForCausalLM(shape).eval().to(DTYPES[options.dtype])
    count = round(options.exact * shape.num_key_value_heads)
    exact = [[layer, head] for layer in range(shape.num_hidden_layers) for head in range(count)]
    settings: dict[str, Any] = {"softmax_heads": exact} if exact else {}
    config = hf_rfa.RFAConfig(kept_keys=options.kept_keys, **settings)
    converted = hf_rfa.convert(copy.deepcopy(original), config, calibrate=False)
    hf_rfa.set_backend(converted, options.backend)
    return {"original": original, "converted": converted}


def load(options: Options) -> dict[str, Any]:
    """The original and the converted models of `--model` and `--converted`."""
    assert options.model is not None
    dtype = DTYPES[options.dtype]
    models = {"original": AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)}
    models |= {folder: hf_rfa.from_pretrained(folder, dtype=dtype) for folder in options.converted}
    return {name: model.eval().to(options.device) for name, model in models.items()}


def prefill_jobs(
    meter: Meter, models: dict[str, Any], ids: torch.Tensor, caches: dict[str, Any]
) -> dict[str, Callable[[], float]]:
    """Functions that prefill a model, leave its cache in `caches` and return the seconds."""

    def job(name: str) -> Callable[[], float]:
        def prefill() -> None:
            # Only the last token's logits are computed, as `generate` does.
            caches[name] = cache_of(models[name](input_ids=ids, use_cache=True, logits_to_keep=1))

        def run() -> float:
            caches.pop(name, None)
            return meter.seconds(prefill)

        return run

    return {name: job(name) for name in models}


def decoding_job(meter: Meter, model: Any, filled: Any, tokens: torch.Tensor, steps: int) -> Callable[[], float]:
    """A function that decodes `steps` tokens of rows that all have the cache `filled`, and returns the seconds."""

    def run() -> float:
        cache = copy.deepcopy(filled)
        if len(tokens) > 1:
            cache.batch_repeat_interleave(len(tokens))

        def decode() -> None:
            for _ in range(steps):
                model(input_ids=tokens, **{cache_argument(model): cache}, use_cache=True, logits_to_keep=1)

        return meter.seconds(decode)

    return run


def medians(jobs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Median seconds of each job; the jobs take turns."""
    rounds = [{name: job() for name, job in jobs.items()} for _ in range(repeats + 1)][1:]
    return {name: statistics.median(one[name] for one in rounds) for name in jobs}


def show(what: str, seconds: dict[str, float], tokens: int) -> None:
    """The lines of one comparison."""
    print(what)
    for name, s in seconds.items():
        times = seconds["original"] / s
        print(f"  {1e3 * s:10,.1f} ms {tokens / s:12,.1f} tokens/s {times:6.2f} times  {name}", flush=True)


if __name__ == "__main__":
    main()
