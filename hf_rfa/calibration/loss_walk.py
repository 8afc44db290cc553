"""How far to walk along the curve of nats against bytes for a loss that is measured.

The nats of the curve are estimates: they rank the heads, but their sum may be a third of the divergence that results
(docs/calibration.md). So the model is measured where the estimate meets the loss, then where it would meet it if it
were off everywhere by the factor just seen, and so on until one place is known to fail and one to meet; from there on
halfway between the two, since a divergence may fall at one step by what it falls at hundreds of others. If none has
met before the last measurement but one, that one is of everything bought.
"""

from collections.abc import Callable, Sequence

from hf_rfa.budget_curve import CurveStep

#: The search ends with a divergence of at least this share of the loss, and at most the loss; or where a place fails
#: and one with at most so many more bytes, as a share, meets; or after so many measurements.
NEAR, CLOSE, MEASUREMENTS = 0.8, 0.01, 7
#: Where the factor is used, it is the middle between NEAR and the loss that is aimed at.
AIM = 0.9


def walk_to_loss(curve: Sequence[CurveStep], loss: float, measure: Callable[[int], float]) -> tuple[int, float]:
    """How many steps of a curve to go so that the divergence is at most `loss`, and the divergence there.

    Args:
        curve: All steps that there are; the first one is the beginning.
        loss: In the unit of the curve, nats/token.
        measure: The divergence after so many steps. It falls along the curve, or nearly.

    Returns:
        The fewest steps that were seen to be enough; all, if not even those are.

    Example:
        >>> steps = [CurveStep(n, 1 / (n + 1), None, None, None) for n in range(100)]
        >>> walk_to_loss(steps, 0.1, measure=lambda n: 2 * steps[n].nats)
        (22, 0.08695652173913043)
    """
    last = len(curve) - 1
    fails, meets = -1, last + 1  # the most steps that were too few, the fewest that were enough
    seen = dict[int, float]()
    place = _first_below(curve, loss)
    for left in reversed(range(MEASUREMENTS)):
        found = seen[place] = measure(place)
        if found <= loss:
            meets = place
        else:
            fails = place
        if meets - fails <= 1 or (meets == place and found >= NEAR * loss):
            break
        if fails in seen and meets in seen:
            least, most = curve[fails].bytes, curve[meets].bytes
            if most - least <= CLOSE * most:
                break
            place = next(n for n in range(fails + 1, meets) if curve[n].bytes >= (least + most) / 2 or n == meets - 1)
        elif meets > last and left <= 2:
            place = last
        else:
            aim = AIM * loss * curve[place].nats / found if found > 0 else loss
            place = min(max(_first_below(curve, aim), fails + 1), meets - 1)
    end = meets if meets in seen else fails
    return end, seen[end]


def _first_below(curve: Sequence[CurveStep], nats: float) -> int:
    """The first place at which the estimate is at most that; the last place if there is none."""
    return next((place for place, step in enumerate(curve) if step.nats <= nats), len(curve) - 1)
