"""Kept keys on one model: divergence, greedy tokens, copies and pass keys at a number of bytes.

    python scripts/experiments/kept_keys.py --model MODEL --data DATA --output row.json
        [--kept_keys 128] [--exact 0.25] [--per_head] [--window 64] [--feature_map hyperbolic] [--gamma 0]
        [--transfer_steps 100] [--converted FOLDER] [--context 8192] [--recall false]

The far kernels are calibrated on one passage of the training split, behind the kept keys. `--exact` keeps that share
of the key heads as softmax, those that cost most (`hf_rfa.head_costs`). `--per_head` spends as many kept keys as
`--kept_keys` gives all linear heads together where they lower the cost most. `--gamma 0` leaves the far part out: a
window with sinks, if no keys are kept either. `--transfer_steps` trains the far kernels behind the kept keys
(attention transfer, see `recipe.py`, on texts as long as the passages, half of them in a loop) and measures the model
before (`calibrated` in the row) and after; without it nothing is trained. Measured are passages of the validation
split's documents: KL divergence from the original and agreement of the greedy tokens (teacher-forced), copy
perplexity, and pass keys at 1,024 tokens.

`--converted` keeps the model, before any transfer, in a folder from which the next row of the same conversion reads
it. `--context` is the length of the passages that are measured, `--calibration` that of the calibrating text.
"""

import copy
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import recipe
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_rfa
from hf_rfa.calibration import budget
from hf_rfa.calibration.budget import Way
from hf_rfa.command_line import parse_arguments
from hf_rfa.config import HeadIndex
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.data.documents import SOURCE_HELP, stream_documents
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.measures import copy_perplexity
from hf_rfa.evaluation.retrieval_tasks import passkey_retrieval
from hf_rfa.options import Settings, option, part
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.runtime.quiet import evaluation_mode
from hf_rfa.runtime.record import conversion_config

#: What a head may keep with `--per_head`.
NUMBERS = (0, 32, 64, 128, 256, 384, 512, 768, 1024)
#: Texts begin this far behind the start of a document, past prefaces and tables of contents.
SKIPPED = 8000


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    model: str = option("Folder or hub id of the original.")
    data: str = option(SOURCE_HELP)
    output: Path = option("File of the resulting row, JSON.")
    context: int = option("Length of the passages, tokens.", 2048, least=256)
    calibration: int = option("Length of the text that calibrates and ranks, tokens.", 2048, least=256)
    passages: int = option("Passages of each document of the validation split.", 4, least=1)
    exact: float = option("Share of the key heads that stay softmax.", 0.0, least=0, most=1)
    per_head: bool = option("Let heads keep different numbers of keys, `kept_keys` on average.", False)
    transfer_steps: int = option("Steps of attention transfer; 0 trains nothing.", 0, least=0)
    converted: Path | None = option("Folder that keeps the converted model for other rows.", None)
    recall: bool = option("Measure copies, pass keys and the cache, too.", True)
    conversion: hf_rfa.RFAConfig = part(
        hf_rfa.RFAConfig(),
        only=("feature_map", "num_features", "window", "sink_tokens", "kept_keys", "gamma", "seed"),
        group="Conversion",
    )


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    text = calibration_text(tokenizer, options.data, options.calibration)
    documents = tokenize_documents(tokenizer, load_documents(options.data, "validation"))[0]

    started = time.process_time()
    model = convert(copy.deepcopy(original), text[None], options)
    row: dict[str, Any] = {"conversion_seconds": time.process_time() - started}
    texts = passages(documents, options.context, options.passages)
    filler = torch.cat([ids[SKIPPED:] for ids in documents])

    def measured(name: str, each: PreTrainedModel) -> dict[str, Any]:
        first = tokenizer.bos_token_id
        found: dict[str, Any] = {} if each is original else fidelity(original, each, texts, options.context)
        if not options.recall:
            return found
        found[f"copy_300_{name}"] = copy_perplexity(each, filler, gap=300, first_token=first)
        cells = passkey_retrieval(each, filler, [1024], (0.1, 0.3, 0.5), first_token=first)
        found[f"passkey_{name}"] = sum(cell.accuracy for cell in cells) / len(cells)
        return found | {f"cache_bytes_{name}": cache_bytes(each, text)}

    row |= measured("original", original)
    if options.transfer_steps:
        row["calibrated"] = measured("converted", model)
        train = tokenize_documents(tokenizer, load_documents(options.data, "train"))[0]
        started = time.process_time()
        recipe.transfer(
            model, train, options.transfer_steps, seed=options.conversion.seed, tokens=options.context, rows=1,
            loop_probability=0.5,
        )  # fmt: skip
        row["transfer_seconds"] = time.process_time() - started
    row |= measured("converted", model)
    row["heads"] = exact(model)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"options": options.to_dict(), **row}, indent=1), encoding="utf-8")
    print(json.dumps({name: value for name, value in row.items() if name != "heads"}, indent=1))


