"""The study behind the defaults of `RFAConfig`: maps, feature counts, windows and stages, all in one table.

    python scripts/experiments/run.py scripts/experiments/maps.yaml --model MODEL --data DATA --output OUTPUT
    python scripts/experiments/run.py scripts/experiments/budget.yaml --model MODEL --data DATA --output OUTPUT

MODEL and DATA are a folder or an id of the hub (without them: the embedded model on the standard library). A YAML file
lists values for each field of a run; every combination is one run and one entry of OUTPUT/results.json. Finished runs
are not repeated, so that an interrupted study continues. At the end OUTPUT gets `table.md` and the plots of all
entries.

Stages of a run, each from a fresh copy of the original:

    uncalibrated   the config's alpha and gamma on every head
    calibrated     hf_rfa.calibrate; no weight is trained
    transferred    calibrated, then `transfer` of recipe.py for `transfer_steps`
    finetuned      transferred, then `fine_tune` of recipe.py for `finetune_steps`
"""

import copy
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipe
import torch
import yaml
from plots import write_plots
from table import write_table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.evaluation.compare import default_model
from hf_rfa.evaluation.measuring import Measurer, Tokens
from hf_rfa.evaluation.results import CompareSettings
from hf_rfa.evaluation.retrieval_tasks import passkey_retrieval
from hf_rfa.options import Settings, option
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.arguments import cache_of

FIELDS = ("feature_map", "num_features", "window", "softmax_heads", "stage")
STAGES = ("uncalibrated", "calibrated", "transferred", "finetuned")
CACHE_TOKENS = 8192
# Length of the passkey texts, tokens, and the depths of the key.
PASSKEY_LENGTH, PASSKEY_DEPTHS = 1024, (0.25, 0.75)


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line."""

    study: Path = option("YAML file of the study.")
    output: Path = option("Folder of the results.")
    model: str | None = option("Folder or hub id of the original; by default the embedded model.", None)
    data: str = option(SOURCE_HELP, "stdlib")
    tables_only: bool = option("Write the table and the plots of the results so far; run nothing.", False)
    threads: int = option("CPU threads; 0 leaves PyTorch's number.", 0, least=0)


def main(arguments: Sequence[str]) -> None:
    # The first word may be the study: its keys are lists of values of many runs, so it is no file of options.
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = ["--study", *arguments]
    options = parse_arguments(Options, arguments, __doc__)
    study = yaml.safe_load(options.study.read_text())
    unknown = sorted(set(study) - {"runs", "settings", "transfer_steps", "finetune_steps"})
    if unknown:
        raise SystemExit(f"{options.study}: unknown keys {unknown}.")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "results.json"
    results = json.loads(path.read_text()) if path.exists() else []
    if not options.tables_only:
        run_all(study, options, results, path)
    write_table(results, options.output / "table.md")
    write_plots(results, options.output)


def run_all(study: Mapping[str, Any], options: Options, results: list[dict[str, Any]], path: Path) -> None:
    """Every run of the study that has no result yet; each is added to `results`, and written to `path`."""
    model = options.model or default_model()
    settings = CompareSettings.from_dict(
        {"model": model, "data": options.data, **study.get("settings", {})}, source=str(options.study)
    )
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = Tokens(settings, AutoTokenizer.from_pretrained(model))
    measure = tokens.measurer(original)
    done = {name_of(result["run"]) for result in results}
    runs = [run for run in all_runs(study["runs"]) if name_of(run) not in done]
    for run in tqdm(runs, desc=options.study.stem, unit="run"):
        # Through JSON, whose keys are strings, so that results of this run and of earlier ones are alike.
        results.append(json.loads(json.dumps(run_one(run, study, original, tokens, measure))))
        results.sort(key=lambda result: name_of(result["run"]))
        path.with_suffix(".partial").write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".partial").rename(path)


def all_runs(groups: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every combination of each group's values; the original first, then the window alone of each width."""
    found = {
        "original": {"feature_map": None, "num_features": 0, "window": 0, "softmax_heads": None, "stage": "original"}
    }
    for group in groups:
        if sorted(group) != sorted(FIELDS) or not set(group["stage"]) <= set(STAGES):
            raise SystemExit(f"A group of runs needs lists for {list(FIELDS)}, stages of {list(STAGES)}. Got {group}.")
        for values in itertools.product(*(group[field] for field in FIELDS)):
            run = dict(zip(FIELDS, values, strict=True))
            if run["window"]:
                bare = {**run, "feature_map": None, "num_features": 0, "softmax_heads": None, "stage": "window only"}
                found[name_of(bare)] = bare
            found[name_of(run)] = run
    yield from found.values()


