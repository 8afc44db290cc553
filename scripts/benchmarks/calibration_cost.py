"""What calibration takes, on paper: operations and bytes per token of a config's shape, and the rates of a machine.

    python scripts/benchmarks/calibration_cost.py --measure SMOLLM2 --output smollm2.json    # CPU-s of each stage
    python scripts/benchmarks/calibration_cost.py --measure GEMMA --output gemma.json
    python scripts/benchmarks/calibration_cost.py --rates smollm2.json --check gemma.json    # does it carry over?
    python scripts/benchmarks/calibration_cost.py                                            # the table: large models

`--measure` converts a model as it is by default and calibrates it on random tokens (the time does not depend on
them). From its stages follow two rates: of matrix products, in the model's own passes, and of trying candidates, whose
sums and exponentials are float32. `--check` predicts the stages of another measured model from the rates of the first.
docs/calibration.md explains the formula. Where far parts are switched off, which random tokens make likelier, the
result is measured more often than twice; `runs` says how often.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hf_rfa
from hf_rfa.calibration.calibrate import EVERY, MEASURED_TOKENS, MOMENT_TOKENS, TRIED_QUERIES, calibrate_on
from hf_rfa.calibration.candidates import ALPHAS
from hf_rfa.calibration.outputs import BLOCK_BYTES, BLOCK_TOKENS
from hf_rfa.calibration.progress import Progress
from hf_rfa.command_line import parse_arguments
from hf_rfa.errors import ConfigError
from hf_rfa.options import Settings, option

#: Of the hyperbolic map: two geometries with every alpha.
CANDIDATES = 2 * len(ALPHAS)
STAGES = ("statistics", "fitting", "measuring")
GPU_BYTES = 80e9


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line."""

    measure: str | None = option("Folder or hub id of a model to time on this machine.", None)
    output: Path | None = option("File of what was measured, JSON.", None)
    rates: Path | None = option("What was measured, to take the rates from; by default those of a GPU, below.", None)
    check: Path | None = option("What was measured of another model, to predict.", None)
    texts: int = option("Texts.", 4, least=1)
    tokens: int = option("Tokens of each.", 2048, least=256)
    product_rate: float = option("Operations/s of the model's own passes: 40 % of an H100's 989e12.", 4e14, above=0)
    candidate_rate: float = option("Operations/s of trying candidates: 20 % of its 67e12 in float32.", 1.3e13, above=0)


@dataclass(frozen=True)
class Shape:
    """What the formula reads of a model; `converted` layers see everything, the others `sliding` tokens."""

    layers: int
    converted: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    sliding: int | None = None

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """That of a Transformers config with a gated MLP."""
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        return cls(
            config.num_hidden_layers, kinds.count("full_attention"), config.hidden_size, config.intermediate_size,
            config.num_attention_heads, config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads, config.vocab_size,
            bool(config.tie_word_embeddings), getattr(config, "sliding_window", None),
        )  # fmt: skip

    @property
    def block_weights(self) -> int:
        """Parameters of a block."""
        return self.hidden * (2 * self.heads + 2 * self.key_heads) * self.head_dim + 3 * self.hidden * self.inner

    @property
    def weights(self) -> int:
        """Parameters of the model, norms left out."""
        return self.layers * self.block_weights + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def attention(self, length: int) -> float:
        """Operations per token of exact attention in all layers, half of the square."""
        local = min(length / 2, self.sliding or length)
        seen = self.converted * length / 2 + (self.layers - self.converted) * local
        return 4 * self.heads * self.head_dim * seen

    def forward(self, length: int) -> float:
        """Operations per token of a forward without logits."""
        return 2 * self.layers * self.block_weights + self.attention(length)

    @property
    def logits(self) -> float:
        """Operations per token of the head."""
        return 2 * self.hidden * self.vocabulary

    def candidates(self, every: int) -> float:
        """Operations per token of all candidates of all heads, with one query in `every` asked."""
        config = hf_rfa.RFAConfig()
        rows, dim = config.num_features, self.head_dim
        once = 2 * rows * dim + 2 * 2 * rows * (dim + 1)  # psi of a key or query; its sums with [v, 1]
        return CANDIDATES * self.converted * (self.key_heads + self.heads / every) * once

    def near(self) -> float:
        """Operations per token of the exact part of the heads as they will be: window, sinks, kept keys."""
        config = hf_rfa.RFAConfig()
        seen = 2 * config.window + config.sink_tokens + config.usual_kept_keys
        return 4 * self.converted * self.heads * self.head_dim * seen


