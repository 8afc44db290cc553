"""`CalibrationReport`: the far kernel and the cost of every key head, as a table, a dictionary and a heat map."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_rfa import budget_curve
from hf_rfa.budget_curve import CurveStep
from hf_rfa.config import HeadIndex, seen_exactly

#: Units of the costs, by what the model gives out.
NATS, RELATIVE = "nats/token", "relative squared error"


@dataclass(frozen=True)
class HeadCalibration:
    """The result for one key head.

    Attributes:
        layer, key_head: Its place.
        feature_map, alpha, gamma: Its far kernel, used or not; gamma = 0 is the window alone.
        cost: The divergence from the original that it adds if linear (see `unit` of the report), estimated for each
            head by itself: costs add up to about the divergence.
        window_cost: The same with the window (and its kept keys) alone; NaN for `window = 0`, and in reports of
            versions that did not record it.
        softmax: Whether it stays exact.
    """

    layer: int
    key_head: int
    feature_map: str
    alpha: float
    gamma: float
    cost: float
    window_cost: float
    softmax: bool

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HeadCalibration":
        """The entry that `asdict` made, also of versions that fitted heads to the error of their layer's output."""
        names = [one.name for one in fields(cls)]
        return cls(**{"window_cost": float("nan")} | {name: values[name] for name in names if name in values})


@dataclass(frozen=True)
class CalibrationReport:
    """The result of `calibrate`; `str()` is a table, costliest heads first.

    Attributes:
        heads: One entry per key head of the converted layers.
        tokens: Number of tokens of the calibration text.
        unit: Of `cost`, `divergence` and `window_divergence`: the KL divergence from the original's next-token
            distribution in nats/token; for models without such, the squared error of the output relative to its norm.
        divergence: Of the calibrated model from the original, measured on the first tokens of the calibration text.
        window_divergence: Of the same model with its far parts left out: window and kept keys alone.
        silenced: Layers whose far parts were switched off because with them the model was worse than without.
        window, sink_tokens: Those of the config; None in reports of versions that did not record them.
        kept_keys: The most that a head of the config keeps.
        curve: How bytes were spent on heads, step by step, by a budget or until the cost was small enough
            (`softmax_heads="auto"`, `kept_keys="auto"`); empty where the config left nothing to choose.
        budget: The bytes that there were to spend; None without a budget, and in reports of versions that did not
            record it.
        sold_out: Whether nothing was left to buy that lowers the cost on the calibration text.
    """

    heads: list[HeadCalibration]
    tokens: int
    unit: str
    divergence: float
    window_divergence: float
    silenced: list[int]
    window: int | None = None
    sink_tokens: int | None = None
    kept_keys: int = 0
    curve: list[CurveStep] = field(default_factory=list)
    budget: float | None = None
    sold_out: bool = False

    @property
    def ranking(self) -> list[tuple[int, int, float]]:
        """(layer, key_head, cost), costliest first: the order in which heads should stay exact."""
        return [(h.layer, h.key_head, h.cost) for h in sorted(self.heads, key=lambda h: -h.cost)]

    @property
    def softmax_heads(self) -> list[HeadIndex]:
        """The key heads that stay exact softmax."""
        return sorted((h.layer, h.key_head) for h in self.heads if h.softmax)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**asdict(self), "heads": [asdict(head) for head in self.heads]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CalibrationReport":
        """The report that `to_dict` described."""
        heads = [HeadCalibration.from_dict(head) for head in values["heads"]]
        curve = [CurveStep(**step) for step in values.get("curve", ())]
        return cls(**{**values, "heads": heads, "curve": curve})

    def curve_table(self) -> str:
        """What was bought at each step: bytes and nats/token after it; `plot_curve` draws it."""
        return budget_curve.every_step(self.curve)

    def plot_curve(self, path: str | Path) -> None:
        """Write a plot of nats against bytes, with the steps that made heads exact marked."""
        budget_curve.plot_curve(self.curve, path, unit=self.unit)

    def plot(self, path: str | Path) -> None:
        """Write a heat map of the heads' costs, layers by key heads; exact heads are framed."""
        import matplotlib.pyplot as plt  # slow to import, and only needed here
        import numpy as np

        layers = sorted({h.layer for h in self.heads})
        width = 1 + max(h.key_head for h in self.heads)
        costs = np.full((len(layers), width), np.nan)
        for h in self.heads:
            costs[layers.index(h.layer), h.key_head] = h.cost
        figure, axes = plt.subplots(figsize=(2.5 + 0.45 * width, 1.2 + 0.3 * len(layers)), layout="constrained")
        image = axes.imshow(costs, aspect="auto", cmap="cividis")
        for h in self.heads:
            if h.softmax:
                corner = (h.key_head - 0.5, layers.index(h.layer) - 0.5)
                axes.add_patch(plt.Rectangle(corner, 1, 1, fill=False, edgecolor="red", linewidth=2))
        axes.set_xticks(range(width))
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set(xlabel="key head", ylabel="layer")
        axes.set_title("cost of a linear head\n(framed: kept as softmax)", fontsize=9)
        figure.colorbar(image, label=self.unit)
        figure.savefig(path)
        plt.close(figure)

    def __str__(self) -> str:
        lines = [
            f"calibrated on {self.tokens} tokens; divergence from the original in {self.unit}: {self.divergence:.5f}, "
            f"with the window{' and the kept keys' if self.kept_keys else ''} alone {self.window_divergence:.5f}",
            "cost: the divergence that the head adds by itself if it is linear; window only: without its far part",
        ]
        if self.window is not None and self.sink_tokens is not None:
            seen = seen_exactly(self.window, self.sink_tokens)
            kept = f", and up to {self.kept_keys} kept far keys" if self.kept_keys else ""
            lines.insert(1, f"window {self.window}: a query of a causal layer sees {seen} exactly{kept}")
        if self.silenced:
            lines += [f"far parts switched off in layers {self.silenced}: they did more harm than good"]
        lines += ["", "layer  key head  map            alpha   gamma      cost  window only  kept as"]
        for h in sorted(self.heads, key=lambda h: -h.cost):
            kind = "softmax" if h.softmax else "linear" if h.gamma else "window only"
            lines.append(
                f"{h.layer:5d}  {h.key_head:8d}  {h.feature_map:13s}  {h.alpha:5.2f}  {h.gamma:6.2f}  {h.cost:8.5f}  "
                f"{h.window_cost:11.5f}  {kind}"
            )
        if self.curve:
            lines += ["", "what bytes buy, of the cache of one text (all steps: `curve_table()`)"]
            rows = budget_curve.summary(self.curve)
            lines += [f"{size:>11}  {nats:>10}  {bought}".rstrip() for size, nats, bought in rows]
        if self.curve and self.budget is not None:
            rest = ": nothing else lowers the cost on the calibration text" * self.sold_out
            lines += [f"budget: {self.budget / 2**20:.3f} MiB, spent: {self.curve[-1].bytes / 2**20:.3f} MiB{rest}"]
        return "\n".join(lines)
