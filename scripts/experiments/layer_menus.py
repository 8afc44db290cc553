"""What a budget of bytes would gain if it also bought features or a window, layer by layer.

    python scripts/experiments/layer_menus.py --model MODEL --data DATA --output RESULT.json [--context 2048]

For each window, number of features and number of kept keys, each key head's cost in nats (`hf_rfa.head_costs`) is
worked out from one backward pass, as in `kept_keys_table.py`: the far kernel of each number of features is fitted on
the calibration passage, gamma chosen again for each window and K. A menu says which windows and features a layer may
have; its heads share them, and each has its own kept keys or is exact. For a price lambda of a byte every layer takes
what is cheapest,

    min over (window, features) of  sum over its heads of min over (kept keys, exact) of  nats + lambda bytes

which is the best choice of all for the bytes that it takes (`hf_rfa.calibration.budget` walks the same points). The
choice is made on the calibration passage, of one book, and its nats are also counted on a passage of another.
"""

import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kept_keys import calibration_text, passages
from kept_keys_table import KEPT, SINKS, WINDOW, Gammas, Line, bytes_of, captured, converted_adapters, errors_of
from selection_rules import PRODUCT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.options import Settings, option

WINDOWS, FEATURES, NUMBERS = (32, 64, 128), (32, 64, 128), (0, 32, 64, 128, 256, 512)
USUAL = hf_rfa.RFAConfig().num_features
#: The first one is what a budget buys; the others have it too, and choose from these windows and features.
MENUS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "kept keys and exact heads": ((WINDOW,), (USUAL,)),
    "32 features in all layers": ((WINDOW,), (32,)),
    "128 features in all layers": ((WINDOW,), (128,)),
    "features per layer": ((WINDOW,), FEATURES),
    "window 32 in all layers": ((32,), (USUAL,)),
    "window 128 in all layers": ((128,), (USUAL,)),
    "a window per layer": (WINDOWS, (USUAL,)),
    "both per layer": (WINDOWS, FEATURES),
}
BUDGETS = (0.05, 0.1, 0.15, 0.25, 0.4)


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line."""

    model: str = option("Folder or hub id of the original.")
    data: str = option(SOURCE_HELP)
    output: Path = option("File of the result, JSON; the table is written beside it.")
    context: int = option("Length of the passages, tokens.", 2048, least=512)
    budget_context: int = option("The length at which an exact head's bytes are counted.", 8192, least=1)
    draws: int = option("Texts that the expectation is taken over.", 1, least=1)
    feature_map: str = option("The far kernel.", "hyperbolic")


@dataclass(frozen=True)
class Costs:
    """Of every way: window, features, kept keys (the last entry: exact).

    Attributes:
        layer: (heads,) of each key head.
        price: (W, F, K + 1) bytes per key head.
        nats: (2, W, F, K + 1, heads) on the passage that decides, and on the other.
    """

    layer: torch.Tensor
    price: torch.Tensor
    nats: torch.Tensor


@dataclass(frozen=True)
class Point:
    """What a menu gives for a price of a byte."""

    bytes: float
    nats: float
    held_out: float
    windows: tuple[int, ...]  # of each layer
    features: tuple[int, ...]


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    text = calibration_text(tokenizer, options.data, options.context)
    other = tokenize_documents(tokenizer, load_documents(options.data, "validation"))[0][:1]
    costs = measured(model, text, passages(other, options.context, 1)[0], options)
    curves = {name: curve(costs, *menu) for name, menu in MENUS.items()}
    whole = costs.price[0, 0, -1].item() * len(costs.layer)
    rows = [
        {"menu": name, "budget": share, **at(points, share * whole)}
        for name, points in curves.items() for share in BUDGETS
    ]  # fmt: skip
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"options": options.to_dict(), "heads": len(costs.layer), "cpu_seconds": time.process_time()}
    options.output.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    options.output.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


def measured(model: PreTrainedModel, text: torch.Tensor, other: torch.Tensor, options: Options) -> Costs:
    """The costs of all ways on both passages (N,)."""
    found: list[dict[str, FarKernel]] = []
    for number in FEATURES:
        config = hf_rfa.RFAConfig(
            feature_map=options.feature_map, num_features=number, window=WINDOW, sink_tokens=SINKS, kept_keys=KEPT
        )
        hf_rfa.convert(model, config, calibrate=False)
        hf_rfa.calibrate(model, text[None], plant_repeats=False)
        kernels = [adapter.kernel for adapter in converted_adapters(model)]
        found = found or [{} for _ in kernels]
        for mine, kernel in zip(found, kernels, strict=True):
            mine[str(number)] = kernel
        if number != FEATURES[-1]:
            hf_rfa.revert(model)
        print(f"{number} features fitted after {time.process_time():.0f} CPU-s", flush=True)
    ways = list(itertools.product(WINDOWS, FEATURES, NUMBERS))
    grid = [Line(PRODUCT, window, kept, str(number)) for window, number, kept in ways]
    gammas: Gammas = {}
    shape, nats, prices, layer = (len(WINDOWS), len(FEATURES), len(NUMBERS)), [], [], torch.empty(0)
    for ids in (text, other):
        layers = captured(model, ids, options.draws)
        errors = errors_of(layers, found, grid, gammas)
        heads = torch.stack([errors[line].square().mean((0, 2)) / 2 for line in grid]).unflatten(0, shape)
        nats.append(torch.cat([heads, torch.zeros_like(heads[:, :, :1])], dim=2))
        components = {name: kernel.num_components for name, kernel in found[0].items()}
        prices = [bytes_of(layers[0], line.window, line.kept_keys, components[str(line.far)]) for line in grid]
        token = bytes_of(layers[0], 2, 0, 0) - bytes_of(layers[0], 1, 0, 0)
        layer = torch.repeat_interleave(torch.arange(len(layers)), torch.tensor([len(each.key) for each in layers]))
        print(f"a passage after {time.process_time():.0f} CPU-s", flush=True)
    price = torch.tensor(prices).view(shape)
    # A window holds 2C tokens: `token` is a pair of them.
    exact = torch.full_like(price[:, :, :1], token / 2 * options.budget_context)
    return Costs(layer, torch.cat([price, exact], dim=2).double(), torch.stack(nats).double())


def curve(costs: Costs, windows: Sequence[int], features: Sequence[int]) -> list[Point]:
    """The points of a menu, cheapest first."""
    own = torch.tensor([WINDOWS.index(w) for w in windows]), torch.tensor([FEATURES.index(f) for f in features])
    price = costs.price[own[0]][:, own[1]]
    nats = costs.nats[:, own[0]][:, :, own[1]]
    layers = int(costs.layer.max()) + 1
    found: dict[float, Point] = {}
    for price_of_byte in torch.logspace(-16, -2, 2000, dtype=torch.float64).tolist():
        best, kept = (nats[0] + price_of_byte * price.unsqueeze(-1)).min(2)  # (w, f, heads)
        of_layers = torch.zeros(*best.shape[:2], layers, dtype=best.dtype).index_add_(2, costs.layer, best)
        chosen = of_layers.flatten(0, 1).argmin(0)[costs.layer]
        window, number = chosen // len(features), chosen % len(features)
        heads = torch.arange(len(costs.layer))
        places = window, number, kept[window, number, heads]
        size = price[places].sum().item()
        cost, held_out = (each[(*places, heads)].sum().item() for each in nats)
        firsts = [int((costs.layer == one).nonzero()[0]) for one in range(layers)]
        found[size] = Point(
            size, cost, held_out, tuple(windows[int(window[one])] for one in firsts),
            tuple(features[int(number[one])] for one in firsts),
        )  # fmt: skip
    return sorted(found.values(), key=lambda point: point.bytes)


def at(points: Sequence[Point], size: float) -> dict[str, Any]:
    """The nats of so many bytes, between two points in proportion; what the layers have at the one below."""
    below = [point for point in points if point.bytes <= size]
    above = [point for point in points if point.bytes > size]
    if not below:
        return {"nats": None, "held_out": None, "windows": {}, "features": {}}
    low, high = below[-1], above[0] if above else below[-1]
    part = (size - low.bytes) / (high.bytes - low.bytes) if above else 0.0
    nats, held_out = (
        (1 - part) * getattr(low, name) + part * getattr(high, name) for name in ("nats", "held_out")
    )  # fmt: skip
    return {"nats": nats, "held_out": held_out, "windows": _counts(low.windows), "features": _counts(low.features)}


def _counts(values: Sequence[int]) -> dict[int, int]:
    return {value: values.count(value) for value in sorted(set(values))}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Nats/token on the passage that decided, on the other; and how many layers have which window and features."""
    lines = [
        "| menu | budget | nats/token | on the other passage | windows | features |",
        "|---|---:|---:|---:|---|---|",
    ]
    for row in rows:
        cells = ["—" if row[name] is None else f"{row[name]:.5f}" for name in ("nats", "held_out")]
        cells += [", ".join(f"{key}: {n}" for key, n in row[name].items()) for name in ("windows", "features")]
        lines.append(f"| {row['menu']} | {row['budget']:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
