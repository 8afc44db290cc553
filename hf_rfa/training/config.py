"""`FinetuneConfig`: how `finetune` trains, checked where it is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hf_rfa.errors import ConfigError
from hf_rfa.options import Settings, option

WSD_DECAY_SHARE = 0.3


@dataclass(frozen=True)
class FinetuneConfig(Settings):
    """How `hf_rfa.training.finetune` trains. `to_dict` is JSON-ready, `from_dict` reads it.

    Raises:
        ConfigError: A value of another type or out of its range, or two that do not go together.

    Example:
        >>> from hf_rfa.training import FinetuneConfig
        >>> FinetuneConfig(steps=100, schedule="wsd").learning_rate
        0.0001
        >>> FinetuneConfig(steps=0)
        Traceback (most recent call last):
        ...
        hf_rfa.errors.ConfigError: `steps` must be a whole number >= 1. Got 0. Set it to, for example, 1.
    """

    steps: int = option("Optimiser steps of fine-tuning in total, those before a resume included.", least=1)
    learning_rate: float = option("Highest learning rate, after the warm-up.", 1e-4, above=0, below=float("inf"))
    feature_learning_rate: float | None = option(
        "Highest learning rate of learned random features (see `hf_rfa.distill`), which need a larger one and have no "
        "weight decay; by default `learning_rate`.",
        None, above=0, below=float("inf"),
    )  # fmt: skip
    weight_decay: float = option("Weight decay of AdamW.", 0.0, least=0, below=float("inf"))
    warmup_steps: int | None = option("Steps of linear warm-up; by default a tenth of `steps`.", None, least=0)
    schedule: Literal["cosine", "wsd"] = option(
        f"'cosine' (the learning rate falls to 0), or 'wsd' (constant, then down to 0 over the last "
        f"{WSD_DECAY_SHARE:g} of the steps).",
        "cosine",
    )
    max_grad_norm: float = option("The norm of the gradient is clipped to this.", 1.0, above=0)
    mixed_precision: Literal["no", "bf16"] = option(
        "'bf16' runs the forward pass under autocast; weights and optimiser stay as they are.", "no"
    )
    batches_per_step: int | None = option(
        "Batches per optimiser step, over all processes; by default one per process. More is gradient accumulation.",
        None, least=1,
    )  # fmt: skip
    sequence_parallel: int = option(
        "Number of neighbouring processes that share each document (`hf_rfa.training.sequence_parallel`).", 1, least=1
    )
    fused_loss: bool = option("Never hold the logits of all positions (see `hf_rfa.training.loss`).", False)
    kl_weight: float = option(
        "Weight of KL(original || model), nats/token, in the loss.", 0.0, least=0, below=float("inf")
    )
    evaluate_every: int = option("Steps between evaluations, and one after the last step.", 100, least=1)
    output: str | Path | None = option(
        "Folder of the run, for the checkpoint `checkpoint-<step>` and the trackers; 'none' saves nothing.", None
    )
    save_every: int = option(
        "Steps between checkpoints, and one after the last step; each replaces the one before.",
        100, least=1,
    )  # fmt: skip
    resume: bool = option("Go on from the checkpoint in `output`; from the start if there is none yet.", False)
    trackers: tuple[str, ...] = option("Trackers of Accelerate: tensorboard, trackio, wandb, ...", ())
    progress: bool = option("Show a bar with loss (nats/token) and speed (tokens/s).", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.output is None:
            raise ConfigError("`resume=True` needs the folder of the run. Got output=None. Set `output`.")
        if self.trackers and self.output is None:
            raise ConfigError(
                f"Trackers write into the folder of the run. Got {list(self.trackers)} and output=None. Set `output`."
            )
        if self.kl_weight and self.sequence_parallel > 1:
            raise ConfigError(
                "The original attends by softmax and cannot run on a share of the tokens. Got "
                f"kl_weight={self.kl_weight} and sequence_parallel={self.sequence_parallel}. Set `kl_weight=0` or "
                "`sequence_parallel=1`."
            )
