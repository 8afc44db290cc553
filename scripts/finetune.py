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
that was killed goes on with `--resume true`: stages that are done are loaded, the one that was under way goes on from
its last checkpoint, with the same losses and the same draws of omega as if nothing had happened.
"""

import dataclasses
import itertools
import json
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from finetune_options import Options, conversion, read_options, settle
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import hf_rfa
from hf_rfa.adapter import require_adapters
from hf_rfa.columns import Plan, markdown_table, measure_columns, untrained_columns
from hf_rfa.data import evaluation_windows, training_batches
from hf_rfa.document_batches import Batch, carried_batches, packed_batches
from hf_rfa.documents import TokenStream, check_tokenizer, load_documents, tokenize_documents
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation import perplexity
from hf_rfa.model_card import write_model_card
from hf_rfa.pair import CONFIG_FILE, find_file
from hf_rfa.sharded import full_state_dict, is_sharded
from hf_rfa.training import finetune
from hf_rfa.training_checkpoint import check_output

#: Processes wait for the one that distils and measures, much longer than for each other in training.
PATIENCE = timedelta(hours=12)

#: What each stage leaves in the folder of the run.
FOLDERS = {"calibrate": "calibrated", "distill": "distilled", "finetune": "final"}


def main(arguments: list[str]) -> None:
    options = read_options(arguments, __doc__)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    output = Path(options.output)
    say = print if state.is_main_process else lambda *_: None
    set_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found = last_stage(options, output)
    check_start(options)
    model = load(found or options.model).to(state.device)
    check_tokenizer(tokenizer, model)
    tokens = training_tokens(options, tokenizer)
    held_out, num_bytes = tokenize_documents(
        tokenizer, load_documents(options.data, "validation", text_column=options.text_column)
    )
    # Before any work: raises where no held-out document reaches the context.
    validation = evaluation_windows(held_out, options.context, options.evaluation_windows).flatten()
    next(make_batches(options, tokens))  # raises where there is nothing to train on
    if state.is_main_process:
        settle(options, output)
    state.wait_for_everyone()
    check_output(output, model)

    start = found or options.model
    for stage in ("calibrate", "distill"):
        folder = output / FOLDERS[stage]
        if stage not in options.stages:
            continue
        if options.resume and folder.exists():
            say(f"{stage}: taken from {folder}")
        elif stage == "calibrate":
            batches = itertools.islice(packed_batches(tokens, options.context, 2, options.seed + 1), 2)
            hf_rfa.convert(model, conversion(options), calibrate=[batch.input_ids for batch in batches])
            save(model, tokenizer, folder, state)
        else:
            if state.is_main_process:
                distill(model, options, tokens, output)
            save(model, tokenizer, folder, state)
            model = load(folder).to(state.device)  # what the main process learned, in all of them
        start = folder
    if "finetune" in options.stages:
        set_seed(options.seed)  # whether or not the stages before have run in this process
        done, trained = train(model, options, tokens, validation)
        weights = full_state_dict(trained) if is_sharded(trained) else None
        if state.is_main_process:
            if weights is not None:
                trained = prepare_training(load(start), options)
                trained.load_state_dict(weights)
                trained = trained.to(state.device)
            model = trained.merge_and_unload() if options.train == "lora" else trained
            write_folder(model, tokenizer, output / FOLDERS["finetune"])
            (output / "progress.json").write_text(json.dumps(done.state_dict(), indent=1))
            plan = Plan(
                contexts=[options.context],
                windows=options.evaluation_windows,
                copy_gaps=[300] if sum(map(len, held_out)) >= 2000 else [],  # short of that there is no text to copy
            )
            columns = untrained_columns(original(options).to(state.device), load(start).to(state.device))
            columns["fine-tuned"] = model
            measured = measure_columns(columns, held_out, num_bytes, plan, tokenizer.bos_token_id)
            finish(options, output, measured)
        state.wait_for_everyone()
    state.destroy_process_group()


def last_stage(options: Options, output: Path) -> Path | None:
    """Where a resumed run has saved the last stage before fine-tuning that it has done."""
    folders = [output / FOLDERS[stage] for stage in ("calibrate", "distill") if stage in options.stages]
    return next((folder for folder in reversed(folders) if options.resume and folder.exists()), None)


def is_converted(source: str | Path) -> bool:
    return find_file(str(source), CONFIG_FILE) is not None


def check_start(options: Options) -> None:
    """The first stage must fit what `model` is."""
    if is_converted(options.model) == ("calibrate" in options.stages):
        state = "is converted already" if "calibrate" in options.stages else "is not converted yet"
        raise ConfigError(
            f"{options.model!r} {state}. Got stages={options.stages}. An original starts with the stage 'calibrate', "
            "a converted folder without it."
        )


def load(source: str | Path):
    """A model in float32, converted if the folder holds a conversion."""
    if is_converted(source):
        return hf_rfa.from_pretrained(source, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def original(options: Options):
    """The model to compare with, attending by softmax."""
    source = options.original or options.model
    model = load(source)
    return (hf_rfa.revert(model) if is_converted(source) else model).eval()


def training_tokens(options: Options, tokenizer):
    if not options.streaming:
        documents = load_documents(options.data, "train", text_column=options.text_column)
        return tokenize_documents(tokenizer, documents)[0]
    if options.documents == "random":
        raise ConfigError("A stream has no random positions. Got documents=random. Set documents=packed or carried.")
    return TokenStream(tokenizer, options.data, "train", options.text_column)


def make_batches(options: Options, tokens):
    """The training batches, the same sequence in every process and on every resume."""
    if options.documents == "packed":
        return packed_batches(tokens, options.context, options.batch_size, options.seed)
    if options.documents == "carried":
        lanes = options.batches_per_step or PartialState().num_processes // options.sequence_parallel
        return carried_batches(tokens, options.context, options.batch_size, options.seed, lanes)
    return training_batches(tokens, options.context, options.batch_size, options.seed, options.repeat_probability)


def distill(model, options: Options, tokens, output: Path) -> None:
    hf_rfa.distill(
        model,
        (Batch.of(batch).input_ids for batch in make_batches(options, tokens)),
        steps=options.distill_steps,
        seed=options.seed,
        output=output,
        save_every=options.save_every,
        resume=options.resume,
        progress=options.progress,
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


def train(model, options: Options, tokens, validation):
    """Returns how the run went, and the model with what was added to train it."""
    trained = prepare_training(model, options)
    done = finetune(
        trained,
        make_batches(options, tokens),
        steps=options.steps,
        learning_rate=options.learning_rate,
        feature_learning_rate=options.feature_learning_rate,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup_steps,
        schedule=options.schedule,
        max_grad_norm=options.max_grad_norm,
        mixed_precision=options.mixed_precision,
        batches_per_step=options.batches_per_step,
        sequence_parallel=options.sequence_parallel,
        fused_loss=options.fused_loss,
        kl_weight=options.kl_weight,
        teacher=original(options).to(model.device) if options.kl_weight else None,
        evaluate=lambda m: {"perplexity": perplexity(m, validation, options.context)},
        evaluate_every=options.evaluate_every,
        output=options.output,
        save_every=options.save_every,
        resume=options.resume,
        trackers=options.trackers,
        hooks=[hf_rfa.ResampleCallback()],
        progress=options.progress,
    )
    return done, trained


def finish(options: Options, output: Path, columns) -> None:
    """The model card with the comparison, and the upload."""
    table, folder = markdown_table(columns), output / FOLDERS["finetune"]
    (output / "columns.json").write_text(json.dumps([column.to_dict() for column in columns], indent=1))
    settings = dataclasses.asdict(options)
    write_model_card(folder, base_model=options.model, table=table, settings=settings, data=options.data)
    print(table)
    if options.push_to_hub:
        from huggingface_hub import HfApi

        HfApi().create_repo(options.push_to_hub, exist_ok=True)
        HfApi().upload_folder(repo_id=options.push_to_hub, folder_path=folder)


def save(model, tokenizer, folder: Path, state: PartialState) -> None:
    """Written once, by the main process; the others wait."""
    if state.is_main_process:
        write_folder(model, tokenizer, folder)
    state.wait_for_everyone()


def write_folder(model, tokenizer, folder: Path) -> None:
    """Whole or not at all: a run that is killed here does not resume from half a model."""
    partial = folder.with_name(folder.name + ".partial")
    hf_rfa.save_pretrained(model, partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
