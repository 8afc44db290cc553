"""Selection rule x kept keys x window x exact heads x far part on one model, with bounds, from one backward pass.

    python scripts/experiments/kept_keys_table.py --model MODEL --data DATA --output RESULT.json
        [--maps hyperbolic,clustered] [--documents 1] [--kernels FILE]

For every line of the grid, each key head's cost in nats (`hf_rfa.head_costs`) is worked out from queries, keys, values
and gradients of one passage per document of the validation split. On the calibration passage, of another book, the far
kernels are fitted (at window 64 with 128 kept keys, as `hf_rfa.calibrate` does, but without planted repeats), gamma is
chosen again for each window and K, and the heads are ranked by what they cost under the same line; the costliest share
is exact. `--kernels` keeps the fitted kernels. `kept_keys_report.py` makes the tables and the plot.

A line's `sum` adds up the costs of the heads that are not exact, its `joint` is the same quadratic form of all their
errors together:

    sum = 1/2 sum_h E[(g_h . delta_h)^2],        joint = 1/2 E[(sum_h g_h . delta_h)^2]         nats/token
"""

import copy
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kept_keys import calibration_text, passages
from selection_rules import PRODUCT, RECALLED, RULES, FarFeatures, Layer, attend, oracle
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_rfa
from hf_rfa.calibration.fitting import GAMMAS
from hf_rfa.calibration.layer_gradients import LayerGradients, LayerInputs
from hf_rfa.calibration.output_projection import output_projection
from hf_rfa.calibration.texts import texts_of
from hf_rfa.command_line import parse_arguments
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops import attention
from hf_rfa.ops.combine import Part, combine
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.state import RFAState
from hf_rfa.options import Settings, option
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import require_adapters

WINDOW, KEPT, SINKS = 64, 128, 4
WINDOWS, NUMBERS, SHARES = (32, 64, 128), (0, 32, 64, 128, 256, 512), (0.0, 0.1, 0.25)
#: What the rules are compared at.
RULE_NUMBERS = (128, 256)
ORACLE = "oracle: the best keys of each query"


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line."""

    model: str = option("Folder or hub id of the original.")
    data: str = option(SOURCE_HELP)
    output: Path = option("File of the result, JSON.")
    context: int = option("Length of the passages, tokens.", 2048, least=512)
    documents: int = option("Documents of the validation split that are measured.", 1, least=1)
    draws: int = option("Texts that the expectation is taken over.", 2, least=1)
    maps: tuple[str, ...] = option("Far kernels.", ("hyperbolic", "clustered", "trigonometric"))
    kernels: Path | None = option("File that keeps the fitted kernels for another run.", None)


class Line(NamedTuple):
    """One way to compute all heads; `far` is a feature map or None."""

    rule: str
    window: int
    kept_keys: int
    far: str | None


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    text = calibration_text(tokenizer, options.data, options.context)
    documents = tokenize_documents(tokenizer, load_documents(options.data, "validation"))[0][: options.documents]
    model, kernels = fitted(original, text, options.maps, options.kernels)
    print(f"kernels after {time.process_time():.0f} CPU-s", flush=True)

    layers = captured(model, text, options.draws)
    gammas: Gammas = {}
    grid = lines(layers[0], options.maps)
    ranked = ranking(errors_of(layers, kernels, grid, gammas))
    print(f"gammas and ranking after {time.process_time():.0f} CPU-s", flush=True)
    results, held = dict[Line, list[dict[str, Any]]](), 0.0
    for ids in passages(documents, options.context, 1):
        layers = captured(model, ids, options.draws)
        held = max(held, difference_from_package(layers, kernels, gammas, options.maps))
        for line, errors in errors_of(layers, kernels, grid, gammas).items():
            results.setdefault(line, []).append(costs(errors, ranked[line]))
        print(f"a passage after {time.process_time():.0f} CPU-s", flush=True)
    rows = [
        {**line._asdict(), "bytes": bytes_per_head(layers[0], kernels, line), **mean(each)}
        for line, each in results.items()
    ]
    heads = len(next(iter(ranked.values())))
    whole = {"options": options.to_dict(), "heads": heads, "cpu_seconds": time.process_time()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written = {**whole, "largest_difference_from_package": held, "lines": rows}
    options.output.write_text(json.dumps(written, indent=None).replace('{"rule"', '\n{"rule"') + "\n")


#: gamma of each key head, by layer, map, window and kept keys.
Gammas = dict[tuple[int, str, int, int], torch.Tensor]
Kernels = Sequence[Mapping[str, FarKernel]]


def fitted(
    original: PreTrainedModel, text: torch.Tensor, maps: Sequence[str], file: Path | None
) -> tuple[PreTrainedModel, Kernels]:
    """The converted model, and each converted layer's far kernels by map, fitted on text (N,) behind the kept keys."""
    model: Any = None
    found: dict[str, list[FarKernel]] = {}
    if file is not None and file.exists():
        found = torch.load(file, weights_only=False)
    for name in maps:
        if model is not None and name in found:
            continue
        config = hf_rfa.RFAConfig(feature_map=name, window=WINDOW, sink_tokens=SINKS, kept_keys=KEPT)
        model = hf_rfa.convert(copy.deepcopy(original), config, calibrate=False).eval()
        if name in found:
            continue
        hf_rfa.calibrate(model, text[None], plant_repeats=False)
        found[name] = [adapter.kernel for adapter in converted_adapters(model)]
        print(f"{name} fitted after {time.process_time():.0f} CPU-s", flush=True)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, file)
    return model, [dict(zip(maps, each, strict=True)) for each in zip(*(found[name] for name in maps), strict=True)]


