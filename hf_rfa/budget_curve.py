"""The curve of nats against bytes that a choice of heads walks along: its steps, as a table and as a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CurveStep:
    """A step along the curve (`hf_rfa.calibration.budget`): what was bought, and where that led.

    Attributes:
        bytes: Of the cache of one text, all heads of the converted layers together.
        nats: What all heads cost together, nats/token.
        layer, key_head: The head for which more was bought; None at the beginning.
        kept_keys: How many far keys it keeps from then on; None: it is exact.
    """

    bytes: float
    nats: float
    layer: int | None
    key_head: int | None
    kept_keys: int | None


def every_step(curve: Sequence[CurveStep]) -> str:
    """Bytes and nats/token after each step, a line each."""
    lines = ["      bytes  nats/token  bought"]
    for step in curve:
        kept = "exact" if step.kept_keys is None else f"{step.kept_keys} kept keys"
        bought = "" if step.layer is None else f"head {step.layer}.{step.key_head}: {kept}"
        lines.append(f"{step.bytes:11,.0f}  {step.nats:10.5f}  {bought}")
    return "\n".join(lines)


def summary(curve: Sequence[CurveStep], rows: int = 12) -> list[list[str]]:
    """Header and at most `rows` + 1 rows evenly spread over the steps, the first and the last among them.

    Example:
        >>> steps = [CurveStep(2**20 * n, 1 / n, 0, n, 64 if n < 4 else None) for n in range(2, 5)]
        >>> for row in summary([CurveStep(2**20, 1.0, None, None, None), *steps], rows=2):
        ...     print(row)
        ['cache (MiB)', 'nats/token', 'bought since the row above']
        ['1.000', '1.00000', '']
        ['3.000', '0.33333', '64 kept keys in 2 heads']
        ['4.000', '0.25000', 'exact: 0.4']
    """
    ends = sorted({round(number * (len(curve) - 1) / rows) for number in range(rows + 1)}) if curve else []
    found, before = [["cache (MiB)", "nats/token", "bought since the row above"]], 0
    for end in ends:
        step = curve[end]
        found.append([f"{step.bytes / 2**20:.3f}", f"{step.nats:.5f}", _bought(curve[before + 1 : end + 1])])
        before = end
    return found


def _bought(steps: Sequence[CurveStep]) -> str:
    """What some steps bought, in words: a head that was given more several times counts once, as what it became."""
    last = {(step.layer, step.key_head): step.kept_keys for step in steps}
    exact = [f"{layer}.{head}" for (layer, head), kept in last.items() if kept is None]
    numbers = [kept for kept in last.values() if kept is not None]
    parts = []
    if numbers:
        span = f"{min(numbers)}" if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"
        parts.append(f"{span} kept keys in {len(numbers)} head{'s' * (len(numbers) > 1)}")
    if exact:
        parts.append(f"exact: {', '.join(exact)}")
    return "; ".join(parts)


def plot_curve(curve: Sequence[CurveStep], path: str | Path, *, unit: str = "nats/token") -> None:
    """Write a plot of the cost against the bytes, with the steps that made heads exact marked."""
    import matplotlib.pyplot as plt  # slow to import, and only needed here

    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.step([s.bytes / 2**20 for s in curve], [s.nats for s in curve], where="post")
    _mark(axes, [s for s in curve if s.layer is not None and s.kept_keys is None])
    axes.set(xlabel="cache of one text, MiB", ylabel=f"estimated cost, {unit}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _mark(axes: Any, exact: Sequence[CurveStep]) -> None:
    if exact:
        axes.plot([s.bytes / 2**20 for s in exact], [s.nats for s in exact], "r.", label="a head became exact")
        axes.legend()
