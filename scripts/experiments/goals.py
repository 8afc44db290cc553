"""The goals of the project on one model, by a module of measures of your own: five columns, nothing trained.

    python scripts/experiments/goals.py --model MODEL --data DATA --measure measure.py [--feature_map hyperbolic]

`measure.py` defines `validation_ids(tokenizer)`, `perplexity(model, ids, length, n)`, `copy_perplexity(model, ids,
gap, n)`, `kl_divergence(original, model, ids, length, n)` and `greedy_agreement(original, model, ids)`. Calibrated on
2 rows of 2,048 tokens of the training split. `exact, bare window` keeps the same heads and leaves the far parts out,
as DuoAttention does.
"""

import argparse
import copy
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_rfa
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.runtime.adapters import require_adapters

ROWS, CONTEXT = 2, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of the original")
    parser.add_argument("--data", required=True, help="see hf_rfa.data.documents.load_documents")
    parser.add_argument("--measure", type=Path, required=True, help="the module of measures")
    parser.add_argument("--feature_map", default="hyperbolic")
    parser.add_argument("--num_features", type=int, default=64)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.25, help="of key heads that stay exact")
    parser.add_argument("--own_text", action="store_true", help="calibrate on the text that the model writes itself")
    options = parser.parse_args()
    measure = load(options.measure)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = measure.validation_ids(tokenizer)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    config = hf_rfa.RFAConfig(
        feature_map=options.feature_map, num_features=options.num_features, window=options.window,
        softmax_heads=options.share, sink_tokens=4 if options.window else 0, kept_keys=0,
    )  # fmt: skip
    text: Any = True
    if not options.own_text:
        train = torch.cat(tokenize_documents(tokenizer, load_documents(options.data, "train"))[0])
        text = train[2000 : 2000 + ROWS * CONTEXT].view(ROWS, CONTEXT)
    model = hf_rfa.convert(copy.deepcopy(original), config, calibrate=text).eval()
    report = hf_rfa.calibration_report(model)
    print(report, "\n")
    gammas = [adapter.gamma.clone() for adapter in require_adapters(model)]
    print("                     KL @1024  KL @2048  ppl @1024  ppl @2048  copy 300  copy 1500  greedy")
    show("original", measure, original, original, ids)
    columns = [("every head linear", [], 1), ("heads exact", report.softmax_heads, 1)]
    if options.window:
        columns += [("window only", [], 0), ("exact, bare window", report.softmax_heads, 0)]
    for name, heads, size in columns:
        hf_rfa.set_softmax_heads(model, heads)
        for adapter, gamma in zip(require_adapters(model), gammas, strict=True):
            adapter.set_kernel(adapter.feature_maps, gamma=gamma * size)
        show(name, measure, original, model, ids)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def show(name: str, measure: Any, original: torch.nn.Module, model: torch.nn.Module, ids: torch.Tensor) -> None:
    divergence = [
        measure.kl_divergence(original, model, ids, 1024, 4),
        measure.kl_divergence(original, model, ids, 2048, 4),
    ]
    perplexity = [measure.perplexity(model, ids, 1024, 4), measure.perplexity(model, ids, 2048, 4)]
    copies = [measure.copy_perplexity(model, ids), measure.copy_perplexity(model, ids, 1500, 4)]
    greedy = measure.greedy_agreement(original, model, ids)
    print(
        f"{name:19s}  {divergence[0]:8.5f}  {divergence[1]:8.5f}  {perplexity[0]:9.3f}  {perplexity[1]:9.3f}  "
        f"{copies[0]:8.3f}  {copies[1]:9.3f}  {greedy:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