def converted_adapters(model: PreTrainedModel) -> list[RFAAdapter]:
    return [adapter for adapter in require_adapters(model) if adapter.converted]


def captured(model: PreTrainedModel, text: torch.Tensor, draws: int) -> list[Layer]:
    """What each converted layer computes on text (N,), every head exact, and the gradients of `head_costs`."""
    kept: dict[RFAAdapter, dict[str, Any]] = {adapter: {"gradients": []} for adapter in converted_adapters(model)}

    def take(inputs: LayerInputs, gradient: torch.Tensor) -> None:
        heads, mine = inputs.key.shape[1], kept[inputs.adapter]
        query, output, own = (x[0].unflatten(0, (heads, -1)) for x in (inputs.query, inputs.exact, gradient))
        mine |= {"query": query, "key": inputs.key[0], "value": inputs.value[0], "exact": output}
        mine |= {"grams": grams_of_heads(inputs), "scaling": inputs.settings.scaling}
        mine["gradients"].append(own)

    passes = LayerGradients(model, require_adapters(model))
    (whole,) = texts_of(model, [text[None]], plant_repeats=False)
    with passes.watching():
        outputs = passes.forward(whole.inputs)
        for draw, gradient in enumerate(outputs.gradients(whole.seeds(1), draws)):
            passes.backward(outputs, gradient, dict.fromkeys(kept, take), again=draw + 1 < draws)
    return [Layer(**{**mine, "gradients": torch.stack(mine["gradients"])}) for mine in kept.values()]


def grams_of_heads(inputs: LayerInputs) -> torch.Tensor:
    """W_h^T W_h (Hk, G M, G M) of the layer's output projection."""
    exact, heads = inputs.exact, inputs.key.shape[1]
    projection = output_projection(inputs.module, exact.shape[1] * exact.shape[3], exact)
    assert projection is not None
    columns = projection.unflatten(1, (heads, -1)).transpose(0, 1)
    return columns.mT @ columns


