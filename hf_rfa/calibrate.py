"""`calibrate`: fit the far kernel of every key head to the original's own q, k, v, and rank the heads.

Two passes over a few texts, no gradients: the first takes the mean query and key of each key head (what the far kernel
takes off them), the second tries each candidate (alpha, gamma). While they run every layer answers with exact softmax,
so that each sees what it sees in the original model. The error of a key head is measured behind the output projection,
relative to what the whole layer gives:

    loss(layer, head) = sum_tokens |W_head (out_rfa - out_softmax)|^2 / sum_tokens |W out_softmax|^2
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hf_rfa.adapter import RFAAdapter, named_adapters
from hf_rfa.convert import base_model, conversion_config, set_softmax_heads
from hf_rfa.dry_run import quiet_eval
from hf_rfa.errors import ConfigError, UnsupportedModelError
from hf_rfa.feature_maps import optimal_proposal
from hf_rfa.head_errors import Moments, grams_of_heads, output_projection, squared_errors
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.parts import attention_parts

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
GAMMAS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)
#: `softmax_heads="auto"` keeps heads that would lose more than this share of their layer's output ...
AUTO_LOSS = 0.03
#: ... but never more than this share of all key heads.
AUTO_SHARE = 0.25

Batch = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class HeadCalibration:
    """What one key head became. Losses are shares of the squared norm of its layer's output."""

    layer: int
    key_head: int
    alpha: float
    gamma: float
    loss: float
    window_loss: float
    softmax: bool


@dataclass(frozen=True)
class CalibrationReport:
    """The result of `calibrate`; `str()` is a table, worst heads first."""

    heads: list[HeadCalibration]
    tokens: int

    @property
    def ranking(self) -> list[tuple[int, int, float]]:
        """(layer, key_head, loss), worst first: the order in which heads should stay exact."""
        return [(h.layer, h.key_head, h.loss) for h in sorted(self.heads, key=lambda h: -h.loss)]

    @property
    def softmax_heads(self) -> list[tuple[int, int]]:
        """The (layer, key_head) pairs that stay exact softmax."""
        return sorted((h.layer, h.key_head) for h in self.heads if h.softmax)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {"tokens": self.tokens, "heads": [asdict(head) for head in self.heads]}

    def __str__(self) -> str:
        lines = [f"calibrated on {self.tokens} tokens; loss = share of the layer's squared output", ""]
        lines += ["layer  key head  alpha  gamma      loss  window only  kept as"]
        for h in sorted(self.heads, key=lambda h: -h.loss):
            kind = "softmax" if h.softmax else "linear"
            lines.append(
                f"{h.layer:5d}  {h.key_head:8d}  {h.alpha:5.2f}  {h.gamma:5.2f}  {h.loss:8.5f}  "
                f"{h.window_loss:11.5f}  {kind}"
            )
        return "\n".join(lines)