def name_of(run: Mapping[str, Any]) -> str:
    """A unique name for each run."""
    heads = "linear" if run["softmax_heads"] is None else f"exact-{run['softmax_heads']}"
    parts = [run["stage"], run["feature_map"], run["num_features"], f"window-{run['window']}", heads]
    return "_".join(str(part).replace(" ", "-") for part in parts if part)


def run_one(
    run: dict[str, Any], study: Mapping[str, Any], original: PreTrainedModel, tokens: Tokens, measure: Measurer
) -> dict[str, Any]:
    """Make the model of one run, and measure it."""
    started = time.perf_counter()
    if run["stage"] == "original":
        model, seconds = original, {}
    else:
        model, seconds = make(run, study, original, tokens)
    quality = dataclasses.asdict(measure(model))
    quality.pop("far_recovery")  # the table knows the window-only run
    scores = passkey_retrieval(
        model, tokens.held_out, [PASSKEY_LENGTH], PASSKEY_DEPTHS, first_token=tokens.first_token
    )
    quality["passkey"] = sum(score.accuracy for score in scores) / len(scores)
    made = {"seconds": {**seconds, "all": time.perf_counter() - started}, "cache_bytes": bytes_after(model)}
    converted = [] if run["stage"] == "original" else require_adapters(model)
    heads = [[adapter.layer, head] for adapter in converted for head in adapter.softmax_heads]
    return {"run": run, **quality, **made, "exact_heads": heads}


def make(
    run: dict[str, Any], study: Mapping[str, Any], original: PreTrainedModel, tokens: Tokens
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The converted model of a run, and how long each stage took."""
    bare = run["stage"] == "window only"
    config = hf_rfa.RFAConfig(
        feature_map=run["feature_map"] or "hyperbolic", num_features=run["num_features"] or 1, window=run["window"],
        sink_tokens=4 if run["window"] else 0, softmax_heads=run["softmax_heads"], gamma=0.0 if bare else 1.0,
        kept_keys=0,  # the study is about features; `kept_keys.py` is about kept keys
    )  # fmt: skip
    model, seconds = hf_rfa.convert(copy.deepcopy(original), config, calibrate=False), {}

    def timed(name: str, action: Any) -> None:
        started = time.perf_counter()
        action()
        seconds[name] = time.perf_counter() - started

    if run["stage"] in STAGES[1:]:
        timed("calibrate", lambda: hf_rfa.calibrate(model, tokens.calibration_batches()))
    if run["stage"] in STAGES[2:]:
        steps = study["transfer_steps"]
        timed("transfer", lambda: recipe.transfer(model, tokens.train, steps, progress=False))
    if run["stage"] == "finetuned":
        steps = study["finetune_steps"]
        timed("finetune", lambda: recipe.fine_tune(model, original, tokens.train, steps, progress=False))
    return model.eval(), seconds


def bytes_after(model: PreTrainedModel, tokens: int = CACHE_TOKENS) -> int:
    """Bytes of the cache after this many tokens; it grows by the same amount per token, or not at all."""
    sizes = []
    for length in (512, 1024):
        with torch.no_grad():
            cache = cache_of(model(torch.ones(1, length, dtype=torch.int64), use_cache=True))
        sizes.append(hf_rfa.cache_bytes(cache))
    return sizes[0] + (sizes[1] - sizes[0]) * (tokens - 512) // 512


if __name__ == "__main__":
    main(sys.argv[1:])