def lines(layer: Layer, maps: Sequence[str]) -> list[Line]:
    """All lines, the package's rule first, whose gammas the other rules use."""
    far = (None, *maps)
    grid = [Line(PRODUCT, w, k, f) for w in WINDOWS for k in NUMBERS for f in far]
    recalled = (None, RECALLED) if RECALLED in maps else (None,)
    rules = [name for name in RULES if name != PRODUCT and (RECALLED in maps or not RULES[name].recalls)]
    compared = [Line(name, WINDOW, k, f) for name in rules for k in RULE_NUMBERS for f in recalled]
    bounds = [Line(ORACLE, WINDOW, k, f) for k in RULE_NUMBERS for f in recalled]
    wider = {same_bytes_window(layer, line): None for line in grid if line.window == WINDOW}
    return grid + compared + bounds + [Line(PRODUCT, w, 0, None) for w in wider if w not in WINDOWS]


def bytes_of(layer: Layer, window: int, kept_keys: int, components: int) -> float:
    """Bytes of the package's state per key head, float32."""
    key, value, groups = layer.key[None], layer.value[None], layer.query.shape[1]
    state = RFAState.empty(1, key, value, components, window, SINKS, kept_keys, groups)
    return (state.nbytes - state.count.nbytes - (0 if components else state.log_max.nbytes)) / len(layer.key)


def bytes_per_head(layer: Layer, kernels: Kernels, line: Line) -> float:
    components = 0 if line.far is None else kernels[0][line.far].num_components
    return bytes_of(layer, line.window, line.kept_keys, components)


