"""`MetricConfig`: how `train_embeddings` trains, checked where it is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_rfa.errors import ConfigError
from hf_rfa.options import Settings, option


@dataclass(frozen=True)
class MetricConfig(Settings):
    """How `hf_rfa.embeddings.train_embeddings` trains. `to_dict` is JSON-ready, `from_dict` reads it.

    Raises:
        ConfigError: A value of another type or out of its range, or two that do not go together.

    Example:
        >>> from hf_rfa.embeddings import MetricConfig
        >>> MetricConfig(steps=100).margin
        0.2
        >>> MetricConfig(steps=100, loss="multiple_negatives")
        Traceback (most recent call last):
        ...
        hf_rfa.errors.ConfigError: The loss 'multiple_negatives' takes pairs. Got passages=4. Set passages=2.
    """

    steps: int = option("Optimiser steps in total, those before a resume included.", least=1)
    loss: Literal["triplet", "batch_hard", "multiple_negatives", "harmonic"] = option(
        "'triplet' (all anchor-positive pairs of a batch with semi-hard negatives), 'batch_hard' (the hardest positive"
        " and negative of each anchor), 'multiple_negatives' (each text picks its partner among all), or 'harmonic' "
        "(triplets of new and stored old embeddings in every mixture).",
        "harmonic",
    )
    margin: float = option("Margin of the triplet losses, in squared distance of unit vectors.", 0.2, above=0, most=4)
    identities: int = option("Identities in a batch.", 8, least=2)
    passages: int = option("Texts of each identity in a batch.", 4, least=2)
    learning_rate: float = option("Highest learning rate, after the warm-up.", 2e-5, above=0, below=float("inf"))
    weight_decay: float = option("Weight decay of AdamW.", 0.0, least=0, below=float("inf"))
    warmup_steps: int | None = option("Steps of linear warm-up; by default a tenth of `steps`.", None, least=0)
    max_grad_norm: float = option("The norm of the gradient is clipped to this.", 1.0, above=0)
    dropout: float = option(
        "Dropout of the encoder in training (never in its random features).", 0.0, least=0, below=1
    )
    seed: int = option("Seed of the batches and of dropout.", 0, least=0)
    evaluate_every: int = option("Steps between evaluations, and one after the last step.", 100, least=1)
    output: str | Path | None = option(
        "Folder of the run, for the checkpoint `checkpoint-<step>`; 'none' saves nothing.", None
    )
    save_every: int = option("Steps between checkpoints, and one after the last step.", 100, least=1)
    resume: bool = option("Go on from the checkpoint in `output`; from the start if there is none yet.", False)
    progress: bool = option("Show a bar with the loss and the share of semi-hard triplets.", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.output is None:
            raise ConfigError("`resume=True` needs the folder of the run. Got output=None. Set `output`.")
        if self.loss == "multiple_negatives" and self.passages != 2:
            raise ConfigError(
                f"The loss 'multiple_negatives' takes pairs. Got passages={self.passages}. Set passages=2."
            )
