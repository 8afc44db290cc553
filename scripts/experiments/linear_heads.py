"""Every head linear, a pretrained model that copies: how much of its copying comes back in a budget of CPU seconds.

    python scripts/experiments/linear_heads.py --model MODEL --data DATA --measure measure.py --output OUTPUT
        [--num_features 64] [--layer_features 3:512] [--window 64] [--feature_map clustered] [--budget 2400]

Three stages, each timed by the processor's clock: `hf_rfa.convert` calibrates (with the clustered map: k-means of the
keys), then `recipe.py` transfers the attention, with the loss on its weights, and trains all weights and the features.
The number of steps is what the rest of the budget pays for, by the time that the first few take. `measure.py` is
described in `goals.py`; none of the texts that it measures is trained on. OUTPUT gets the model and `results.json`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import recipe
import torch
from goals import load
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_rfa
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.runtime.arguments import cache_of

CALIBRATION = (2, 2048)  # rows, tokens
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
    chosen = ("loop_probability", "long_tokens", "kl_weight", "learning_rate", "feature_learning_rate")
    given: dict[str, Any] = {name: getattr(options, name) for name in chosen}
    trial = hf_rfa.from_pretrained(save(model, options.output / "transferred"), dtype=torch.float32)
    started = time.process_time()
    recipe.fine_tune(trial, original, token_lists, TIMED_STEPS, seed=2, progress=False, **given)
    one = (time.process_time() - started) / TIMED_STEPS
    spent += one * TIMED_STEPS
    steps = max(1, int((options.budget - spent) / one))
    results["finetune_steps"] = steps
    progress = stage("finetuned", lambda: recipe.fine_tune(
        model, original, token_lists, steps, seed=3, output=options.output / "run", save_every=200, **given,
        evaluate=lambda m: {"copy 300": measure.copy_perplexity(m.eval(), held_out, 300)}, evaluate_every=200,
    ))  # fmt: skip
    results["evaluations"] = progress.evaluations
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
    parser.add_argument("--loop_probability", type=float, default=recipe.LOOP_PROBABILITY, help="in fine-tuning")
    parser.add_argument("--long_tokens", type=int, default=recipe.LONG, help="of every fourth text, in fine-tuning")
    parser.add_argument("--kl_weight", type=float, default=recipe.KL_WEIGHT, help="in fine-tuning")
    parser.add_argument("--learning_rate", type=float, default=recipe.LEARNING_RATE)
    parser.add_argument("--feature_learning_rate", type=float, default=recipe.FEATURE_LEARNING_RATE)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


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
        return hf_rfa.cache_bytes(cache_of(model(torch.ones(1, 512, dtype=torch.int64), use_cache=True)))


def save(model: Any, folder: Path) -> Path:
    hf_rfa.save_pretrained(model, folder)
    return folder


if __name__ == "__main__":
    main()
