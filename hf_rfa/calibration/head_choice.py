"""Which key heads stay exact and how many far keys the others keep: what a config leaves to calibration.

    budget = 0.25                                  both, as far along the curve as the bytes go
    softmax_heads = "auto"                         exact heads, up to `loss_budget`
    kept_keys = "auto"                             kept keys, up to `loss_budget`; both, if both are "auto"
    softmax_heads = a fraction                     the costliest heads

The curve, and the walk along it, are those of `budget`.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from hf_rfa.budget_curve import CurveStep
from hf_rfa.calibration.budget import NUMBERS, Way, exact_way, linear_way, numbers_for, sold_out, spend, total_bytes
from hf_rfa.calibration.head_costs import HeadOption, costs_on
from hf_rfa.calibration.processes import greatest_over_processes
from hf_rfa.calibration.progress import Progress
from hf_rfa.calibration.texts import Text
from hf_rfa.config import HeadIndex, RFAConfig
from hf_rfa.errors import UnsupportedModelError
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.set_kept_keys import set_kept_keys

logger = logging.getLogger(__name__)

#: `softmax_heads="auto"` makes at most this share of all key heads exact.
AUTO_SHARE = 0.25


@dataclass(frozen=True)
class HeadChoice:
    """What was chosen.

    Attributes:
        exact: The exact heads.
        curve: What led to them; empty where the config left nothing to choose.
        budget: The bytes that there were to spend, None without a budget.
        sold_out: Whether they buy nothing more.
    """

    exact: set[HeadIndex]
    curve: list[CurveStep] = field(default_factory=list)
    budget: float | None = None
    sold_out: bool = False


def choose_heads(
    base: PreTrainedModel, config: RFAConfig, costs: Mapping[HeadIndex, float], texts: list[Text], progress: Progress
) -> HeadChoice:
    """Choose the exact heads; sets the kept keys of the others if they are to be chosen.

    Args:
        costs: Nats/token of each head as it was fitted.
        texts: What is measured to tell numbers of kept keys apart.

    Raises:
        UnsupportedModelError: `softmax_heads` names heads that do not exist.
    """
    by_bytes = config.budget is not None
    may_be_exact = not isinstance(config.budget, str) if by_bytes else config.softmax_heads == "auto"
    numbers_open = by_bytes or config.kept_keys == "auto"
    fixed = set[HeadIndex]() if by_bytes or may_be_exact else _fixed(config, costs)
    if not may_be_exact and not numbers_open:
        return HeadChoice(fixed)
    if numbers_open:
        progress.stage("calibrating: the budget", 4 * sum(text.tokens for text in texts))
        # The same numbers in all processes, whose costs are added.
        longest = greatest_over_processes(max(text.length for text in texts))
        options = {number: HeadOption(kept_keys=number) for number in numbers_for(longest)}
        by_number = costs_on(base, texts, options, draws=1)
        progress.done(4 * sum(text.tokens for text in texts))
    adapters = {adapter.layer: adapter for _, _, adapter in named_adapters(base) if adapter.converted}
    element, heads = base.dtype.itemsize, getattr(base.config.get_text_config(), "num_attention_heads", 1)

    def ways_of(head: HeadIndex) -> list[Way]:
        adapter = adapters[head[0]]
        exact = exact_way(config, adapter, element)
        if head in fixed:
            return [exact]
        if numbers_open:
            own = {number: by_number[number][head] for number in options}
        else:
            kept = adapter.kept_keys
            own = {kept if isinstance(kept, int) else kept[head[1]]: costs[head]}
        groups = max(1, heads // adapter.key_heads)
        linear = [linear_way(config, adapter, number, cost, element, groups) for number, cost in own.items()]
        return [*linear, exact] if may_be_exact else linear

    ways = {head: ways_of(head) for head in costs}
    budget = total_bytes(config, list(adapters.values()), element) if by_bytes else None
    if budget is not None:
        chosen, curve = spend(ways, budget)
    else:
        chosen, curve = spend(ways, loss=config.loss_budget, most_exact=max(1, round(AUTO_SHARE * len(costs))))
    numbers = {head: way.kept_keys for head, way in chosen.items() if way.kept_keys is not None}
    if numbers_open:
        set_kept_keys(base, config.usual_kept_keys, numbers)
    choice = HeadChoice(set(chosen) - set(numbers), curve, budget, budget is not None and sold_out(ways, chosen))
    if by_bytes:
        _warn_unless_spent(choice, config, longest)
    return choice


def _warn_unless_spent(choice: HeadChoice, config: RFAConfig, longest: int) -> None:
    """Say so if a budget is less than the least that there is, or more than there is to buy.

    longest: Tokens of the longest text.
    """
    assert choice.budget is not None
    spent, given = choice.curve[-1].bytes, f"budget={config.budget!r}, {choice.budget / 2**20:.3f} MiB of cache"
    if spent > choice.budget:
        logger.warning(
            "The heads take at least %.3f MiB of cache, more than the %s. Raise it, or lower `window` or "
            "`num_features`.", spent / 2**20, given,
        )  # fmt: skip
    elif choice.sold_out and spent < choice.budget:
        most = numbers_for(longest)[-1]
        longer = "Calibrate on longer texts, best as long as the contexts to come, or lower the budget."
        logger.warning(
            "Of the %s, only %.3f MiB are spent: nothing else lowers the cost on the calibration text, whose %d "
            "tokens offer a head up to %d kept keys. %s",
            given, spent / 2**20, longest, most, longer if most < NUMBERS[-1] else "Lower the budget.",
        )  # fmt: skip


def _fixed(config: RFAConfig, costs: Mapping[HeadIndex, float]) -> set[HeadIndex]:
    """The exact heads that need no curve: those that the config lists, or a share of all, the costliest."""
    setting = config.softmax_heads
    if setting is None:
        return set()
    if isinstance(setting, (int, float)):
        return set(sorted(costs, key=lambda head: -costs[head])[: round(setting * len(costs))])
    assert not isinstance(setting, str)
    unknown = [head for head in setting if head not in costs]
    if unknown:
        raise UnsupportedModelError(
            f"`softmax_heads` names key heads that do not exist: {unknown}. Correct the config."
        )
    return set(setting)