#: Meta's configs of Llama 3.1.
LLAMA_8B = Shape(32, 32, 4096, 14336, 32, 8, 128, 128256, tied=False)
LLAMA_70B = Shape(80, 80, 8192, 28672, 64, 8, 128, 128256, tied=False)


def measured_tokens(texts: int, length: int) -> int:
    """How many tokens the result is measured on: whole texts."""
    return min(texts, -(-MEASURED_TOKENS // length)) * length


def operations(shape: Shape, texts: int, length: int, runs: float = 2) -> dict[str, dict[str, float]]:
    """Operations of each stage: {"products": in the model's passes, "candidates": for them}.

    runs: Of the result while it is measured: with its far parts and without; more where some are switched off.
    """
    total = texts * length
    first, measured = min(total, MOMENT_TOKENS), measured_tokens(texts, length)
    every = min(EVERY, max(1, total // TRIED_QUERIES), hf_rfa.RFAConfig().window)
    forward = shape.forward(length)
    # The backward pass runs each block again; parameters get no gradient, so that going back takes as much as going
    # forwards, and twice as much in attention.
    back = 2 * forward + shape.attention(length) + 2 * shape.logits + shape.near()
    return {
        # Moments take the weights of attention once more.
        "statistics": {"products": first * (forward + shape.attention(length)), "candidates": 0.0},
        "fitting": {
            "products": total * back + (total - first) * forward, "candidates": total * shape.candidates(every)
        },
        # Each time the logits of the original, too.
        "measuring": {
            "products": runs * measured * (forward - shape.attention(length) + shape.near() + 2 * shape.logits),
            "candidates": 0.0,
        },
    }  # fmt: skip


def memory(shape: Shape, texts: int, length: int, element: int) -> dict[str, float]:
    """Bytes: the weights, and beside them what one text of `length` tokens needs (one row at a time)."""
    held = min(texts * length, MOMENT_TOKENS) * shape.hidden * shape.layers * element  # the inputs of the blocks
    streams = (shape.heads + 2 * shape.key_heads) * shape.head_dim
    block = length * element * 2 * (4 * shape.hidden + 3 * shape.inner + 2 * streams)  # activations and gradients
    fitted = (
        length * 4 * (3 * shape.heads + 2 * shape.key_heads) * shape.head_dim
    )  # float32: q, k, v, output, gradient
    logits = 5 * max(BLOCK_BYTES, BLOCK_TOKENS * 4 * shape.vocabulary)
    return {"weights": shape.weights * element, "held": held, "block": block, "fitted": fitted, "logits": logits}


def seconds(work: Mapping[str, Mapping[str, float]], rates: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each stage."""
    return {stage: sum(number / rates[kind] for kind, number in each.items()) for stage, each in work.items()}


def work_of(measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The operations of what was measured."""
    shape = Shape(**measured["shape"])
    return operations(shape, measured["texts"], measured["tokens"], measured["runs"])


def rates_of(measured: Mapping[str, Any]) -> dict[str, float]:
    """Operations per second: of products from the first stage, of candidates from what that leaves of the second."""
    found = measured["seconds"]
    work = work_of(measured)
    products = work["statistics"]["products"] / found["statistics"]
    left = found["fitting"] - work["fitting"]["products"] / products
    if left <= 0:
        raise ConfigError(
            f"The fitting stage took less than its passes alone should, {found['fitting']:.1f} s. Measure again on a "
            "machine that does nothing else."
        )
    return {"products": products, "candidates": work["fitting"]["candidates"] / left}


class Stages(Progress):
    """CPU seconds between the stages that calibration announces, and the tokens of forwards done in each."""

    def __init__(self) -> None:
        super().__init__(None)
        self.seconds: dict[str, float] = {}
        self.tokens: dict[str, float] = {}
        self._now, self._since = "", time.process_time()

    def stage(self, name: str, units: float = 0) -> None:
        self.end()
        self._now = name.removeprefix("calibrating: ")

    def done(self, units: float) -> None:
        self.tokens[self._now] = self.tokens.get(self._now, 0.0) + units

    def end(self) -> None:
        """Count the stage that runs."""
        now = time.process_time()
        if self._now:
            self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self._since = now


def measure(model_id: str, texts: int, tokens: int) -> dict[str, Any]:
    """CPU seconds of each stage of a calibration, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_id, dtype=torch.float32).eval()
    shape = Shape.of(model.config.get_text_config())
    model = hf_rfa.convert(model, calibrate=False)
    ids = torch.randint(1, shape.vocabulary, (texts, tokens), generator=torch.Generator().manual_seed(0))
    stages = Stages()
    calibrate_on(model, [{"input_ids": row[None]} for row in ids], True, stages)
    stages.end()
    return {
        "model": Path(model_id).name, "texts": texts, "tokens": tokens, "seconds": stages.seconds,
        "runs": stages.tokens["measuring"] / measured_tokens(texts, tokens),
        "threads": torch.get_num_threads(), "shape": vars(shape),
    }  # fmt: skip


def table(options: Options, rates: Mapping[str, float]) -> str:
    """Time and memory of the large models, in bfloat16."""
    lines = [
        f"{options.texts} x {options.tokens:,} tokens, bfloat16",
        "model          GPUs  weights/GPU, GB  beside them, GB  statistics, s  fitting, s  measuring, s   all, s",
    ]
    for name, shape in (("Llama-3.1-8B", LLAMA_8B), ("Llama-3.1-70B", LLAMA_70B)):
        took = seconds(operations(shape, options.texts, options.tokens), rates)
        bytes_ = memory(shape, options.texts, options.tokens, 2)
        for gpus in (1, 8):  # layers are spread over them, and one works at a time
            weights = bytes_["weights"] / gpus
            held = bytes_["held"] / gpus
            beside = held + sum(bytes_[each] for each in ("block", "fitted", "logits"))
            cells = "".join(f"{took[stage]:{width}.1f}" for stage, width in zip(STAGES, (15, 12, 14), strict=True))
            fits = f"{cells}{sum(took.values()):9.1f}" if weights + beside < GPU_BYTES else "   does not fit"
            lines.append(f"{name:13s}  {gpus:4d}  {weights / 1e9:15.1f}  {beside / 1e9:15.2f}{fits}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    if options.measure is not None:
        found = measure(options.measure, options.texts, options.tokens)
        if options.output is not None:
            options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found))
        return
    rates = {"products": options.product_rate, "candidates": options.candidate_rate}
    if options.rates is not None:
        rates = rates_of(json.loads(options.rates.read_text(encoding="utf-8")))
        print(f"{rates['products'] / 1e9:.1f} and {rates['candidates'] / 1e9:.1f} billion operations/s")
    if options.check is None:
        print(table(options, rates))
        return
    other = json.loads(options.check.read_text(encoding="utf-8"))
    predicted = seconds(work_of(other), rates)
    for stage in STAGES:
        print(f"{stage}: {predicted[stage]:.1f} s predicted, {other['seconds'][stage]:.1f} s measured")
    print(f"all: {sum(predicted.values()):.1f} s predicted, {sum(other['seconds'].values()):.1f} s measured")


if __name__ == "__main__":
    main(sys.argv[1:])
