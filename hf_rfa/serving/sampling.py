"""The next token of each row of a batch: greedy, or drawn with the row's own generator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How a request wants its tokens chosen.

    Attributes:
        temperature: Logits are divided by it; 0 is greedy.
        top_p: Tokens are drawn from the smallest set of the most probable ones with at least this probability.
        top_k: From as many of the most probable ones, and those as probable as the last of them, before `top_p`
            counts; None for all.
        seed: The same seed gives the same tokens; None for another one every time.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int | None = None

    @property
    def truncates(self) -> bool:
        """Whether only the most probable tokens are drawn."""
        return self.top_p < 1 or self.top_k is not None


class Sampler:
    """Chooses the tokens of one request: each costs one random number, so that the batch around it has no say."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        if self.draws:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, and not the most probable one taken."""
        return self.sampling.temperature > 0

    def draw(self) -> float:
        """A random number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int | None]:
    """A token for each row of logits (B, V); None where they are not finite, from which nothing can be chosen."""
    logits = logits.float()
    best, tokens = logits.max(dim=-1)
    for truncated in (False, True):  # apart, so that what others ask for does not change the order of a row's tokens
        drawn = [row for row, each in enumerate(samplers) if each.draws and each.sampling.truncates == truncated]
        if drawn:
            tokens[drawn] = _draw(logits[drawn], [samplers[row] for row in drawn], truncated)
    return [token if good else None for token, good in zip(tokens.tolist(), best.isfinite().tolist(), strict=True)]


def _draw(logits: torch.Tensor, samplers: Sequence[Sampler], truncated: bool) -> torch.Tensor:
    """The tokens (B,) at which the rows' random numbers fall into their cumulated probabilities.

    Where they are `truncated` tokens are in the order of their probability: of the first top_k, the first ones with
    top_p of their probability together count.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    # From the largest one on, so that none is infinite after a division by a tiny temperature.
    scaled = logits.double() - logits.double().amax(dim=-1, keepdim=True)
    scaled = scaled / column([sampler.sampling.temperature for sampler in samplers])
    order = None
    if truncated:
        scaled, order = scaled.sort(dim=-1, descending=True, stable=True)
        size = scaled.shape[1]
        last_kept = [min(each.sampling.top_k or size, size) - 1 for each in samplers]
        least = scaled.gather(1, torch.tensor(last_kept, device=scaled.device).unsqueeze(1))
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    share = scaled.softmax(dim=-1).cumsum(dim=-1)
    end = share.shape[1] - 1
    mass = share[:, -1:]
    if truncated:
        last = torch.searchsorted(share, column([sampler.sampling.top_p for sampler in samplers])).clamp(max=end)
        mass = share.gather(1, last)
    point = column([sampler.draw() for sampler in samplers]) * mass
    # `right`: a point on the border of two tokens belongs to the second, so that none of probability 0 is drawn.
    place = torch.searchsorted(share, point, right=True).clamp(max=end)
    return (place if order is None else order.gather(1, place)).squeeze(1)
