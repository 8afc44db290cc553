"""Nats that each key head costs, for any number of ways to compute it, from one forward and one backward pass.

    cost_h = 1/2 E_y[(g_h . delta_h)^2] summed over tokens / tokens ~ KL(original || the model with that head changed)

delta_h is what a way of computing head h changes of its exact output, y is drawn from the model's own next-token
distribution, g_h = d log p(y) / d (output of head h). Since delta is the layer's own business, every further way takes
an evaluation of the layer, not of the model. Source: the quadratic approximation of the KL divergence by the Fisher
information, per head.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from hf_rfa.calibration.layer_gradients import LayerGradients, LayerInputs
from hf_rfa.calibration.parts import linear_settings
from hf_rfa.calibration.processes import sum_over_processes
from hf_rfa.calibration.texts import Text, texts_of
from hf_rfa.config import HeadIndex
from hf_rfa.errors import ConfigError
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.attention import attend
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.report import NATS
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.record import base_model

_Name = TypeVar("_Name")


@dataclass(frozen=True)
class HeadOption:
    """A way to compute the heads of a layer; None: as the model was converted.

    Attributes:
        window, sink_tokens, kept_keys: See `RFAConfig`.
        far: Whether there is a far part.

    Example:
        >>> import hf_rfa
        >>> options = {number: hf_rfa.HeadOption(kept_keys=number) for number in (0, 64, 256)}
        >>> options["the window alone"] = hf_rfa.HeadOption(kept_keys=0, far=False)
        >>> len(options)
        4
    """

    window: int | None = None
    sink_tokens: int | None = None
    kept_keys: int | None = None
    far: bool = True

    def kernel(self, adapter: RFAAdapter) -> FarKernel:
        """The far kernel of a layer."""
        kernel = adapter.kernel
        return kernel if self.far else dataclasses.replace(kernel, gamma=torch.zeros_like(kernel.gamma))

    def settings(self, adapter: RFAAdapter, settings: AttentionSettings) -> AttentionSettings:
        """How the layer attends, made of the settings of its exact call."""
        changes = {name: getattr(self, name) for name in ("window", "sink_tokens", "kept_keys")}
        changes = {name: number for name, number in changes.items() if number is not None}
        return linear_settings(adapter, settings).replace(**changes)


def head_costs(
    model: PreTrainedModel, input_ids: torch.Tensor, options: Mapping[_Name, HeadOption], *, draws: int = 1,
    seed: int = 0,
) -> dict[_Name, dict[HeadIndex, float]]:  # fmt: skip
    """Nats/token that each key head of a converted language model costs by itself, for every option.

    All heads count, those that are exact now too. The costs of the heads that are changed together add up to about the
    divergence that they cause.

    Args:
        input_ids: (batch, seq) without padding.
        draws: Number of texts y that the expectation is taken over; each takes a forward and a backward pass.

    Raises:
        UnsupportedModelError: The model is not converted.
        ConfigError: `input_ids` has another shape, or there are no `options` or `draws`.

    Example:
        >>> import torch, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(
        ...     LlamaForCausalLM(LlamaConfig(**size)), hf_rfa.RFAConfig(window=16), calibrate=False
        ... )
        >>> options = {"window": hf_rfa.HeadOption(far=False), "all": hf_rfa.HeadOption(window=100)}
        >>> costs = hf_rfa.head_costs(model, torch.randint(64, (1, 200)), options)
        >>> sorted(costs["window"]) == [(0, 0), (0, 1), (1, 0), (1, 1)], max(costs["all"].values()) < 1e-9
        (True, True)
    """
    if input_ids.dim() != 2 or not options or draws < 1:
        raise ConfigError(
            "`head_costs` needs `input_ids` (batch, seq), at least one option and one draw. Got "
            f"{tuple(input_ids.shape)}, {len(options)} options and draws={draws}."
        )
    base = base_model(model)
    require_adapters(base)
    return costs_on(base, list(texts_of(base, [input_ids], plant_repeats=False)), options, draws=draws, seed=seed)


def costs_on(
    base: PreTrainedModel, texts: Sequence[Text], options: Mapping[_Name, HeadOption], *, draws: int, seed: int = 0
) -> dict[_Name, dict[HeadIndex, float]]:
    """`head_costs` on texts as the model gets them; the sums of all processes are added."""
    adapters = require_adapters(base)
    takes = {adapter: _Costs(dict(options)) for adapter in adapters if adapter.converted}
    passes, count = LayerGradients(base, adapters), 0.0
    with passes.watching():
        for text in texts:
            outputs = passes.forward(text.inputs)
            count += draws * outputs.weight() * (1 if outputs.unit == NATS else 0.5)
            seeds = [number + seed for number in text.seeds(len(outputs.tensor))]
            for draw, gradient in enumerate(outputs.gradients(seeds, draws)):
                passes.backward(outputs, gradient, takes, again=draw + 1 < draws)
    count = float(sum_over_processes(torch.tensor(count, dtype=torch.float64)))
    return {
        name: {
            (adapter.layer, head): cost / count
            for adapter, found in takes.items()
            for head, cost in enumerate(sum_over_processes(found.costs[name]).tolist())
        }
        for name in options
    }


@dataclass
class _Costs:
    """Adds up what the heads of one layer cost, each time its gradient comes."""

    options: dict[Any, HeadOption]
    costs: dict[Any, torch.Tensor] = field(default_factory=dict)

    def __call__(self, inputs: LayerInputs, gradient: torch.Tensor) -> None:
        adapter, output = inputs.adapter, inputs.exact_output()
        for name, option in self.options.items():
            own = option.settings(adapter, inputs.settings)
            changed, _ = attend(*inputs.wide(), option.kernel(adapter), own, inputs.layout)
            product = (gradient.float() * (changed - output)).sum(-1).unflatten(1, (adapter.key_heads, -1))
            cost = product.sum(2).square().sum((0, 2)) / 2
            self.costs[name] = self.costs.get(name, torch.zeros_like(cost)) + cost
