"""Convert a pretrained model and fine-tune it on long documents, on one process or many.

    python scripts/finetune.py scripts/configs/books.yaml
    python scripts/finetune.py scripts/configs/books.yaml --steps 50 --learning_rate 3e-5
    python scripts/finetune.py --model HuggingFaceTB/SmolLM2-135M --data emozilla/pg19 --output run
    torchrun --nproc_per_node 2 scripts/finetune.py scripts/configs/books.yaml
    accelerate launch --config_file scripts/accelerate/fsdp2.yaml scripts/finetune.py scripts/configs/books.yaml

Options come from the YAML file, and from the command line where both say something. The stages run in their order:

    calibrate   every head's far kernel is fitted, and the heads that stay softmax are chosen   -> OUTPUT/calibrated
    distill     attention transfer: each layer learns its original's output                     -> OUTPUT/distilled
    finetune    next-token loss (and KL to the original, `--kl_weight`)                          -> OUTPUT/final

Each folder loads with `hf_rfa.from_pretrained` and can be the `--model` of a run of the later stages alone. A run
that was killed goes on with `--resume true`: the same losses and the same draws of omega as if nothing had happened.
"""

import dataclasses
import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed

import hf_rfa
from hf_rfa.adapter import require_adapters
from hf_rfa.columns import Plan, markdown_table, measure_columns
from hf_rfa.data import evaluation_windows, training_batches
from hf_rfa.document_batches import Batch, carried_batches, packed_batches
from hf_rfa.documents import TokenStream, check_tokenizer, load_documents, tokenize_documents
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation import perplexity
from hf_rfa.model_card import write_model_card
from hf_rfa.pair import CONFIG_FILE
from hf_rfa.training import finetune

STAGES = ("calibrate", "distill", "finetune")
TRAINED = ("all", "lora", "adapter")
DOCUMENTS = ("random", "packed", "carried")