def same_bytes_window(layer: Layer, line: Line) -> int:
    """The widest window that with its sinks takes no more bytes than a line."""
    components = 0 if line.far is None else 2 * hf_rfa.RFAConfig().num_features
    token = bytes_of(layer, 2, 0, 0) - bytes_of(layer, 1, 0, 0)
    sinks = bytes_of(layer, 1, 0, 0) - token
    return int((bytes_of(layer, line.window, line.kept_keys, components) - sinks) // token)


@torch.no_grad()
def errors_of(
    layers: Sequence[Layer], kernels: Kernels, grid: Sequence[Line], gammas: Gammas
) -> dict[Line, torch.Tensor]:
    """g_h . delta_h of every line, (S, all key heads, N). Gammas that are missing are fitted on the same text."""
    found = dict[Line, list[torch.Tensor]]()
    for number, (layer, mine) in enumerate(zip(layers, kernels, strict=True)):
        features = {name: FarFeatures(kernel, layer) for name, kernel in mine.items()}
        for (rule, window, kept), near, parts in ways(layer, grid, features):
            for name, far in parts.items():
                own = number, name, window, kept
                if own not in gammas:
                    gammas[own] = best_gamma(layer, near, far)
            for name in [line.far for line in grid if line[:3] == (rule, window, kept)]:
                output = near.numerator
                if name is not None:
                    output = combine(near, with_gamma(parts[name], gammas[number, name, window, kept]))
                error = torch.einsum("shgnm,hgnm->shn", layer.gradients, output - layer.exact)
                found.setdefault(Line(rule, window, kept, name), []).append(error)
    return {line: torch.cat(errors, dim=1) for line, errors in found.items()}


def ways(
    layer: Layer, grid: Sequence[Line], features: Mapping[str, FarFeatures]
) -> Iterator[tuple[tuple[str, int, int], Part, dict[str, Part]]]:
    """(rule, window, kept keys) of the lines, with the exact part and the far parts that they need."""
    settings = dict[tuple[str, int, int], dict[str, FarFeatures]]()
    for line in grid:
        far = settings.setdefault(line[:3], {})
        if line.far is not None:
            far[line.far] = features[line.far]
    for (rule, window, kept), far in settings.items():
        if rule != ORACLE:
            asked = {RECALLED: features[RECALLED], **far} if RULES[rule].recalls else far
            near, parts = attend(layer, RULES[rule], kept, asked, window=window, sinks=SINKS)
            yield (rule, window, kept), near, {name: parts[name] for name in far}
    best = {kept: far for (rule, _, kept), far in settings.items() if rule == ORACLE}
    if best:
        found = oracle(layer, best, window=WINDOW, sinks=SINKS)
        yield from (((ORACLE, WINDOW, kept), *parts) for kept, parts in found.items())


def best_gamma(layer: Layer, near: Part, far: Part) -> torch.Tensor:
    """(Hk,) the gamma of each head with the least cost, as `calibrate` picks (see `hf_rfa.calibration.fitting`).

    Every fourth query is asked: one number per head is fitted.
    """
    near, far = (Part(*(tensor[:, :, ::4] for tensor in vars(part).values())) for part in (near, far))
    gradients, alone = layer.gradients[:, :, :, ::4], near.numerator / near.denominator.unsqueeze(-1)
    constant = torch.einsum("shgnm,hgnm->shgn", gradients, alone - layer.exact[:, :, ::4])
    push = far.numerator - far.denominator.unsqueeze(-1) * alone
    push = torch.einsum("shgnm,hgnm->shgn", gradients, push)
    ratio = (near.log_scale + near.denominator.log() - far.log_scale).exp()
    found = [constant.sum(2).square().sum((0, 2))]
    for gamma in GAMMAS:
        share = torch.where(far.denominator > 0, gamma / (ratio + gamma * far.denominator), 0.0)
        found.append((constant + share * push).sum(2).square().sum((0, 2)))
    return torch.tensor((0.0, *GAMMAS))[torch.stack(found).argmin(0)]


def with_gamma(far: Part, gamma: torch.Tensor) -> Part:
    return dataclasses.replace(far, log_scale=far.log_scale + gamma.log()[:, None, None])


@torch.no_grad()
def difference_from_package(layers: Sequence[Layer], kernels: Kernels, gammas: Gammas, maps: Sequence[str]) -> float:
    """Largest difference between the costs of a layer by `attend` here and by the package, relative to the cost."""
    line, worst = Line(PRODUCT, WINDOW, KEPT, maps[0]), 0.0
    for number, layer in enumerate(layers):
        gamma = gammas[number, maps[0], WINDOW, KEPT]
        kernel = dataclasses.replace(kernels[number][maps[0]], gamma=gamma)
        settings = AttentionSettings(window=WINDOW, sink_tokens=SINKS, kept_keys=KEPT, scaling=layer.scaling)
        query, key, value = layer.query.flatten(0, 1)[None], layer.key[None], layer.value[None]
        output = attention.attend(query, key, value, kernel, settings, TokenLayout())[0]
        delta = output[0].unflatten(0, layer.query.shape[:2]) - layer.exact
        theirs = torch.einsum("shgnm,hgnm->shn", layer.gradients, delta).square().mean()
        ours = errors_of([layer], [{maps[0]: kernel}], [line], {(0, *line[3:], WINDOW, KEPT): gamma})[line]
        worst = max(worst, (ours.square().mean() / theirs - 1).abs().item())
    return worst


def ranking(errors: Mapping[Line, torch.Tensor]) -> dict[Line, list[int]]:
    """All heads of each line, the costliest first."""
    return {line: e.square().mean((0, 2)).argsort(descending=True).tolist() for line, e in errors.items()}


def costs(errors: torch.Tensor, ranked: Sequence[int]) -> dict[str, dict[str, float]]:
    """`sum` and `joint` in nats/token for each share of exact heads."""
    row: dict[str, dict[str, float]] = {"sum": {}, "joint": {}}
    for share in SHARES:
        left = errors[:, ranked[round(share * len(ranked)) :]]
        row["sum"][f"{share:.0%}"] = left.square().mean((0, 2)).sum().item() / 2
        row["joint"][f"{share:.0%}"] = left.sum(1).square().mean().item() / 2
    return row


def mean(rows: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """The mean over passages."""
    return {
        kind: {share: sum(row[kind][share] for row in rows) / len(rows) for share in rows[0][kind]} for kind in rows[0]
    }


if __name__ == "__main__":
    main(sys.argv[1:])
