"""The divergence of a converted model from its original, in blocks of tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_rfa.calibration.outputs import Outputs
from hf_rfa.report import NATS, RELATIVE


@dataclass
class Divergence:
    """Sums over tokens; `mean` is per token (`unit` nats/token) or relative to the squared norm of the output."""

    unit: str = NATS
    total: float = 0.0
    weight: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    @torch.no_grad()
    def add(self, original: Outputs, output: Outputs) -> None:
        """Count one batch: what both models gave out for it."""
        self.unit = original.unit
        self.weight += original.weight()
        if self.unit == RELATIVE:
            change = output.tensor.float() - original.tensor.float()
            self.total += original.kept(change).double().square().sum().item()
            return
        for span in original.blocks():
            log_p, log_q = (each.logits(each.tensor[:, span]).float().log_softmax(-1) for each in (original, output))
            total = log_q.neg_().add_(log_p).mul_(log_p.exp_()).sum(-1).double()
            kept = total if original.mask is None else total[original.mask[:, span]]
            self.total += kept.sum().item()

    def merge(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Add the sums of other processes: `reduce(tensor)` gives the sum over all of them."""
        self.total, self.weight = reduce(torch.tensor([self.total, self.weight], dtype=torch.float64)).tolist()