@dataclass
class Options:
    """What a run does; each field is an option of the command line and a key of the YAML file."""

    model: str = field(metadata={"help": "Folder or hub id: an original, or a folder that a stage has saved."})
    output: str = field(metadata={"help": "Folder of the run."})
    data: str = field(default="stdlib", metadata={"help": "See hf_rfa.documents.load_documents."})
    text_column: str = field(default="text", metadata={"help": "Column of the text."})
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
    documents: str = field(default="random", metadata={"help": f"One of {DOCUMENTS}: see hf_rfa.document_batches."})
    repeat_probability: float = field(default=0.0, metadata={"help": "Planted repeats, for 'random' documents."})
    context: int = field(default=2048, metadata={"help": "Tokens a sequence."})
    batch_size: int = field(default=1, metadata={"help": "Sequences a batch."})
    batches_per_step: int | None = field(default=None, metadata={"help": "Over all processes; else one a process."})
    steps: int = field(default=100, metadata={"help": "Optimiser steps of fine-tuning."})
    distill_steps: int = field(default=100, metadata={"help": "Optimiser steps of attention transfer."})
    learning_rate: float = field(default=1e-4, metadata={"help": "The highest value."})
    weight_decay: float = field(default=0.0, metadata={"help": "Of AdamW."})
    warmup_steps: int | None = field(default=None, metadata={"help": "By default a tenth of the steps."})
    schedule: str = field(default="cosine", metadata={"help": "'cosine' or 'wsd'."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to it."})
    mixed_precision: str = field(default="no", metadata={"help": "'no' or 'bf16'."})
    activation_checkpointing: bool = field(default=False, metadata={"help": "Layers run again in the backward pass."})
    fused_loss: bool = field(default=True, metadata={"help": "Never hold the logits of all positions."})
    kl_weight: float = field(default=0.0, metadata={"help": "Of KL(original || model) in the loss."})
    sequence_parallel: int = field(default=1, metadata={"help": "So many processes share one document."})
    seed: int = field(default=0, metadata={"help": "Of the batches, of LoRA and of omega."})

    save_every: int = field(default=50, metadata={"help": "Steps between checkpoints."})
    evaluate_every: int = field(default=50, metadata={"help": "Steps between validation perplexities."})
    evaluation_windows: int = field(default=8, metadata={"help": "Windows of `context` tokens for validation."})
    resume: bool = field(default=False, metadata={"help": "Go on from the last checkpoint in `output`."})
    trackers: list[str] = field(default_factory=list, metadata={"help": "tensorboard, trackio, wandb, ..."})
    progress: bool = field(default=True, metadata={"help": "A bar with loss and tokens/s."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Upload OUTPUT/final under this id."})


def read_options(arguments: list[str]) -> Options:
    """A YAML file, if the first argument is one, overruled by the command line."""
    parser = HfArgumentParser(Options, description=__doc__)
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


def prepare_training(model, options: Options):
    """The model with the chosen weights trainable, and activation checkpointing if wanted."""
    if options.train == "lora":
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(r=options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    elif options.train == "adapter":
        own = {id(p) for adapter in require_adapters(model) for p in adapter.parameters()}
        if not own:
            raise ConfigError("This conversion has nothing to train: run the stage 'distill' first, or set train=all.")
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in own)
    if options.activation_checkpointing:
        model.enable_input_require_grads()
        # The name in new versions of Transformers, and the one before.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def make_batches(options: Options, tokens):
    """The training batches, the same sequence in every process and on every resume."""
    if options.documents == "packed":
        return packed_batches(tokens, options.context, options.batch_size, options.seed)
    if options.documents == "carried":
        lanes = options.batches_per_step or PartialState().num_processes // options.sequence_parallel
        return carried_batches(tokens, options.context, options.batch_size, options.seed, lanes)
    return training_batches(tokens, options.context, options.batch_size, options.seed, options.repeat_probability)


def main(arguments: list[str]) -> None:
    options = read_options(arguments)
    state = PartialState(cpu=not torch.cuda.is_available())
    set_seed(options.seed)
    output = Path(options.output)
    say = print if state.is_main_process else lambda *_: None

    if (Path(options.model) / CONFIG_FILE).exists() or "calibrate" not in options.stages:
        model = hf_rfa.from_pretrained(options.model, dtype=torch.float32)
        original = None
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval().to(state.device)
    model = model.to(state.device)
    if options.kl_weight and original is None:
        raise ConfigError("The KL term needs the original: run from it, with the stage 'calibrate'.")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    check_tokenizer(tokenizer, model)

    if options.streaming:
        if options.documents == "random":
            raise ConfigError("A stream has no random positions. Set documents=packed or carried.")
        tokens = TokenStream(tokenizer, options.data, "train", options.text_column)
    else:
        tokens, _ = tokenize_documents(
            tokenizer, load_documents(options.data, "train", text_column=options.text_column)
        )
    held_out, num_bytes = tokenize_documents(
        tokenizer, load_documents(options.data, "validation", text_column=options.text_column)
    )
    # Before any work: raises where no held-out document reaches the context.
    validation = evaluation_windows(held_out, options.context, options.evaluation_windows).flatten()
    gaps = [300] if sum(map(len, held_out)) >= 2000 else []  # short of that there is no text to copy
    plan = Plan(contexts=[options.context], windows=options.evaluation_windows, copy_gaps=gaps)

    if "calibrate" in options.stages:
        calibration = list(itertools.islice(packed_batches(tokens, options.context, 2, options.seed + 1), 2))
        hf_rfa.convert(model, conversion(options), calibrate=[batch.input_ids for batch in calibration])
        save(model, tokenizer, output / "calibrated", state)
    if "distill" in options.stages:
        from hf_rfa.distill import distill

        distill(model, (Batch.of(b).input_ids for b in make_batches(options, tokens)), steps=options.distill_steps)
        save(model, tokenizer, output / "distilled", state)
    if "finetune" in options.stages:
        trained = prepare_training(model, options)
        done = finetune(
            trained,
            make_batches(options, tokens),
            steps=options.steps,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            warmup_steps=options.warmup_steps,
            schedule=options.schedule,
            max_grad_norm=options.max_grad_norm,
            mixed_precision=options.mixed_precision,
            batches_per_step=options.batches_per_step,
            sequence_parallel=options.sequence_parallel,
            fused_loss=options.fused_loss,
            kl_weight=options.kl_weight,
            teacher=original if options.kl_weight else None,
            evaluate=lambda m: {"perplexity": perplexity(m, validation, options.context)},
            evaluate_every=options.evaluate_every,
            output=output,
            save_every=options.save_every,
            resume=options.resume,
            trackers=options.trackers,
            hooks=[hf_rfa.ResampleCallback()],
            progress=options.progress,
        )
        model = trained.merge_and_unload() if options.train == "lora" else trained
        save(model, tokenizer, output / "final", state)
        if state.is_main_process:
            (output / "progress.json").write_text(json.dumps(done.state_dict(), indent=1))
            models = {"original": original} if original is not None else {}
            columns = measure_columns(
                {**models, "fine-tuned": model}, held_out, num_bytes, plan, tokenizer.bos_token_id
            )
            table = markdown_table(columns)
            settings = dataclasses.asdict(options)
            write_model_card(
                output / "final", base_model=options.model, table=table, settings=settings, data=options.data
            )
            say(table)
            if options.push_to_hub:
                from huggingface_hub import HfApi

                HfApi().create_repo(options.push_to_hub, exist_ok=True)
                HfApi().upload_folder(repo_id=options.push_to_hub, folder_path=output / "final")
        state.wait_for_everyone()
    state.destroy_process_group()


def save(model, tokenizer, folder: Path, state: PartialState) -> None:
    """Written once, by the main process; the others wait."""
    if state.is_main_process:
        hf_rfa.save_pretrained(model, folder)
        tokenizer.save_pretrained(folder)
    state.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1:])