def calibration_text(tokenizer: PreTrainedTokenizerBase, data: str, length: int) -> torch.Tensor:
    """(length,) tokens of the first document of the training split that is long enough."""
    least = SKIPPED + length
    tokens = (tokenize_documents(tokenizer, [each])[0][0] for each in stream_documents(data, "train"))
    return next(ids for ids in tokens if len(ids) >= least)[SKIPPED:least]


def convert(model: PreTrainedModel, text: torch.Tensor, options: Options) -> PreTrainedModel:
    """The model as the options say, calibrated on `text` (1, N), or as an earlier row left it in a folder."""
    folder = options.converted
    if folder is None or not folder.exists():
        model = _converted(model, text, options)
        if folder is not None:
            model.save_pretrained(folder)
            (folder / "row.json").write_text(json.dumps(_own(options)), encoding="utf-8")
        return model
    found = json.loads((folder / "row.json").read_text(encoding="utf-8"))
    if found != _own(options):
        raise ConfigError(f"{folder} holds another conversion. Got {found}. Name a new folder for {_own(options)}.")
    return hf_rfa.from_pretrained(folder, dtype=torch.float32).eval()


def _own(options: Options) -> dict[str, Any]:
    """The options that decide what the converted model is."""
    others = {"output", "context", "passages", "transfer_steps", "converted", "recall"}
    return {name: value for name, value in options.to_dict().items() if name not in others}


def _converted(model: PreTrainedModel, text: torch.Tensor, options: Options) -> PreTrainedModel:
    config = options.conversion
    far = config.gamma > 0
    model = hf_rfa.convert(model, config, calibrate=text if far else False).eval()
    if options.exact:
        costs = hf_rfa.head_costs(model, text, {"now": hf_rfa.HeadOption(far=far)}, draws=2)["now"]
        ranked = sorted(costs, key=lambda head: -costs[head])
        hf_rfa.set_softmax_heads(model, ranked[: round(options.exact * len(ranked))])
    if options.per_head:
        ways = {number: hf_rfa.HeadOption(kept_keys=number, far=far) for number in NUMBERS}
        costs_of = hf_rfa.head_costs(model, text, ways, draws=2)
        kept = set(map(tuple, exact(model)))
        linear = {number: {h: c for h, c in costs.items() if h not in kept} for number, costs in costs_of.items()}
        hf_rfa.set_kept_keys(model, 0, spend(linear, config.usual_kept_keys))
    return model


def spend(costs: Mapping[int, Mapping[HeadIndex, float]], mean: int) -> dict[HeadIndex, int]:
    """How many keys each head keeps, `mean` on average, so that the sum of `costs[number][head]` is small."""
    heads = list(costs[min(costs)])
    ways = {head: [Way(number, number, of[head]) for number, of in sorted(costs.items())] for head in heads}
    chosen, _ = budget.spend(ways, mean * len(heads))
    return {head: way.kept_keys or 0 for head, way in chosen.items()}


def passages(documents: list[torch.Tensor], context: int, number: int) -> torch.Tensor:
    """(n, context) passages, `number` evenly spread over each document."""
    found = []
    for ids in documents:
        places = torch.linspace(SKIPPED, len(ids) - context, number + 1).long()[:-1]
        found += [ids[place : place + context] for place in places.tolist()]
    return torch.stack(found)


def fidelity(original: PreTrainedModel, model: PreTrainedModel, texts: torch.Tensor, context: int) -> dict[str, Any]:
    """Mean KL divergence, nats/token, share of equal greedy tokens, and both for each passage."""
    rows = []
    with evaluation_mode(original, model):
        for ids in texts:
            p, q = (each(input_ids=ids[None], use_cache=False).logits[0] for each in (original, model))
            total, same = 0.0, 0
            for p_part, q_part in zip(p.split(256), q.split(256), strict=True):
                log_p, log_q = p_part.float().log_softmax(-1), q_part.float().log_softmax(-1)
                total += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
                same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            rows.append((total / context, same / context))
            print(f"passage {len(rows)} of {len(texts)}: KL {rows[-1][0]:.4f}, greedy {rows[-1][1]:.4f}", flush=True)
    kl, greedy = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return {"kl": kl, "greedy": greedy, "passages": rows}


def cache_bytes(model: PreTrainedModel, text: torch.Tensor) -> int:
    """Bytes of the cache after the text."""
    with evaluation_mode(model):
        return hf_rfa.cache_bytes(cache_of(model(input_ids=text[None], use_cache=True)))


def exact(model: PreTrainedModel) -> list[list[int]]:
    """The (layer, key head) pairs that stay softmax."""
    heads = conversion_config(model).softmax_heads
    return [list(head) for head in heads] if isinstance(heads, tuple) else []


if __name__ == "__main__":
    main(sys.argv[1:])
