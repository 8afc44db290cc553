"""A budget of cache bytes, spent where it lowers the divergence from the original most.

Every way to compute a head (so many kept keys, or exact softmax) has a cost in nats (`head_costs`) and a price in
bytes. Each head begins with its cheapest way; then the step that saves most nats per byte is bought, again and again,
each to the way to which a head saves most per byte: the lower convex hull of its nats against its bytes.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_rfa.config import HeadIndex, RFAConfig
from hf_rfa.report import CurveStep
from hf_rfa.runtime.adapter import RFAAdapter

#: The numbers of kept keys that a budget chooses from.
NUMBERS = (0, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Way:
    """A way to compute a head: `kept_keys` far keys, None for exact softmax; bytes, and nats that it costs."""

    kept_keys: int | None
    price: float
    cost: float


def total_bytes(config: RFAConfig, adapters: Sequence[RFAAdapter], element: int) -> float:
    """The budget of a config in bytes for one text, over the key heads of the converted layers.

    element: Bytes of a number of the model.
    """
    token = sum(adapter.key_heads * _token_bytes(adapter, element) for adapter in adapters)
    if isinstance(config.budget, str):
        return int(config.budget.split()[0]) * token
    assert config.budget is not None
    return config.budget * config.budget_context * token


def ways_of(
    config: RFAConfig, adapter: RFAAdapter, costs: Mapping[int, float], element: int, groups: int
) -> list[Way]:
    """The ways to compute a head of a layer, given its costs by number of kept keys; the exact one costs nothing.

    A budget in tokens is for any length, so that it has no exact heads. groups: Query heads per key head.
    """
    token, near = _token_bytes(adapter, element), 2 * config.window
    sums = adapter.kernel.num_components * (adapter.omega.shape[2] + 1) * 4

    def price(number: int) -> float:
        # Of each kept key its place and decay, of those and the near ones the attention from each query head.
        beside = 12 * number + 4 * groups * (number + near) if number else 0
        return (near + config.sink_tokens + number) * token + sums + beside

    ways = [Way(number, price(number), cost) for number, cost in costs.items()]
    if isinstance(config.budget, str):
        return ways
    return [*ways, Way(None, config.budget_context * token, 0.0)]


def spend(ways: Mapping[HeadIndex, Sequence[Way]], budget: float) -> tuple[dict[HeadIndex, Way], list[CurveStep]]:
    """The way of each head within the budget in bytes, and the curve: every step that was bought, cheapest first.

    The cheapest ways are taken even if they cost more than the budget.

    Example:
        >>> heads = {(0, 0): [Way(0, 10, 0.5), Way(64, 20, 0.1)], (0, 1): [Way(0, 10, 0.2), Way(None, 90, 0.0)]}
        >>> chosen, curve = spend(heads, 40)
        >>> chosen[0, 0].kept_keys, chosen[0, 1].kept_keys, [(step.bytes, step.nats) for step in curve]
        (64, 0, [(20, 0.7), (30, 0.3)])
    """
    chosen = {head: min(of_head, key=lambda way: way.price) for head, of_head in ways.items()}
    price, cost = sum(way.price for way in chosen.values()), sum(way.cost for way in chosen.values())
    curve = [CurveStep(price, round(cost, 9), None, None, None)]

    def best(head: HeadIndex) -> tuple[float, HeadIndex, Way] | None:
        now = chosen[head]
        steps = [
            ((way.cost - now.cost) / (way.price - now.price), head, way)
            for way in ways[head] if way.price > now.price and way.cost < now.cost
        ]  # fmt: skip
        return min(steps, key=lambda step: step[0], default=None)

    queue = [(step[0], step[1]) for head in ways if (step := best(head)) is not None]
    heapq.heapify(queue)
    while queue:
        _, head = heapq.heappop(queue)
        step = best(head)
        if step is None:
            continue
        way, now = step[2], chosen[head]
        if price + way.price - now.price > budget:
            continue
        chosen[head], price, cost = way, price + way.price - now.price, cost + way.cost - now.cost
        curve.append(CurveStep(price, round(cost, 9), *head, way.kept_keys))
        if (further := best(head)) is not None:
            heapq.heappush(queue, (further[0], head))
    return chosen, curve


def _token_bytes(adapter: RFAAdapter, element: int) -> float:
    """Bytes of a token's key and value in one key head; values are taken to be as long as keys."""
    return 2 * adapter.omega.shape[2] * element
