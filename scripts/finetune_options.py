"""Options of scripts/finetune.py, from a YAML file and the command line, checked before any work."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import run_folder

import hf_rfa
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.errors import ConfigError
from hf_rfa.options import Settings, option, part
from hf_rfa.training import FinetuneConfig

#: Options that may change when a run is resumed: its length, what it shows and what it saves.
MAY_CHANGE = frozenset(
    "output stages steps distill_steps save_every evaluate_every evaluation_windows resume trackers progress "
    "push_to_hub original".split()
)
Stage = Literal["calibrate", "distill", "finetune"]


@dataclass(frozen=True)
class Options(Settings):
    """Options of a run: its fields and those of its parts are options of the command line and keys of the YAML file.

    Make it by `from_dict`: all parts then get the options they share (`seed`, `output`, `resume`, `save_every`,
    `progress`).
    """

    model: str = option("Folder or hub id: an original, or a folder that a stage has saved.")
    output: str = option("Folder of the run.")
    original: str | None = option("Original to compare with; by default `model` with softmax.", None)
    data: str = option(SOURCE_HELP, "stdlib")
    text_column: str = option("Column of the text.", "text")
    validation_documents: int | None = option("Held-out documents, at most; by default all.", None, least=1)
    streaming: bool = option("Tokenise training documents while training.", False)
    stages: tuple[Stage, ...] = option("Stages to run, of calibrate, distill and finetune.", ("calibrate", "finetune"))

    train: Literal["all", "lora", "adapter"] = option("Which weights are fine-tuned.", "all")
    lora_rank: int = option("Rank of the LoRA matrices.", 16, least=1)
    documents: Literal["random", "packed", "carried"] = option(
        "How documents become batches: 'random' positions across their borders, 'packed' with a reset at each border, "
        "or 'carried' with the state from piece to piece.",
        "packed",
    )
    repeat_probability: float = option(
        "Share of sequences with planted repeats, for 'random' documents.", 0.0, least=0, most=1
    )
    loop_probability: float = option(
        "Share of sequences that are a loop, for 'random' documents.", 0.0, least=0, most=1
    )
    context: int = option("Tokens per sequence.", 2048, least=2)
    batch_size: int = option("Sequences per batch.", 1, least=1)
    activation_checkpointing: bool = option("Recompute layers in the backward pass.", False)
    baseline: bool = option("Add a column: the original after the same fine-tuning.", False)
    evaluation_windows: int = option("Held-out windows of `context` tokens to measure on.", 8, least=1)
    seed: int = option("Seed of the batches, of LoRA, of omega and of attention transfer.", 0, least=0)
    push_to_hub: str | None = option("Upload OUTPUT/final under this id.", None)

    conversion: hf_rfa.RFAConfig = part(
        hf_rfa.RFAConfig(feature_map="auto", softmax_heads="auto"),
        only=(
            *("feature_map", "num_features", "window", "sink_tokens", "kept_keys"),
            *("softmax_heads", "resample", "seed"),
        ),
        group="Conversion",
    )
    finetuning: FinetuneConfig = part(
        FinetuneConfig(steps=100, fused_loss=True, save_every=50, evaluate_every=50), group="Fine-tuning"
    )
    distillation: hf_rfa.DistillConfig = part(
        hf_rfa.DistillConfig(steps=100, save_every=50),
        only=("steps", "learning_rate", "weight_loss", "seed", "output", "save_every", "resume", "progress"),
        names={name: f"distill_{name}" for name in ("steps", "learning_rate", "weight_loss")},
        group="Attention transfer",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streaming and self.documents == "random":
            raise ConfigError(
                "A stream has no random positions. Got documents=random. Set documents=packed or carried."
            )
        for name, share in (("repeat", self.repeat_probability), ("loop", self.loop_probability)):
            if share and self.documents != "random":
                raise ConfigError(
                    f"`{name}_probability` changes the texts of documents=random only. Got {share} and "
                    f"documents={self.documents}. Set documents=random, or leave it out."
                )
        parallel = self.finetuning.sequence_parallel
        if parallel > 1 and "calibrate" in self.stages and self.conversion.most_kept_keys:
            raise ConfigError(
                "Processes that share a document cannot hand kept keys on to each other. Got sequence_parallel="
                f"{parallel} and kept_keys={self.conversion.most_kept_keys}. Set kept_keys=0, or sequence_parallel=1."
            )
        for name, value in (
            ("documents", self.documents == "carried" and self.documents),
            ("sequence_parallel", parallel > 1 and parallel),
            ("train", self.train == "adapter" and self.train),
        ):
            if self.baseline and value:
                raise ConfigError(
                    "`baseline` trains the original as well, which has softmax attention and so no state to carry or "
                    f"to share and no adapter. Got {name}={value}. Set baseline=false or leave {name} at its default."
                )


def settle(options: Options, output: Path) -> None:
    """Write the settings of the run; see `run_folder.settle`."""
    # A run of a version without kept keys kept none.
    missing = {"model": "", "output": "", "kept_keys": 0}
    run_folder.settle(options, output, resume=options.finetuning.resume, may_change=MAY_CHANGE, missing=missing)