def calibrate(model: nn.Module, batches: Iterable[Batch] | Batch, *, plant_repeats: bool = True) -> CalibrationReport:
    """Choose alpha and gamma of every key head of a converted model by a grid, rank the heads, pick the exact ones.

    Args:
        model: A converted model; its adapters are changed.
        batches: A few thousand tokens of the kind of text that the model is for: token ids (batch, seq) int64, or
            keyword arguments of the model. Longer than two windows, or nothing is far.
        plant_repeats: Repeat an early span of each row of plain token ids at its end, so that heads that look up
            single tokens show themselves.

    Returns:
        What each head became and what it loses; `softmax_heads="auto"` or a fraction of the config is resolved.

    Raises:
        ConfigError: No batch, or no token that is far from another.
        UnsupportedModelError: The model is not converted.

    Example:
        >>> import torch, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = LlamaForCausalLM(LlamaConfig(**size))
        >>> model = hf_rfa.convert(model, hf_rfa.RFAConfig(window=16, softmax_heads=0.25))
        >>> report = hf_rfa.calibrate(model, torch.randint(64, (2, 256)))
        >>> len(report.heads), len(report.softmax_heads)
        (4, 1)
    """
    config = conversion_config(model)
    batches = [batches] if isinstance(batches, (torch.Tensor, Mapping)) else list(batches)
    if not batches:
        raise ConfigError("`batches` must hold at least one batch. Got none. Pass a few thousand tokens.")
    adapters = [adapter for _, _, adapter in named_adapters(model) if adapter.converted]
    moments = {adapter.layer: Moments() for adapter in adapters}
    _observe(model, batches, plant_repeats, moments)
    observers = {adapter.layer: _Observer(adapter, moments[adapter.layer]) for adapter in adapters}
    _observe(model, batches, plant_repeats, observers)
    if not all(observer.far_tokens for observer in observers.values()):
        raise ConfigError(
            f"`batches` must hold sequences longer than two windows ({2 * config.window} tokens), or nothing is far. "
            "Got none. Pass a few texts of 512 tokens or more."
        )
    results = {layer: observer.choose() for layer, observer in observers.items()}
    losses = {(layer, head): row["loss"] for layer, rows in results.items() for head, row in enumerate(rows)}
    kept = set(_kept_heads(config.softmax_heads, losses))
    set_softmax_heads(model, sorted(kept))
    heads = [
        HeadCalibration(layer, head, softmax=(layer, head) in kept, **row)
        for layer, rows in results.items()
        for head, row in enumerate(rows)
    ]
    return CalibrationReport(heads, next(iter(observers.values())).tokens)


def _observe(model: nn.Module, batches: list[Batch], plant_repeats: bool, observers: Mapping[int, Any]) -> None:
    """Run the batches through the model, every head exact, with an observer at each converted layer."""
    device = next(model.parameters()).device
    base = base_model(model)
    everything = [adapter for _, _, adapter in named_adapters(model)]
    for adapter in everything:
        adapter.observer = observers[adapter.layer] if adapter.converted else _ignore
    try:
        with quiet_eval(model):
            for batch in batches:
                if isinstance(batch, torch.Tensor):
                    span = batch.shape[1] // 8 if plant_repeats else 0
                    for observer in observers.values():
                        observer.planted = span
                    ids = _plant(batch, span) if span else batch
                    base(input_ids=ids.to(device), **({"use_cache": False} if base.can_generate() else {}))
                else:
                    base(**{name: value.to(device) for name, value in batch.items()})
    finally:
        for adapter in everything:
            adapter.observer = None


def _plant(ids: torch.Tensor, span: int) -> torch.Tensor:
    """The rows with `span` tokens of their first half once more at their end."""
    start = ids.shape[1] // 4
    return torch.cat([ids[:, :-span], ids[:, start : start + span]], dim=1)


def _ignore(*args: Any) -> None:
    """Observer of layers that stay softmax: nothing to fit."""


