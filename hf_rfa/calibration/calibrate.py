"""`calibrate`: fit the far kernel of every key head to the original's own q, k, v, and rank the heads.

Closed forms and a grid, no gradients. There are two passes over a few texts. In both, every layer answers with exact
softmax, so that its inputs are those of the original model: the first pass takes the moments of the far queries and
keys (`geometry`), the second tries the candidates (`fitting`). The error of a key head is measured after the output
projection, relative to the output of the whole layer:

    loss(layer, head) = sum_tokens |W_head (out_rfa - out_softmax)|^2 / sum_tokens |W out_softmax|^2

Then one forward per layer measures how far these errors move the model's output (`divergence`), the costliest heads
may stay exact, and far parts that do more harm than good are switched off, layer by layer.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_rfa.calibration.batches import ModelInput, batches_of, call_arguments
from hf_rfa.calibration.candidates import CandidateSource
from hf_rfa.calibration.divergence import Divergence, ignore, measure
from hf_rfa.calibration.fitting import LayerFit
from hf_rfa.config import HeadIndex, RFAConfig
from hf_rfa.errors import ConfigError, UnsupportedModelError
from hf_rfa.report import CalibrationReport, HeadCalibration
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.calls import Interception, intercept
from hf_rfa.runtime.quiet import plain_torch, quiet_eval
from hf_rfa.runtime.record import base_model, conversion_config, store_report
from hf_rfa.runtime.softmax_heads import set_softmax_heads

#: `softmax_heads="auto"` keeps at most this share of all key heads.
AUTO_SHARE = 0.25
#: Tokens on which the costs are measured, in the fewest rows that hold them.
COST_TOKENS = 4096
#: Measure a layer again when the head just kept carried more than this share of its loss.
LARGE_SHARE = 0.2


def calibrate(model: nn.Module, batches: Any, *, plant_repeats: bool = True) -> CalibrationReport:
    """Fit the far kernel of every key head of a converted model, rank the heads, pick the exact ones.

    In several processes each passes batches of its own; the sums are added, and all choose the same.

    Args:
        model: A converted model; its adapters are changed.
        batches: A few thousand tokens of the text that the model is meant for: token ids (batch, seq), an iterable
            of such batches or of single rows, a dataset with a column `input_ids`, or dictionaries of the model's
            arguments (see `hf_rfa.calibration.batches.batches_of`). Rows should be as long as the later contexts, and
            must be longer than two windows: shorter ones have no far keys.
        plant_repeats: Repeat an early span of each row of plain token ids at its end, which shows the heads that look
            up single tokens.

    Returns:
        The far kernel and the cost of each head; `softmax_heads="auto"` or a fraction of the config is resolved. The
        model keeps it: `hf_rfa.calibration_report(model)`.

    Raises:
        ConfigError: No batch, something else than batches (texts, a single row, ids that the model does not have), or
            no token that is far from another.
        UnsupportedModelError: The model is not converted.

    Example:
        >>> import torch, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = LlamaForCausalLM(LlamaConfig(**size))
        >>> config = hf_rfa.RFAConfig(window=16, softmax_heads=0.25)
        >>> model = hf_rfa.convert(model, config, calibrate=False)
        >>> report = hf_rfa.calibrate(model, torch.randint(64, (2, 256)))
        >>> len(report.heads), len(report.softmax_heads)
        (4, 1)
    """
    conversion_config(model)  # refuses a model that is not converted
    with plain_torch():
        return _calibrate(model, list(batches_of(batches, base_model(model), name="batches")), plant_repeats)


def _calibrate(model: nn.Module, batches: list[ModelInput], plant_repeats: bool) -> CalibrationReport:
    config, base = conversion_config(model), base_model(model)
    adapters = [adapter for _, _, adapter in named_adapters(base)]
    converted = [adapter for adapter in adapters if adapter.converted]
    sources = {adapter.layer: CandidateSource(adapter) for adapter in converted}
    _observe(base, adapters, batches, plant_repeats, sources)
    _merge(sources)
    fits = {adapter.layer: LayerFit(adapter, sources[adapter.layer]) for adapter in converted}
    _observe(base, adapters, batches, plant_repeats, fits)
    _merge(fits)
    if not all(fit.totals[2] for fit in fits.values()):
        raise ConfigError(
            f"`batches` must hold sequences longer than two windows ({2 * config.window} tokens), or nothing is far. "
            "Got none. Pass a few texts of 512 tokens or more."
        )
    set_softmax_heads(model, [])
    results = {layer: fit.choose() for layer, fit in fits.items()}
    texts = [_inputs(base, batch, plant_repeats)[0] for batch in _first_rows(batches, COST_TOKENS)]
    with quiet_eval(model):
        kept, costs = _rank(base, texts, adapters, config, results)
        set_softmax_heads(model, sorted(kept))
        silenced, after, window = _hold_to_window(base, texts, adapters, converted)
    heads = [
        HeadCalibration(layer, head, softmax=(layer, head) in kept, cost=costs[layer, head], **row)
        for layer, rows in results.items()
        for head, row in enumerate(_silent(rows) if layer in silenced else rows)
    ]
    tokens = int(next(iter(fits.values())).totals[1])
    seen = {"window": config.window, "sink_tokens": config.sink_tokens, "kept_keys": config.most_kept_keys}
    report = CalibrationReport(heads, tokens, after.unit, after.mean, window.mean, silenced, **seen)
    store_report(base, report)
    return report


def _observe(
    base: nn.Module,
    adapters: list[RFAAdapter],
    batches: list[ModelInput],
    plant_repeats: bool,
    observers: Mapping[int, Any],
) -> None:
    """Run the batches through the model, every head exact, with an observer at each converted layer."""
    each = {adapter: observers[adapter.layer] if adapter.converted else ignore for adapter in adapters}
    with intercept(Interception(observers=each)), quiet_eval(base):
        for batch in batches:
            inputs, planted = _inputs(base, batch, plant_repeats)
            for observer in observers.values():
                observer.planted = planted
            base(**inputs)


def _inputs(base: Any, batch: ModelInput, plant_repeats: bool) -> tuple[dict[str, Any], int]:
    """Keyword arguments of the model, and how many tokens at the end of each row repeat earlier ones."""
    span = batch.shape[1] // 8 if plant_repeats and isinstance(batch, torch.Tensor) else 0
    return call_arguments(base, _plant(batch, span) if span and isinstance(batch, torch.Tensor) else batch), span


def _plant(ids: torch.Tensor, span: int) -> torch.Tensor:
    """The rows with `span` tokens of their first half once more at their end."""
    start = ids.shape[1] // 4
    return torch.cat([ids[:, :-span], ids[:, start : start + span]], dim=1)


def _first_rows(batches: list[ModelInput], tokens: int) -> Iterator[ModelInput]:
    """The first batches that hold so many tokens; the last one has only the rows that are needed."""
    for batch in batches:
        given = {"": batch} if isinstance(batch, torch.Tensor) else dict(batch)
        tensors = {name: t for name, t in given.items() if isinstance(t, torch.Tensor)}
        rows, length = next((t.shape[:2] for t in tensors.values() if t.dim() > 1), (1, 1))
        wanted = min(rows, max(1, -(-tokens // length)))
        cut = given | {name: t[:wanted] for name, t in tensors.items() if t.dim() and len(t) == rows}
        yield cut[""] if isinstance(batch, torch.Tensor) else cut
        tokens -= wanted * length
        if tokens <= 0:
            return


def _rank(
    base: nn.Module, texts: list[dict[str, Any]], adapters: list[RFAAdapter], config: RFAConfig,
    results: dict[int, list[dict[str, Any]]],
) -> tuple[set[HeadIndex], dict[HeadIndex, float]]:  # fmt: skip
    """The heads to keep, and the cost of every head: of a kept one when it was chosen, of the others at the end.

    A layer's divergence is split among its linear heads by their losses. If the head just kept had a large share, the
    layer is measured again without it: large divergences do not add up.
    """
    costs: dict[HeadIndex, float] = {}
    linear = {(layer, head): row["loss"] for layer, rows in results.items() for head, row in enumerate(rows)}

    def update(layers: Iterable[int]) -> None:
        found = measure(base, texts, adapters, {layer: (layer,) for layer in layers}, _reduce)
        for layer, divergence in found.items():
            mine = {pair: loss for pair, loss in linear.items() if pair[0] == layer}
            total = sum(mine.values())
            costs.update({pair: divergence.mean * (loss / total if total else 0.0) for pair, loss in mine.items()})

    update(results)
    setting, kept = config.softmax_heads, set[HeadIndex]()
    if setting is None:
        return kept, costs
    if not isinstance(setting, (str, int, float)):
        unknown = [pair for pair in setting if pair not in costs]
        if unknown:
            raise UnsupportedModelError(
                f"`softmax_heads` names key heads that do not exist: {unknown}. Correct the config."
            )
        return set(setting), costs
    most = round((AUTO_SHARE if setting == "auto" else setting) * len(costs))
    while len(kept) < (max(1, most) if setting == "auto" else most):
        if setting == "auto" and sum(costs[pair] for pair in linear) <= config.loss_budget:
            break
        worst = max(linear, key=lambda pair: costs[pair])
        layer_loss = sum(loss for pair, loss in linear.items() if pair[0] == worst[0])
        loss = linear.pop(worst)
        kept.add(worst)
        if loss > LARGE_SHARE * layer_loss and any(layer == worst[0] for layer, _ in linear):
            set_softmax_heads(base, sorted(kept))
            update([worst[0]])
    return kept, costs


def _hold_to_window(
    base: nn.Module, texts: list[dict[str, Any]], adapters: list[RFAAdapter], converted: list[RFAAdapter]
) -> tuple[list[int], Divergence, Divergence]:
    """Switch off far parts until the model is no worse than with its window alone, the most harmful layer first.

    Returns the layers, and the divergences of the resulting model and of the window alone.
    """
    layers = tuple(adapter.layer for adapter in converted)
    gammas = {adapter.layer: adapter.gamma.clone() for adapter in converted}

    def silence(silent: Iterable[int]) -> None:
        for adapter in converted:
            gamma = gammas[adapter.layer] * (adapter.layer not in set(silent))
            adapter.set_kernel(adapter.feature_maps, gamma=gamma)

    def run(silent: Iterable[int], settings: Mapping[Any, Any]) -> dict[Any, Divergence]:
        silence(silent)
        return measure(base, texts, adapters, settings, _reduce)

    fitted = run((), {"all": layers})["all"]
    if converted[0].config.window == 0:
        return [], fitted, dataclasses.replace(fitted, total=float("nan"))
    window = run(layers, {"all": layers})["all"]
    if fitted.mean <= window.mean:
        silence(())
        return [], fitted, window
    single = {layer: (layer,) for layer in layers}
    far, near = run((), single), run(layers, single)
    order = sorted(layers, key=lambda layer: near[layer].mean - far[layer].mean)
    for count in range(1, len(order)):
        now = run(order[:count], {"all": layers})["all"]
        if now.mean <= window.mean:
            return sorted(order[:count]), now, window
    silence(layers)
    return sorted(layers), window, window


def _silent(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "gamma": 0.0, "loss": row["window_loss"]} for row in rows]


def _merge(observers: Mapping[int, Any]) -> None:
    for observer in observers.values():
        observer.merge(_reduce)


def _reduce(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes; the tensor itself in a single one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    on_gpu = torch.distributed.get_backend() == "nccl"
    summed = tensor.cuda() if on_gpu else tensor.clone()
    torch.distributed.all_reduce(summed)
    return summed.to(tensor.device)
