"""One normaliser for the exact near part and the estimated far part.

Both parts estimate sums of `exp(q'.k')`, so they add up in the same units. Each comes as (numerator, denominator,
log_scale), the true sums being `exp(log_scale)` times the first two; the far log-scale holds the query's own factor.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Part:
    """numerator (..., M), denominator (...), log_scale (...); log_scale = -inf where the part has no keys."""

    numerator: torch.Tensor
    denominator: torch.Tensor
    log_scale: torch.Tensor


@dataclass
class FarStatistics:
    """How often the estimate of the far sum was not positive, so that the far part was dropped."""

    # Tensors from the start: compiled code would be made anew where an int becomes one.
    dropped: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    queries: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def add(self, dropped: torch.Tensor, queries: torch.Tensor) -> None:
        """Count bool tensors of the queries whose far part was dropped, and of those that had far keys."""
        # Kept as tensors: reading them here would make a GPU wait in every layer.
        self.dropped = self.dropped + dropped.sum()
        self.queries = self.queries + queries.sum()

    def counts(self) -> torch.Tensor:
        """(2,) int64: dropped, queries."""
        return torch.stack([self.dropped, self.queries])

    def add_counts(self, counts: torch.Tensor) -> None:
        """Add the `counts` of another."""
        self.dropped = self.dropped + counts[0]
        self.queries = self.queries + counts[1]

    @property
    def dropped_fraction(self) -> float:
        """Share of the (query, head) pairs with far keys whose far part was dropped; 0 if there were none."""
        queries = int(self.queries)
        return int(self.dropped) / queries if queries else 0.0


def smallest_denominator(dtype: torch.dtype) -> float:
    """What still counts as positive: the reciprocal, times gradients of ordinary size, must not overflow."""
    return torch.finfo(dtype).tiny * 2**24


def near_part(scores: torch.Tensor, value: torch.Tensor, visible: torch.Tensor) -> Part:
    """Exact attention over a few keys: scores (..., R, K) scaled, value (..., K, M), visible (..., R, K) bool.

    Every row must see at least one key.
    """
    scores = scores.masked_fill(~visible, -torch.inf)
    peak = scores.detach().amax(-1)
    weights = (scores - peak.unsqueeze(-1)).exp()
    return Part(weights @ value, weights.sum(-1), peak)


def combine(
    near: Part | None,
    far: Part | None,
    far_alive: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    statistics: FarStatistics | None = None,
    counted: torch.Tensor | None = None,
) -> torch.Tensor:
    """out (..., M) = (near + far) / (near + far + exp(sink logit)), in one stabilised division.

    Where the far denominator is not positive (the trigonometric estimate can be) the far part is dropped and the near
    part alone answers. Where there is no near part either (`window = 0`), the output is zero: the layer adds nothing.

    Args:
        near, far: The two parts; one may be missing.
        far_alive: bool, broadcast against far.denominator: False for heads whose gamma is 0.
        sink_logits: broadcast against the denominators: a learned logit that takes weight and gives no value.
        statistics: Counts the dropped far parts.
        counted: bool, broadcast against far.denominator: which rows are tokens, not padding.
    """
    parts: list[tuple[Part, torch.Tensor]] = []  # each with its detached log-weight
    if near is not None:
        parts.append((near, near.log_scale))
    if far is not None:
        exists = far.log_scale.detach() > -torch.inf
        if far_alive is not None:
            exists = exists & far_alive
        used = exists & (far.denominator.detach() > smallest_denominator(far.denominator.dtype))
        if statistics is not None:
            seen = exists if counted is None else exists & counted
            statistics.add(seen & ~used, seen)
        scale = torch.where(used, far.log_scale, torch.full_like(far.log_scale, -torch.inf))
        mass = torch.where(used, far.denominator.detach(), torch.ones_like(far.denominator)).log()
        parts.append((Part(far.numerator, far.denominator, scale), scale.detach() + mass))
    total = parts[0][1] if len(parts) == 1 else torch.maximum(parts[0][1], parts[1][1])
    if sink_logits is not None:
        total = torch.maximum(total, sink_logits.detach().expand_as(total))
    # A row that nothing answers has total = -inf: any finite number keeps the subtractions below defined.
    total = torch.where(total > -torch.inf, total, torch.zeros_like(total))
    numerator: torch.Tensor | float = 0.0
    denominator: torch.Tensor | float = 0.0
    for part, _ in parts:
        weight = (part.log_scale - total).exp()
        numerator = numerator + weight.unsqueeze(-1) * part.numerator
        denominator = denominator + weight * part.denominator
    if sink_logits is not None:
        denominator = denominator + (sink_logits - total).exp()
    assert isinstance(denominator, torch.Tensor)
    answered = denominator > 0
    return torch.where(
        answered.unsqueeze(-1),
        numerator / torch.where(answered, denominator, torch.ones_like(denominator)).unsqueeze(-1),
        0.0,
    )
