"""What scripts/finetune.py is asked for: a YAML file and the command line, checked before any work."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

import hf_rfa
from hf_rfa.errors import CheckpointError, ConfigError

STAGES = ("calibrate", "distill", "finetune")
TRAINED = ("all", "lora", "adapter")
DOCUMENTS = ("random", "packed", "carried")
SETTINGS_FILE = "settings.json"
#: What a resumed run may have changed: how far it goes, and what it shows and saves.
MAY_CHANGE = frozenset(
    "output stages steps distill_steps save_every evaluate_every evaluation_windows resume trackers progress "
    "push_to_hub original".split()
)


@dataclass
class Options:
    """What a run does; each field is an option of the command line and a key of the YAML file."""

    model: str = field(metadata={"help": "Folder or hub id: an original, or a folder that a stage has saved."})
    output: str = field(metadata={"help": "Folder of the run."})
    original: str | None = field(default=None, metadata={"help": "To compare with; else `model`, with softmax."})
    data: str = field(default="stdlib", metadata={"help": "See hf_rfa.data.documents.load_documents."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
    validation_documents: int | None = field(default=None, metadata={"help": "Only so many; by default all."})
    streaming: bool = field(default=False, metadata={"help": "Tokenise training documents on the way."})
    stages: list[str] = field(default_factory=lambda: ["calibrate", "finetune"], metadata={"help": f"Of {STAGES}."})

    feature_map: str = field(default="auto", metadata={"help": "See RFAConfig."})
    num_features: int = field(default=64, metadata={"help": "See RFAConfig."})
    window: int = field(default=64, metadata={"help": "See RFAConfig."})
    sink_tokens: int = field(default=4, metadata={"help": "See RFAConfig."})
    softmax_heads: str = field(default="auto", metadata={"help": "'auto', 'none', or a fraction of the key heads."})
    resample: str = field(default="never", metadata={"help": "'never', 'forward' or every so many steps."})

    train: str = field(default="all", metadata={"help": f"Which weights: one of {TRAINED}."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    documents: str = field(default="packed", metadata={"help": f"One of {DOCUMENTS}; 'random' crosses their borders."})
    repeat_probability: float = field(default=0.0, metadata={"help": "Planted repeats, for 'random' documents."})
    loop_probability: float = field(default=0.0, metadata={"help": "Texts in a loop, for 'random' documents."})
    context: int = field(default=2048, metadata={"help": "Tokens a sequence."})
    batch_size: int = field(default=1, metadata={"help": "Sequences a batch."})
    batches_per_step: int | None = field(default=None, metadata={"help": "Over all processes; else one a process."})
    steps: int = field(default=100, metadata={"help": "Optimiser steps of fine-tuning."})
    distill_steps: int = field(default=100, metadata={"help": "Optimiser steps of attention transfer."})
    distill_learning_rate: float = field(default=1e-2, metadata={"help": "Of attention transfer, its highest value."})
    distill_weight_loss: float = field(default=0.0, metadata={"help": "See `weight_loss` of hf_rfa.distill."})
    learning_rate: float = field(default=1e-4, metadata={"help": "The highest value."})
    feature_learning_rate: float | None = field(default=None, metadata={"help": "Of distilled features."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW."})
    warmup_steps: int | None = field(default=None, metadata={"help": "By default a tenth of the steps."})
    schedule: str = field(default="cosine", metadata={"help": "'cosine' or 'wsd'."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to it."})
    mixed_precision: str = field(default="no", metadata={"help": "'no' or 'bf16'."})
    activation_checkpointing: bool = field(default=False, metadata={"help": "Layers run again in the backward pass."})
    fused_loss: bool = field(default=True, metadata={"help": "Never hold the logits of all positions."})
    kl_weight: float = field(default=0.0, metadata={"help": "Of KL(original || model) in the loss."})
    sequence_parallel: int = field(default=1, metadata={"help": "So many processes share one document."})
    baseline: bool = field(default=False, metadata={"help": "One more column: the original after the same tuning."})
    seed: int = field(default=0, metadata={"help": "Of the batches, of LoRA and of omega."})

    save_every: int = field(default=50, metadata={"help": "Steps between checkpoints."})
    evaluate_every: int = field(default=50, metadata={"help": "Steps between validation perplexities."})
    evaluation_windows: int = field(default=8, metadata={"help": "Windows of `context` tokens for validation."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in `output`."})
    trackers: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, wandb, ..."})
    progress: bool = field(default=True, metadata={"help": "A bar with loss and tokens/s."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Upload OUTPUT/final under this id."})


def read_options(arguments: list[str], description: str | None) -> Options:
    """A YAML file, if the first argument is one, overruled by the command line."""
    parser = HfArgumentParser(Options, description=description)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        given = yaml.safe_load(Path(arguments[0]).read_text(encoding="utf-8")) or {}
        known = {f.name for f in dataclasses.fields(Options)}
        if set(given) - known:
            raise ConfigError(
                f"{arguments[0]} has unknown keys: {sorted(set(given) - known)}. Known ones: {sorted(known)}."
            )
        for action in parser._actions:
            action.required = action.required and action.dest not in given
        parser.set_defaults(**given)
        arguments = arguments[1:]
    (options,) = parser.parse_args_into_dataclasses(arguments)
    for name, value, allowed in (
        *(("stages", stage, STAGES) for stage in options.stages),
        ("train", options.train, TRAINED),
        ("documents", options.documents, DOCUMENTS),
    ):
        if value not in allowed:
            raise ConfigError(f"`{name}` must be of {list(allowed)}. Got {value!r}.")
    if options.streaming and options.documents == "random":
        raise ConfigError("A stream has no random positions. Got documents=random. Set documents=packed or carried.")
    for name, share in (("repeat", options.repeat_probability), ("loop", options.loop_probability)):
        if share and options.documents != "random":
            raise ConfigError(
                f"`{name}_probability` changes the texts of documents=random only. Got {share} and "
                f"documents={options.documents}. Set documents=random, or leave it out."
            )
    for name, value in (
        ("documents", options.documents == "carried" and options.documents),
        ("sequence_parallel", options.sequence_parallel > 1 and options.sequence_parallel),
        ("train", options.train == "adapter" and options.train),
    ):
        if options.baseline and value:
            raise ConfigError(
                f"`baseline` trains the original as well, which has softmax attention and so no state to carry or to "
                f"share and no adapter. Got {name}={value}. Set baseline=false or leave {name} at its default."
            )
    return options


def conversion(options: Options) -> hf_rfa.RFAConfig:
    heads = {"auto": "auto", "none": None}.get(options.softmax_heads, options.softmax_heads)
    return hf_rfa.RFAConfig(
        feature_map=options.feature_map,
        num_features=options.num_features,
        window=options.window,
        sink_tokens=options.sink_tokens,
        softmax_heads=float(heads) if heads not in ("auto", None) else heads,
        resample=int(options.resample) if options.resample.isdigit() else options.resample,
        seed=options.seed,
    )


def settle(options: Options, output: Path) -> None:
    """Writes what decides the run to `output/settings.json`; what is there already must be the same run, resumed.

    Raises:
        ConfigError: another run lies in the folder, or this one and `resume` was not set.
        CheckpointError: the folder cannot be written.
    """
    path, settings = output / SETTINGS_FILE, dataclasses.asdict(options)
    if path.exists():
        if not options.resume:
            raise ConfigError(
                f"{str(output)!r} holds a run already. Go on with it by resume=true, or choose another `output`."
            )
        # An option that the run's version did not have yet was at its default.
        before = dataclasses.asdict(Options(model="", output="")) | json.loads(path.read_text(encoding="utf-8"))
        other = {name: before[name] for name in settings if name not in MAY_CHANGE}
        other = {name: value for name, value in other.items() if value != settings[name]}
        if other:
            raise ConfigError(
                f"{str(output)!r} holds a run with other settings: {other}. Got "
                f"{ {name: settings[name] for name in other} }. Resume with its own, or choose another `output`."
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {str(output)!r}: {error}. Choose another `output` or get the permission."
        ) from error
