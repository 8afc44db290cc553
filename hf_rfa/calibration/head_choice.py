"""Which key heads stay exact and how many far keys the others keep: what a config leaves to calibration.

    budget = 0.25                                  both, as far along the curve as the bytes go
    softmax_heads = "auto"                         exact heads, up to `loss_budget`
    kept_keys = "auto"                             kept keys, up to `loss_budget`; both, if both are "auto"
    softmax_heads = a fraction                     the costliest heads

The curve, and the walk along it, are those of `budget`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from hf_rfa.budget_curve import CurveStep
from hf_rfa.calibration.budget import NUMBERS, Way, exact_way, linear_way, numbers_for, sold_out, spend, total_bytes
from hf_rfa.calibration.head_costs import HeadOption, costs_on
from hf_rfa.calibration.loss_walk import walk_to_loss
from hf_rfa.calibration.measuring import Measurement
from hf_rfa.calibration.processes import greatest_over_processes
from hf_rfa.calibration.progress import Progress
from hf_rfa.calibration.texts import Text
from hf_rfa.config import HeadIndex, RFAConfig
from hf_rfa.errors import UnsupportedModelError
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.set_kept_keys import set_kept_keys
from hf_rfa.runtime.softmax_heads import set_softmax_heads

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
    base: PreTrainedModel, config: RFAConfig, costs: Mapping[HeadIndex, float], measurement: Measurement,
    progress: Progress,
) -> HeadChoice:  # fmt: skip
    """Set the exact heads, and the kept keys of the others if they are to be chosen.

    Args:
        costs: Nats/token of each head as it was fitted.
        measurement: Its texts tell numbers of kept keys apart; itself, how far to go for a loss.

    Raises:
        UnsupportedModelError: `softmax_heads` names heads that do not exist.
    """
    if config.budget is None and config.softmax_heads != "auto" and not _numbers_open(config):
        return HeadChoice(_take(base, config, dict.fromkeys(_fixed(config, costs))))
    ways = _ways(base, config, costs, measurement.texts, progress)
    if config.budget is None:
        return _walk_to_loss(base, config, ways, measurement, progress)
    budget = total_bytes(config, _converted(base), base.dtype.itemsize)
    chosen, curve = spend(ways, budget)
    choice = HeadChoice(_take(base, config, _numbers(chosen)), curve, budget, sold_out(ways, chosen))
    _warn_unless_spent(choice, config, _longest(measurement.texts))
    return choice


def _longest(texts: Sequence[Text]) -> int:
    """Tokens of the longest text of all processes."""
    return greatest_over_processes(max(text.length for text in texts))


def _numbers_open(config: RFAConfig) -> bool:
    """Whether calibration decides how many keys the heads keep."""
    return config.budget is not None or config.kept_keys == "auto"


def _converted(base: PreTrainedModel) -> list[RFAAdapter]:
    return [adapter for _, _, adapter in named_adapters(base) if adapter.converted]


def _ways(
    base: PreTrainedModel, config: RFAConfig, costs: Mapping[HeadIndex, float], texts: Sequence[Text],
    progress: Progress,
) -> dict[HeadIndex, list[Way]]:  # fmt: skip
    """All ways to compute each head that there are to choose from."""
    by_bytes = config.budget is not None
    may_be_exact = not isinstance(config.budget, str) if by_bytes else config.softmax_heads == "auto"
    fixed = set[HeadIndex]() if by_bytes or may_be_exact else _fixed(config, costs)
    by_number = _costs_by_number(base, texts, progress) if _numbers_open(config) else None
    adapters = {adapter.layer: adapter for adapter in _converted(base)}
    element, heads = base.dtype.itemsize, getattr(base.config.get_text_config(), "num_attention_heads", 1)

    def ways_of(head: HeadIndex) -> list[Way]:
        adapter = adapters[head[0]]
        exact = exact_way(config, adapter, element)
        if head in fixed:
            return [exact]
        if by_number is not None:
            own = {number: found[head] for number, found in by_number.items()}
        else:
            kept = adapter.kept_keys
            own = {kept if isinstance(kept, int) else kept[head[1]]: costs[head]}
        groups = max(1, heads // adapter.key_heads)
        linear = [linear_way(config, adapter, number, cost, element, groups) for number, cost in own.items()]
        return [*linear, exact] if may_be_exact else linear

    return {head: ways_of(head) for head in costs}


def _costs_by_number(
    base: PreTrainedModel, texts: Sequence[Text], progress: Progress
) -> dict[int, dict[HeadIndex, float]]:
    """What each head costs with each number of kept keys that there is to choose from."""
    work = 4 * sum(text.tokens for text in texts)
    progress.stage("calibrating: the budget", work)
    # The same numbers in all processes, whose costs are added.
    options = {number: HeadOption(kept_keys=number) for number in numbers_for(_longest(texts))}
    found = costs_on(base, texts, options, draws=1)
    progress.done(work)
    return found


def _numbers(chosen: Mapping[HeadIndex, Way]) -> dict[HeadIndex, int | None]:
    return {head: way.kept_keys for head, way in chosen.items()}


def _take(base: PreTrainedModel, config: RFAConfig, numbers: Mapping[HeadIndex, int | None]) -> set[HeadIndex]:
    """Set how many keys each head keeps, if that was to be chosen; None is an exact head. Returns the exact heads."""
    if _numbers_open(config):
        kept = {head: number for head, number in numbers.items() if number is not None}
        set_kept_keys(base, config.usual_kept_keys, kept)
    exact = {head for head, number in numbers.items() if number is None}
    set_softmax_heads(base, sorted(exact))
    return exact


def _walk_to_loss(
    base: PreTrainedModel, config: RFAConfig, ways: Mapping[HeadIndex, Sequence[Way]], measurement: Measurement,
    progress: Progress,
) -> HeadChoice:  # fmt: skip
    """`choose_heads` for a loss: as far along the curve as the model's divergence, measured, asks for."""
    most_exact = max(1, round(AUTO_SHARE * len(ways)))
    _, whole = spend(ways, most_exact=most_exact)

    def take(steps: int) -> set[HeadIndex]:
        return _take(base, config, _numbers(spend(ways, most_exact=most_exact, steps=steps)[0]))

    def divergence(steps: int) -> float:
        progress.stage("calibrating: the loss", sum(text.tokens for text in measurement.texts))
        take(steps)
        return measurement().mean

    steps, found = walk_to_loss(whole, config.loss_budget, divergence)
    if found > config.loss_budget:
        logger.warning(
            "loss_budget=%g is exceeded: the model diverges by %.4g with all that there is to buy, of which at most a "
            "quarter of the heads exact. Accept a larger loss, or set `budget` instead, which has no such limit.",
            config.loss_budget, found,
        )  # fmt: skip
    return HeadChoice(take(steps), whole[: steps + 1])


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