class _Observer:
    """Accumulates, for one layer, the error of every candidate on every key head, in float64.

    The kernel is fitted on the text as it came; the planted repeats at its end only count for what a head loses:
    fitted on them too, heads that look things up would take a far average that harms them everywhere else.
    """

    def __init__(self, adapter: RFAAdapter, moments: Moments) -> None:
        self.adapter, self.moments = adapter, moments
        self.pure = adapter.config.window == 0
        # gamma cancels without a window, and a far part there must be.
        self.gammas = (1.0,) if self.pure else GAMMAS
        self.candidates = ([] if self.pure else [(0.0, 0.0)]) + list(itertools.product(ALPHAS, self.gammas))
        self.plain_errors = torch.zeros(len(self.candidates), adapter.key_heads, dtype=torch.float64)
        self.errors = torch.zeros_like(self.plain_errors)
        self.planted = 0  # tokens at the end of each row that repeat earlier ones
        self.energy = 0.0
        self.scaling = 1.0  # that of the layer, once it was seen
        self.tokens = self.far_tokens = 0

    def __call__(
        self, adapter: RFAAdapter, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        layout: TokenLayout, options: dict[str, Any], exact: torch.Tensor,
    ) -> None:  # fmt: skip
        heads, width = adapter.key_heads, exact.shape[1] // adapter.key_heads * exact.shape[3]
        self.tokens += query.shape[0] * query.shape[2]
        self.far_tokens += max(0, query.shape[2] - 2 * adapter.config.window)
        projection = output_projection(module, heads * width)
        grams = grams_of_heads(projection, heads, width, exact)
        joined = exact.float().transpose(1, 2).flatten(2)
        whole = joined if projection is None else joined @ projection.T
        self.energy += whole.double().square().sum().item()
        self.scaling = options["scaling"]
        target = exact.float().unflatten(1, (heads, -1))  # (B, Hk, G, N, M)
        row = 0 if self.pure else 1
        for alpha in ALPHAS:
            call = self._call(query, key, value, layout, options, alpha)
            near, far = attention_parts(call)
            squares = squared_errors(near, far, target, grams, self.gammas, call.sink_logits)
            if not self.pure and alpha == ALPHAS[0]:
                self._add(0, squares[:1])
            self._add(row, squares if self.pure else squares[1:])
            row += len(self.gammas)

    def _call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: TokenLayout,
        options: dict[str, Any], alpha: float,
    ) -> OperatorCall:  # fmt: skip
        adapter, config = self.adapter, self.adapter.config
        return OperatorCall.check(
            query.float(), key.float(), value.float(), omega=adapter.omega, feature_map=config.feature_map,
            window=config.window, sink_tokens=config.sink_tokens, alpha=alpha, gamma=1.0, valid=None, document=None,
            proposal=self._proposal(alpha), scaling=options["scaling"], causal=options["causal"], layout=layout,
            sink_logits=options["sink_logits"], state=None, query_center=self.moments.query_mean,
            key_center=self.moments.key_mean,
        )  # fmt: skip

    def _proposal(self, alpha: float) -> torch.Tensor:
        """A (key_heads,) of the optimal positive features for queries and keys times alpha."""
        spread = self.moments.spread * self.scaling * alpha**2  # E|q'+k'|^2: centred, they are uncorrelated
        return optimal_proposal(spread, self.adapter.omega.shape[-1]).float()

    def _add(self, row: int, squares: torch.Tensor) -> None:
        """Add squared errors (candidates, B, Hk, N) from candidate number `row` on."""
        rows = slice(row, row + len(squares))
        self.errors[rows] += squares.sum((1, 3)).cpu()
        self.plain_errors[rows] += squares[..., : squares.shape[3] - self.planted].sum((1, 3)).cpu()

    def choose(self) -> list[dict[str, float]]:
        """Set the adapter to each key head's best candidate; returns it with its loss and the window's alone."""
        self.adapter.query_center = self.moments.query_mean.float()
        self.adapter.key_center = self.moments.key_mean.float()
        losses = self.errors / self.energy
        best = self.plain_errors.argmin(0)
        rows = []
        for head, index in enumerate(best.tolist()):
            alpha, gamma = self.candidates[index]
            self.adapter.alpha[head], self.adapter.gamma[head] = alpha, gamma
            self.adapter.proposal[head] = self._proposal(alpha)[head]
            window = float("nan") if self.pure else losses[0, head].item()
            rows.append({"alpha": alpha, "gamma": gamma, "loss": losses[index, head].item(), "window_loss": window})
        return rows


def _kept_heads(setting: Any, losses: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
    order = sorted(losses, key=lambda pair: -losses[pair])
    if setting is None:
        return []
    if setting == "auto":
        most = max(1, int(AUTO_SHARE * len(order)))
        return [pair for pair in order[:most] if losses[pair] > AUTO_LOSS]
    if isinstance(setting, float):
        return order[: round(setting * len(order))]
    unknown = [pair for pair in setting if pair not in losses]
    if unknown:
        raise UnsupportedModelError(
            f"`softmax_heads` names key heads that do not exist: {unknown}. Correct the config."
        )
    return list(setting)
