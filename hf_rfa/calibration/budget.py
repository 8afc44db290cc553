"""The curve of nats against bytes: one walk along it, which ends at a number of bytes or of steps.

Every way to compute a head (so many kept keys, or exact softmax) has a cost in nats (`head_costs`) and a price in
bytes. Each head begins with its cheapest way; then the step that saves most nats per byte is bought, again and again,
each to the way to which a head saves most per byte: the lower convex hull of its nats against its bytes. A budget says
how far to go in bytes; for `RFAConfig.loss_budget` the model is measured after some steps (`loss_walk`).
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_rfa.budget_curve import CurveStep
from hf_rfa.config import HeadIndex, RFAConfig
from hf_rfa.runtime.adapter import RFAAdapter

#: The numbers of kept keys that there are to choose from, as far as the text is long enough to tell (`numbers_for`).
NUMBERS = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Way:
    """A way to compute a head: `kept_keys` far keys, None for exact softmax; bytes, and nats that it costs."""

    kept_keys: int | None
    price: float
    cost: float


def numbers_for(tokens: int) -> tuple[int, ...]:
    """The numbers of kept keys whose costs a text of so many tokens shows: up to half of it.

    With more a head forgets next to nothing of this text, and would seem to cost nothing in longer ones either.

    Example:
        >>> numbers_for(1024)
        (0, 32, 64, 128, 256, 512)
    """
    return tuple(number for number in NUMBERS if 2 * number <= tokens)


def total_bytes(config: RFAConfig, adapters: Sequence[RFAAdapter], element: int) -> float:
    """The budget of a config in bytes for one text, over the key heads of the converted layers.

    element: Bytes of a number of the model.
    """
    token = sum(adapter.key_heads * _token_bytes(adapter, element) for adapter in adapters)
    if isinstance(config.budget, str):
        return int(config.budget.split()[0]) * token
    assert config.budget is not None
    return config.budget * config.budget_context * token


def linear_way(
    config: RFAConfig, adapter: RFAAdapter, number: int, cost: float, element: int, groups: int
) -> Way:  # fmt: skip
    """A head of a layer with so many kept keys. groups: Query heads per key head; cost: in nats."""
    token, near = _token_bytes(adapter, element), 2 * config.window
    sums = adapter.kernel.num_components * (adapter.omega.shape[2] + 1) * 4
    # Of each kept key its place and decay, of those and the near ones the attention from each query head.
    beside = 12 * number + 4 * groups * (number + near) if number else 0
    return Way(number, (near + config.sink_tokens + number) * token + sums + beside, cost)


def exact_way(config: RFAConfig, adapter: RFAAdapter, element: int) -> Way:
    """An exact head of a layer, which costs nothing: its bytes are those at `RFAConfig.budget_context` tokens."""
    return Way(None, config.budget_context * _token_bytes(adapter, element), 0.0)


def spend(
    ways: Mapping[HeadIndex, Sequence[Way]], budget: float = math.inf, *,
    most_exact: int | None = None, steps: int | None = None,
) -> tuple[dict[HeadIndex, Way], list[CurveStep]]:  # fmt: skip
    """The way of each head, and the curve: every step that was bought, best first.

    The walk ends where no step is left that saves anything, and none is bought with which the heads would take more
    than `budget` bytes. The cheapest ways are taken even if they cost more than the budget.

    Args:
        most_exact: How many heads may become exact; None: any number.
        steps: How many steps may be bought; None: any number.

    Example:
        >>> heads = {(0, 0): [Way(0, 10, 0.5), Way(64, 20, 0.1)], (0, 1): [Way(0, 10, 0.2), Way(None, 90, 0.0)]}
        >>> chosen, curve = spend(heads, 40)
        >>> chosen[0, 0].kept_keys, chosen[0, 1].kept_keys, [(step.bytes, step.nats) for step in curve]
        (64, 0, [(20, 0.7), (30, 0.3)])
        >>> [(step.bytes, step.nats) for step in spend(heads, steps=1)[1]]
        [(20, 0.7), (30, 0.3)]
    """
    left = math.inf if most_exact is None else most_exact
    chosen = {head: _first(of_head, by_bytes=most_exact is None) for head, of_head in ways.items()}
    price, cost = sum(way.price for way in chosen.values()), sum(way.cost for way in chosen.values())
    curve = [CurveStep(price, round(cost, 9), None, None, None)]

    def best(head: HeadIndex) -> tuple[float, HeadIndex, Way] | None:
        now = chosen[head]
        steps = [
            # Where the context is short an exact head may be the cheaper one: such a step is the best there is.
            ((way.cost - now.cost) / max(way.price - now.price, 1.0), head, way)
            for way in ways[head] if way.cost < now.cost and (left > 0 or way.kept_keys is not None)
        ]  # fmt: skip
        return min(steps, key=lambda step: step[0], default=None)

    queue = [(step[0], step[1]) for head in ways if (step := best(head)) is not None]
    heapq.heapify(queue)
    while queue and (steps is None or len(curve) <= steps):
        slope, head = heapq.heappop(queue)
        step = best(head)
        if step is None:
            continue
        if step[0] > slope:  # no further head may become exact, and what else there is saves less
            heapq.heappush(queue, step[:2])
            continue
        way, now = step[2], chosen[head]
        if price + way.price - now.price > budget:
            continue
        chosen[head], price, cost = way, price + way.price - now.price, cost + way.cost - now.cost
        left -= way.kept_keys is None
        curve.append(CurveStep(price, round(cost, 9), *head, way.kept_keys))
        if (further := best(head)) is not None:
            heapq.heappush(queue, further[:2])
    return chosen, curve


def sold_out(ways: Mapping[HeadIndex, Sequence[Way]], chosen: Mapping[HeadIndex, Way]) -> bool:
    """Whether no head has a way left that costs fewer nats than the chosen one, at any price.

    Example:
        >>> ways = {(0, 0): [Way(0, 10, 0.5), Way(64, 20, 0.1)]}
        >>> [sold_out(ways, spend(ways, budget)[0]) for budget in (15, 1000)]
        [False, True]
    """
    return all(way.cost >= chosen[head].cost for head in ways for way in ways[head])


def _first(ways: Sequence[Way], *, by_bytes: bool) -> Way:
    """Where a head begins: its cheapest way; where few may be exact, the cheapest that is not, if there is one."""
    linear = [way for way in ways if way.kept_keys is not None]
    return min(ways if by_bytes or not linear else linear, key=lambda way: way.price)


def _token_bytes(adapter: RFAAdapter, element: int) -> float:
    """Bytes of a token's key and value in one key head; values are taken to be as long as keys."""
    return 2 * adapter.omega.shape[2] * element
