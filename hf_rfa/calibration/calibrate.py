"""`calibrate`: fit the far kernel of every key head to the original's own q, k, v, and rank the heads by their costs.

Closed forms and a grid; no parameter is trained. A few texts go through the model once forwards and once backwards
(`layer_gradients`), every head exact, so that all layers see what those of the original see. On the way forwards each
layer's moments of far queries and keys are taken (`geometry`); on the way back, with the gradient of its output at
hand, all candidates for its far kernels are tried (`fitting`). Both are the layer's own business: the model does not
run again for a candidate. The cost of one is the divergence from the original that the head adds with it, nats/token.

Then the costliest heads may stay exact, and two more forwards measure the model that results and its window alone. If
it is the worse of the two, far parts are switched off, those first that gained least.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rfa.calibration.batches import ModelInput, batches_of
from hf_rfa.calibration.candidates import CandidateSource
from hf_rfa.calibration.divergence import Divergence
from hf_rfa.calibration.fitting import HeadFit, LayerFit
from hf_rfa.calibration.head_choice import choose_heads
from hf_rfa.calibration.layer_gradients import LayerGradients
from hf_rfa.calibration.measuring import Measurement
from hf_rfa.calibration.outputs import Outputs
from hf_rfa.calibration.processes import sum_over_processes
from hf_rfa.calibration.progress import Progress, progress_bar
from hf_rfa.calibration.strings import read_texts
from hf_rfa.calibration.texts import Text, count, texts_of
from hf_rfa.errors import ConfigError
from hf_rfa.report import NATS, CalibrationReport, HeadCalibration
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.quiet import plain_torch
from hf_rfa.runtime.record import base_model, conversion_config, store_report
from hf_rfa.runtime.softmax_heads import set_softmax_heads

logger = logging.getLogger(__name__)

#: Moments are those of the first so many tokens of each process: between the passes these are held, as the inputs of
#: each block of the model.
MOMENT_TOKENS = 4096
#: Candidates are tried on at least so many queries, and on one in `EVERY` at least.
TRIED_QUERIES, EVERY = 2048, 8
#: The divergence of the result is measured on the first so many tokens.
MEASURED_TOKENS = 2048


def calibrate(
    model: nn.Module,
    batches: Any,
    *,
    plant_repeats: bool = True,
    progress: bool | None = None,
    tokenizer: Any = None,
) -> CalibrationReport:
    """Fit the far kernel of every key head of a converted model, rank the heads, pick the exact ones.

    In several processes each passes batches of its own; the sums are added, and all choose the same.

    Args:
        model: A converted model; its adapters are changed.
        batches: A few thousand tokens of the text that the model is meant for: token ids (batch, seq), an iterable
            of such batches or of single rows, a dataset with a column `input_ids`, dictionaries of the model's
            arguments (see `hf_rfa.calibration.batches.batches_of`), or a list of texts. Rows should be as long as the
            later contexts, and must be longer than two windows: shorter ones have no far keys.
        plant_repeats: Repeat an early span of each row of plain token ids at its end, which shows the heads that look
            up single tokens.
        progress: Whether to show a progress bar; None: if stderr is a terminal.
        tokenizer: Reads the texts; None: the model's own, which lies where the model was loaded from.

    Returns:
        The far kernel and the cost of each head; `softmax_heads="auto"` or a fraction of the config is resolved. The
        model keeps it: `hf_rfa.calibration_report(model)`.

    Raises:
        ConfigError: No batch, something else than batches (a single text or row, ids that the model does not have), or
            no token that is far from another.
        UnsupportedModelError: The model is not converted, or no gradient flows through it.

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
    with plain_torch(), progress_bar(progress) as bar:
        read = read_texts(batches, model, tokenizer, name="batches")
        return calibrate_on(model, list(batches_of(read, base_model(model), name="batches")), plant_repeats, bar)


def calibrate_on(
    model: nn.Module, batches: list[ModelInput], plant_repeats: bool, progress: Progress
) -> CalibrationReport:
    """`calibrate` on batches that were checked, under `plain_torch`."""
    config, base = conversion_config(model), base_model(model)
    adapters = [adapter for _, _, adapter in named_adapters(base)]
    converted = [adapter for adapter in adapters if adapter.converted]
    total = sum(count(batch) for batch in batches)
    # Tokens of forwards: one; another one and a backward, of two; and those that are measured.
    progress.stage("calibrating: statistics", 4 * total + 2 * min(total, MEASURED_TOKENS))
    fitted = _fit(base, adapters, list(texts_of(base, batches, plant_repeats)), progress)
    set_softmax_heads(model, [])
    fits = {layer: fit.choose(fitted.scale) for layer, fit in fitted.layers.items()}
    costs = {(layer, head): fit.cost for layer, rows in fits.items() for head, fit in enumerate(rows)}
    measurement = Measurement(base, fitted.measured, progress)
    choice = choose_heads(base, config, costs, measurement, progress)
    config = conversion_config(model)
    progress.stage("calibrating: measuring")
    silenced, after, window = _hold_to_window(measurement, converted, fits)
    heads = [
        HeadCalibration(layer, head, softmax=(layer, head) in choice.exact, **_fields(fit, layer in silenced))
        for layer, rows in fits.items()
        for head, fit in enumerate(rows)
    ]
    seen = {"window": config.window, "sink_tokens": config.sink_tokens, "kept_keys": config.most_kept_keys}
    report = CalibrationReport(
        heads, fitted.tokens, after.unit, after.mean, window.mean, silenced, **seen, curve=choice.curve,
        budget=choice.budget, sold_out=choice.sold_out,
    )  # fmt: skip
    store_report(base, report)
    return report


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """The fit of each layer; what its sums over all tokens are divided by, to be costs; the tokens of all texts; the
    first texts with the original's outputs."""

    layers: dict[int, LayerFit]
    scale: float
    tokens: int
    measured: list[tuple[Text, Outputs]]


