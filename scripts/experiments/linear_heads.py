"""Every head linear, a pretrained model that copies: how much of its copying comes back in a budget of CPU seconds.

    python scripts/experiments/linear_heads.py --model MODEL --data DATA --measure measure.py --output OUTPUT
        [--num_features 64] [--layer_features 3:512] [--window 64] [--feature_map clustered] [--budget 2400]

Three stages, each timed by the processor's clock: `hf_rfa.convert` calibrates (with the clustered map: k-means of the
keys), `hf_rfa.distill` transfers the attention with the loss on its weights, `finetune` trains all weights and the
features with the next-token loss and the KL divergence to the original. Three in four batches are short texts in a
loop, which only a head that looks things up predicts; the fourth is a long text as it is. The number of steps is what
the rest of the budget pays for, by the time that the first few take. `measure.py` is described in `goals.py`; none of
the texts that it measures is trained on. OUTPUT gets the model and `results.json`.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from goals import load
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_rfa
from hf_rfa.data import load_documents, tokenize_documents, training_batches
from hf_rfa.training import finetune

CALIBRATION = (2, 2048)  # rows, tokens
SHORT, SHORT_ROWS = 640, 2
LONG, LONG_EVERY = 1536, 4
TIMED_STEPS = 8


def main() -> None:
    options = parse()
    measure = load(options.measure)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    held_out = measure.validation_ids(tokenizer)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    token_lists, _ = tokenize_documents(tokenizer, load_documents(options.data, "train"))
    features = dict(tuple(map(int, pair.split(":"))) for pair in options.layer_features)
    config = hf_rfa.RFAConfig(
        feature_map=options.feature_map, num_features=options.num_features, layer_features=features or None,
        window=options.window, sink_tokens=4 if options.window else 0,
    )  # fmt: skip
    results: dict[str, Any] = {"config": config.to_dict(), "options": {k: str(v) for k, v in vars(options).items()}}
    results["original"] = figures(measure, original, original, held_out)
    spent = 0.0

    def stage(name: str, action: Any) -> None:
        nonlocal spent
        started = time.process_time()
        action()
        seconds = time.process_time() - started
        spent += seconds
        results[name] = {"cpu_seconds": seconds, **figures(measure, original, model.eval(), held_out)}
        print(name, json.dumps(results[name]), flush=True)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    rows, tokens = CALIBRATION
    text = torch.cat(token_lists)[tokens : tokens + rows * tokens].view(rows, tokens)
    stage("calibrated", lambda: hf_rfa.convert(model, config, calibrate=text))
    stage("transferred", lambda: hf_rfa.distill(
        model, training_batches(token_lists, SHORT, SHORT_ROWS, 1, loop_probability=1.0),
        steps=options.transfer_steps, weight_loss=float(options.feature_map != "trigonometric"), sampled_queries=128,
        cluster_scale=options.cluster_scale, seed=options.seed,
    ))  # fmt: skip
    common = {"feature_learning_rate": options.feature_learning_rate, "kl_weight": 1.0, "teacher": original,
              "fused_loss": False, "mixed_precision": "bf16", "learning_rate": options.learning_rate}  # fmt: skip
    trial = hf_rfa.from_pretrained(save(model, options.output / "transferred"), dtype=torch.float32)
    started = time.process_time()
    finetune(trial, mixture(token_lists, 2), steps=TIMED_STEPS, progress=False, **common)
    one = (time.process_time() - started) / TIMED_STEPS
    spent += one * TIMED_STEPS
    steps = max(1, int((options.budget - spent) / one))
    results["finetune_steps"] = steps
    stage("finetuned", lambda: finetune(
        model, mixture(token_lists, 3), steps=steps, output=options.output / "run", save_every=200, **common,
        evaluate=lambda m: {"copy 300": measure.copy_perplexity(m.eval(), held_out, 300)}, evaluate_every=200,
    ))  # fmt: skip
    results["cpu_seconds"] = spent
    results["cache_bytes"] = cache_bytes(model)
    save(model, options.output / "final")
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of the original")
    parser.add_argument("--data", required=True, help="see hf_rfa.data.documents.load_documents")
    parser.add_argument("--measure", type=Path, required=True, help="the module of measures")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--feature_map", default="clustered")
    parser.add_argument("--num_features", type=int, default=64)
    parser.add_argument("--layer_features", nargs="*", default=[], help="other numbers for some layers, as 3:512")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--budget", type=float, default=2400, help="CPU seconds of all stages, without measuring")
    parser.add_argument("--transfer_steps", type=int, default=100)
    parser.add_argument("--cluster_scale", type=float, default=None, help="see `distill`; default: 0.5 if clustered")
    parser.add_argument("--learning_rate", type=float, default=4e-4)
    parser.add_argument("--feature_learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.cluster_scale is None:
        options.cluster_scale = 0.5 if options.feature_map == "clustered" else 1.0
    return options


def mixture(token_lists: list[torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    """Short texts in a loop; every `LONG_EVERY`-th batch is one long text as it is."""
    short = training_batches(token_lists, SHORT, SHORT_ROWS, seed, loop_probability=1.0)
    long = training_batches(token_lists, LONG, 1, seed)
    for number in itertools.count(1):
        yield next(short if number % LONG_EVERY else long)


def figures(measure: Any, original: Any, model: Any, ids: torch.Tensor) -> dict[str, float]:
    """What the goals name."""
    return {
        "perplexity 1024": measure.perplexity(model, ids, 1024, 4),
        "perplexity 2048": measure.perplexity(model, ids, 2048, 4),
        "KL 1024": measure.kl_divergence(original, model, ids, 1024, 4),
        **{f"copy {gap}": measure.copy_perplexity(model, ids, gap) for gap in (0, 300)},
        "copy 1500": measure.copy_perplexity(model, ids, 1500, 4),
    }


def cache_bytes(model: Any) -> int:
    """Bytes of the cache, the same after any number of tokens."""
    with torch.no_grad():
        return hf_rfa.cache_bytes(model(torch.ones(1, 512, dtype=torch.int64), use_cache=True).past_key_values)


def save(model: Any, folder: Path) -> Path:
    hf_rfa.save_pretrained(model, folder)
    return folder


if __name__ == "__main__":
    main()
