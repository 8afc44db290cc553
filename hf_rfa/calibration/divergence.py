"""The divergence of a converted model from its original, layer by layer, on a few texts; `calibrate` ranks by it.

KL divergences of small errors add up over layers and heads, so that one forward with a single layer converted gives
the cost of that layer in the converted model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_rfa.report import NATS, RELATIVE
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.calls import Interception, intercept


@dataclass
class Divergence:
    """Sums over tokens; `mean` is per token (`unit` nats/token) or relative to the squared norm of the output."""

    unit: str = NATS
    total: float = 0.0
    weight: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    def add(self, original: torch.Tensor, output: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> None:
        """Count one batch: logits (B, N, V) of both models, or another output of theirs; `unit` says which."""
        original, output = original.float(), output.float()
        mask = inputs.get("attention_mask")
        if self.unit == RELATIVE:
            kept = mask.bool() if mask is not None and mask.shape == output.shape[:2] else ...
            self.total += (output - original)[kept].double().square().sum().item()
            self.weight += original[kept].double().square().sum().item()
            return
        kept = torch.ones(output.shape[:2], dtype=torch.bool, device=output.device)
        if mask is not None and mask.shape == kept.shape:
            kept = mask.bool()
        log_p, log_q = original.log_softmax(-1), output.log_softmax(-1)
        self.total += (log_p.exp() * (log_p - log_q)).sum(-1)[kept].double().sum().item()
        self.weight += int(kept.sum())

    def merge(self, reduce: Any) -> None:
        """Add the sums of other processes: `reduce(tensor)` gives the sum over all of them."""
        self.total, self.weight = reduce(torch.tensor([self.total, self.weight], dtype=torch.float64)).tolist()


def measure(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], adapters: Sequence[RFAAdapter],
    settings: Mapping[Any, Sequence[int]], reduce: Any,
) -> dict[Any, Divergence]:  # fmt: skip
    """The divergence of each setting, {name: layers that run as converted}; all other layers are exact.

    The original is the same model with every layer exact. It takes one forward per setting and batch.
    """
    found: dict[Any, Divergence] = {}
    for batch in batches:
        with only(adapters, ()):
            original = model(**batch)
        unit = _unit(model, original)
        for name, layers in settings.items():
            with only(adapters, layers):
                output = model(**batch)
            found.setdefault(name, Divergence(unit)).add(_tensor(original, unit), _tensor(output, unit), batch)
    for divergence in found.values():
        divergence.merge(reduce)
    return found


@contextmanager
def only(adapters: Sequence[RFAAdapter], layers: Sequence[int]) -> Iterator[None]:
    """Within the block every layer but these is exact."""
    exact = {a: ignore for a in adapters if not (a.converted and a.layer in layers)}
    with intercept(Interception(observers=exact)):
        yield


def ignore(*args: Any) -> None:
    """Observer that does nothing: its layer is exact."""


def _unit(model: nn.Module, output: Any) -> str:
    logits = getattr(output, "logits", None)
    return NATS if isinstance(logits, torch.Tensor) and logits.dim() == 3 else RELATIVE


def _tensor(output: Any, unit: str) -> torch.Tensor:
    return output.logits if unit == NATS else output[0]
