"""One normaliser for the exact near part and the estimated far part.

Both parts estimate sums of `exp(q'.k')`, so they add up in the same units. Each is given as (numerator, denominator,
log_scale): the true sums are `exp(log_scale)` times the first two. The far log-scale includes the query's factor.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Part:
    """numerator (..., M), denominator (...), log_scale (...), -inf where the part has no keys or no weight."""

    numerator: torch.Tensor
    denominator: torch.Tensor
    log_scale: torch.Tensor


@dataclass
class FarStatistics:
    """How often the estimate of the far sum was not positive, so that the far part was dropped."""

    # Tensors from the start: compiled code would be recompiled when an int became one.
    dropped: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    queries: torch.Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))

    def add(self, dropped: torch.Tensor, queries: torch.Tensor) -> None:
        """Count the queries whose far part was dropped and those that had far keys, both given as bool tensors."""
        # Kept as tensors: reading them here would make a GPU wait in every layer.
        self.dropped = self.dropped + dropped.sum()
        self.queries = self.queries + queries.sum()

    def counts(self) -> torch.Tensor:
        """(2,) int64: dropped, queries."""
        return torch.stack([self.dropped, self.queries])

    def add_counts(self, counts: torch.Tensor) -> None:
        """Add the `counts` of another object."""
        self.dropped = self.dropped + counts[0]
        self.queries = self.queries + counts[1]

    @property
    def dropped_fraction(self) -> float:
        """Share of the (query, head) pairs with far keys whose far part was dropped; 0 if there were none."""
        queries = int(self.queries)
        return int(self.dropped) / queries if queries else 0.0


def smallest_denominator(dtype: torch.dtype) -> float:
    """The least value that counts as positive: its reciprocal, times ordinary gradients, must not overflow."""
    return torch.finfo(dtype).tiny * 2**24


def far_excess(
    log_far: torch.Tensor, log_exact: torch.Tensor, sink_logits: torch.Tensor | None, log_limit: torch.Tensor
) -> torch.Tensor:
    """By how much the log-weight of the far part is more than its limit, see `FarKernel.far_limit`; never negative."""
    if sink_logits is not None:
        log_exact = torch.logaddexp(log_exact, sink_logits.expand_as(log_exact))
    return (log_far - (log_exact + log_limit)).clamp_min(0.0)


def near_part(scores: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None) -> Part:
    """Exact attention over a few keys: scaled scores (..., R, K), value (..., K, M), visible (..., R, K) bool or None.

    Every row must see at least one key; with `visible=None` it sees all.
    """
    return near_part_and_weights(scores, value, visible)[0]


def near_part_and_weights(
    scores: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
) -> tuple[Part, torch.Tensor]:
    """`near_part`, and its weights (..., R, K), of which its denominator is the sum."""
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    highest = scores.detach().amax(-1)
    weights = (scores - highest.unsqueeze(-1)).exp()
    return Part(weights @ value, weights.sum(-1), highest), weights


def combine(
    near: Part | None,
    far: Part | None,
    sink_logits: torch.Tensor | None = None,
    statistics: FarStatistics | None = None,
    counted: torch.Tensor | None = None,
    log_limit: torch.Tensor | None = None,
) -> torch.Tensor:
    """out (..., M) = (near + far) / (near + far + exp(sink logit)), in one stabilised division.

    If the far denominator is not positive (possible with the trigonometric estimate), the far part is dropped and the
    near part alone answers. Without a near part (`window = 0`) the output is then zero: the layer adds nothing.

    Args:
        near, far: The two parts; one may be None.
        sink_logits: Broadcast against the denominators: a learned logit that takes weight and contributes no value.
        statistics: Counts the dropped far parts.
        counted: bool, broadcast against far.denominator: True for tokens, False for padding.
        log_limit: Broadcast against the denominators: log of `FarKernel.far_limit`, inf for none.
    """
    parts: list[Part] = []
    total: torch.Tensor | None = None  # a log-weight that no part exceeds by much
    if near is not None:
        parts, total = [near], near.log_scale
    if far is not None:
        mass = far.denominator.detach()  # zero where there are no far keys
        unused = ~(mass > smallest_denominator(mass.dtype))
        if statistics is not None:
            seen = far.log_scale.detach() > -torch.inf
            seen = seen if counted is None else seen & counted
            statistics.add(seen & unused, seen)
        scale = far.log_scale.masked_fill(unused, -torch.inf)
        weight = scale.detach() + mass.masked_fill(unused, 1.0).log()
        if log_limit is not None and near is not None:
            exact = near.log_scale.detach() + near.denominator.detach().log()
            above = far_excess(weight, exact, None if sink_logits is None else sink_logits.detach(), log_limit)
            scale, weight = scale - above, weight - above
        parts.append(Part(far.numerator, far.denominator, scale))
        total = weight if total is None else torch.maximum(total, weight)
    assert total is not None
    if sink_logits is not None:
        total = torch.maximum(total, sink_logits.detach().expand_as(total))
    if near is None:  # rows without any weight have -inf: a finite number keeps the subtractions below defined
        total = total.masked_fill(total == -torch.inf, 0.0)
    weights = [(part.log_scale - total).exp() for part in parts]
    numerator, denominator = weights[0].unsqueeze(-1) * parts[0].numerator, weights[0] * parts[0].denominator
    if len(parts) == 2:
        numerator = torch.addcmul(numerator, weights[1].unsqueeze(-1), parts[1].numerator)
        denominator = torch.addcmul(denominator, weights[1], parts[1].denominator)
    if sink_logits is not None:
        denominator = denominator + (sink_logits - total).exp()
    if near is not None:  # sees a key
        return numerator / denominator.unsqueeze(-1)
    answered = denominator > 0
    return torch.where(
        answered.unsqueeze(-1),
        numerator / torch.where(answered, denominator, torch.ones_like(denominator)).unsqueeze(-1),
        0.0,
    )