def _fit(base: PreTrainedModel, adapters: list[RFAAdapter], texts: list[Text], progress: Progress) -> _Fitted:
    """Both passes over the texts. The first `MOMENT_TOKENS` go forwards together, so that their moments are known
    before the first of them goes back; each of the others goes there and back."""
    sources = {adapter: CandidateSource(adapter) for adapter in adapters if adapter.converted}
    total = int(sum_over_processes(torch.tensor(sum(text.tokens for text in texts))))
    every = min(EVERY, max(1, total // TRIED_QUERIES), *(max(1, a.config.window) for a in sources))
    passes = LayerGradients(base, adapters)
    weight, unit, measured = 0.0, NATS, list[tuple[Text, Outputs]]()
    fits: dict[RFAAdapter, LayerFit] = {}

    def back(text: Text, outputs: Outputs) -> None:
        nonlocal weight, unit
        weight, unit = weight + outputs.weight(), outputs.unit
        if sum(other.tokens for other, _ in measured) < MEASURED_TOKENS:
            measured.append((text, outputs.detach()))
        for fit in fits.values():
            fit.planted = text.planted
        (gradient,) = outputs.gradients(text.seeds(len(outputs.tensor)), draws=1)
        passes.backward(outputs, gradient, fits)
        progress.done(3 * text.tokens)

    with passes.watching():
        waiting, held = list[tuple[Text, Outputs]](), 0
        while texts and (not waiting or held + texts[0].tokens <= MOMENT_TOKENS):
            text = texts.pop(0)
            held += text.tokens
            for source in sources.values():
                source.planted = text.planted
            waiting.append((text, passes.forward(text.inputs, sources)))
            progress.done(text.tokens)
        _merge(sources)
        fits.update({adapter: LayerFit(source, every) for adapter, source in sources.items()})
        progress.stage("calibrating: fitting")
        while waiting:
            back(*waiting.pop(0))
        for text in texts:
            back(text, passes.forward(text.inputs))
            progress.done(text.tokens)
    for fit in fits.values():
        fit.merge(sum_over_processes)
    weight = float(sum_over_processes(torch.tensor(weight, dtype=torch.float64)))
    return _Fitted({a.layer: fit for a, fit in fits.items()}, weight * (2 if unit == NATS else 1), total, measured)


def _merge(sources: Mapping[RFAAdapter, CandidateSource]) -> None:
    """Add the statistics of all processes."""
    for adapter, source in sources.items():
        _, behind, far = sum_over_processes(source.tokens).tolist()
        if not behind:
            raise ConfigError(
                f"`batches` must hold sequences longer than two windows ({2 * adapter.config.window} tokens), or "
                "nothing is far. Got none. Pass a few texts of 512 tokens or more."
            )
        if not far:
            logger.warning(
                "Layer %d keeps all keys of the calibration text that its window does not hold, so nothing is far and "
                "its far part is switched off: in longer texts it forgets. Calibrate on texts as long as the contexts "
                "to come, or keep fewer keys.", adapter.layer,
            )  # fmt: skip
        source.merge(sum_over_processes)


def _hold_to_window(
    measurement: Measurement, converted: list[RFAAdapter], fits: Mapping[int, list[HeadFit]]
) -> tuple[list[int], Divergence, Divergence]:
    """Switch off far parts until the model is no worse than with its window alone, those first that gained least.

    Returns the layers, and the divergences of the resulting model and of the window alone.
    """
    gammas = {adapter.layer: adapter.gamma.clone() for adapter in converted}

    def run(silent: list[int]) -> Divergence:
        for adapter in converted:
            gamma = gammas[adapter.layer] * (adapter.layer not in silent)
            adapter.set_kernel(adapter.feature_maps, gamma=gamma)
        return measurement()

    layers = [adapter.layer for adapter in converted]
    if converted[0].config.window == 0:
        fitted = run([])
        return [], fitted, dataclasses.replace(fitted, total=float("nan"))
    window, fitted = run(layers), run([])
    if fitted.mean <= window.mean:
        return [], fitted, window
    gains = {layer: sum(fit.window_cost - fit.cost for fit in fits[layer]) for layer in layers}
    order = sorted(layers, key=lambda layer: gains[layer])
    number = 1
    while number < len(order):
        now = run(order[:number])
        if now.mean <= window.mean:
            return sorted(order[:number]), now, window
        number *= 2
    return sorted(layers), run(layers), window


def _fields(fit: HeadFit, silent: bool) -> dict[str, Any]:
    """The fields of `HeadCalibration` that the fit decides."""
    fields = vars(fit)
    return {**fields, "gamma": 0.0, "cost": fit.window_cost} if silent else fields
