"""Every head of a pretrained model linear: how much of its copying training recovers in a budget of CPU seconds.

    python scripts/experiments/linear_heads.py --model MODEL --data DATA --measure measure.py --output OUTPUT
        [--num_features 64] [--layer_features 3:512] [--window 64] [--feature_map clustered] [--budget 2400]

Three stages, each timed by the processor's clock: `hf_rfa.convert` calibrates (with the clustered map: k-means of the
keys), then `recipe.py` transfers the attention, with the loss on its weights, and trains all weights and the features.
The rest of the budget, divided by the time of the first few steps, gives the number of steps. `measure.py` is
described in `goals.py`; none of the texts that it measures is trained on. OUTPUT gets the model and `results.json`.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipe
import torch
from goals import load
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.options import Settings, option, part
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.training import FinetuneConfig

CALIBRATION = (2, 2048)  # rows, tokens
TIMED_STEPS = 8


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    model: str = option("Folder or hub id of the original.")
    data: str = option(SOURCE_HELP)
    measure: Path = option("The module of measures.")
    output: Path = option("Folder of the model and of `results.json`.")
    budget: float = option("CPU seconds of all stages, without measuring.", 2400.0, above=0)
    seed: int = option("Seed of attention transfer.", 0, least=0)

    conversion: hf_rfa.RFAConfig = part(
        hf_rfa.RFAConfig(feature_map="clustered"),
        only=("feature_map", "num_features", "layer_features", "window"),
        group="Conversion",
    )
    transfer_steps: int = option("Steps of attention transfer.", 100, least=1)
    cluster_scale: float | None = option("See `DistillConfig`; by default 0.5 for the clustered map.", None, above=0)
    loop_probability: float = option(
        "Share of the short texts of fine-tuning that are in a loop.", recipe.LOOP_PROBABILITY, least=0, most=1
    )
    long_tokens: int = option("Length of every fourth text of fine-tuning, tokens.", recipe.LONG, least=2)
    finetuning: FinetuneConfig = part(
        FinetuneConfig(
            steps=1, kl_weight=recipe.KL_WEIGHT, learning_rate=recipe.LEARNING_RATE,
            feature_learning_rate=recipe.FEATURE_LEARNING_RATE,
        ),
        only=("kl_weight", "learning_rate", "feature_learning_rate"),
        group="Fine-tuning",
    )  # fmt: skip


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    measure = load(options.measure)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    held_out = measure.validation_ids(tokenizer)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    token_lists, _ = tokenize_documents(tokenizer, load_documents(options.data, "train"))
    given = options.conversion
    config = hf_rfa.RFAConfig(  # made anew: the omega of the default's map is not that of any other map
        feature_map=given.feature_map, num_features=given.num_features, layer_features=given.layer_features,
        window=given.window, sink_tokens=4 if given.window else 0, kept_keys=0,
    )  # fmt: skip
    results: dict[str, Any] = {"config": config.to_dict(), "options": options.to_dict()}
    results["original"] = figures(measure, original, original, held_out)
    spent = 0.0

    def stage(name: str, action: Any) -> Any:
        nonlocal spent
        started = time.process_time()
        made = action()
        seconds = time.process_time() - started
        spent += seconds
        results[name] = {"cpu_seconds": seconds, **figures(measure, original, model.eval(), held_out)}
        print(name, json.dumps(results[name]), flush=True)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        return made

    rows, tokens = CALIBRATION
    text = torch.cat(token_lists)[tokens : tokens + rows * tokens].view(rows, tokens)
    stage("calibrated", lambda: hf_rfa.convert(model, config, calibrate=text))
    stage("transferred", lambda: recipe.transfer(
        model, token_lists, options.transfer_steps, cluster_scale=options.cluster_scale, seed=options.seed,
    ))  # fmt: skip
    tuning: dict[str, Any] = {
        "loop_probability": options.loop_probability, "long_tokens": options.long_tokens,
        "kl_weight": options.finetuning.kl_weight, "learning_rate": options.finetuning.learning_rate,
        "feature_learning_rate": options.finetuning.feature_learning_rate,
    }  # fmt: skip
    trial = hf_rfa.from_pretrained(save(model, options.output / "transferred"), dtype=torch.float32)
    started = time.process_time()
    recipe.fine_tune(trial, original, token_lists, TIMED_STEPS, seed=2, progress=False, **tuning)
    one = (time.process_time() - started) / TIMED_STEPS
    spent += one * TIMED_STEPS
    steps = max(1, int((options.budget - spent) / one))
    results["finetune_steps"] = steps
    progress = stage("finetuned", lambda: recipe.fine_tune(
        model, original, token_lists, steps, seed=3, output=options.output / "run", save_every=200, **tuning,
        evaluate=lambda m: {"copy 300": measure.copy_perplexity(m.eval(), held_out, 300)}, evaluate_every=200,
    ))  # fmt: skip
    results["evaluations"] = progress.evaluations
    results["cpu_seconds"] = spent
    results["cache_bytes"] = cache_bytes(model)
    save(model, options.output / "final")
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def figures(measure: Any, original: Any, model: Any, ids: torch.Tensor) -> dict[str, float]:
    """The figures that the goals name."""
    return {
        "perplexity 1024": measure.perplexity(model, ids, 1024, 4),
        "perplexity 2048": measure.perplexity(model, ids, 2048, 4),
        "KL 1024": measure.kl_divergence(original, model, ids, 1024, 4),
        **{f"copy {gap}": measure.copy_perplexity(model, ids, gap) for gap in (0, 300)},
        "copy 1500": measure.copy_perplexity(model, ids, 1500, 4),
    }


def cache_bytes(model: Any) -> int:
    """Bytes of the cache, which do not depend on the number of tokens."""
    with torch.no_grad():
        return hf_rfa.cache_bytes(cache_of(model(torch.ones(1, 512, dtype=torch.int64), use_cache=True)))


def save(model: Any, folder: Path) -> Path:
    hf_rfa.save_pretrained(model, folder)
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
