"""`DistillConfig`: how `distill` trains, checked where it is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_rfa.errors import ConfigError
from hf_rfa.options import Settings, option


@dataclass(frozen=True)
class DistillConfig(Settings):
    """How `hf_rfa.distill` trains. `to_dict` is JSON-ready, `from_dict` reads it.

    Raises:
        ConfigError: A value of another type or out of its range.

    Example:
        >>> import hf_rfa
        >>> hf_rfa.DistillConfig(steps=100, omega="fixed")
        Traceback (most recent call last):
        ...
        hf_rfa.errors.ConfigError: `omega` must be one of ['learned', 'random']. Got 'fixed'. Leave it out for its ...
    """

    steps: int = option("Adam steps of attention transfer in total, those before a resume included.", least=1)
    omega: Literal["learned", "random"] = option(
        "'learned' trains the projections too; they are then no longer random and are never redrawn. 'random' redraws "
        "omega in each step and trains only the geometry, so that afterwards omega can be redrawn, or another number "
        "of features chosen.",
        "learned",
    )
    learning_rate: float = option(
        "Highest learning rate of attention transfer; it falls to 0 along a cosine.", 1e-2, above=0, below=float("inf")
    )
    weight_loss: float = option(
        "Weight of the cross-entropy on sampled attention weights, which says which keys a head looks up. Heads with "
        "the trigonometric map are left out: their estimates may be negative.",
        0.0, least=0, below=float("inf"),
    )  # fmt: skip
    sampled_queries: int = option("Queries per sequence whose attention weights are sampled.", 64, least=1)
    window_dropout: float = option(
        "Share of the steps in which there is no near part and the far part covers all keys.", 0.0, least=0, most=1
    )
    cluster_scale: float = option(
        "Multiplies all distances between keys in clustered heads at the start; the logits of queries stay. After "
        "calibration the borders of clusters are so sharp that hardly a key has a gradient towards a second cluster: "
        "with 0.5, heads that look things up learn more in as many steps.",
        1.0, above=0, below=float("inf"),
    )  # fmt: skip
    max_grad_norm: float = option(
        "The norm of each layer's gradient is clipped to it.", 1.0, above=0, below=float("inf")
    )
    seed: int = option("Seed of the sampled queries and of the window dropout.", 0, least=0)
    output: str | Path | None = option("Folder of the checkpoint `distill.pt`; 'none' saves nothing.", None)
    save_every: int = option("Steps between checkpoints, and one after the last step.", 100, least=1)
    resume: bool = option("Go on from the checkpoint in `output`; from the start if there is none yet.", False)
    progress: bool = option("Show a bar with the mean loss of the layers.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.output is None:
            raise ConfigError("`resume=True` needs the folder of the run. Got output=None. Set `output`.")
