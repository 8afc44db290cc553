"""Convert a pretrained model and fine-tune it on long documents, on one process or many.

    python scripts/finetune.py scripts/configs/books.yaml
    python scripts/finetune.py scripts/configs/books.yaml --steps 50 --learning_rate 3e-5
    python scripts/finetune.py --model HuggingFaceTB/SmolLM2-135M --data emozilla/pg19 --output run
    torchrun --nproc_per_node 2 scripts/finetune.py scripts/configs/books.yaml
    accelerate launch --config_file scripts/accelerate/fsdp2.yaml scripts/finetune.py scripts/configs/books.yaml

Options come from the YAML file and the command line, which wins. The stages run in this order:

    calibrate   every head's far kernel is fitted, and the heads that stay softmax are chosen   -> OUTPUT/calibrated
    distill     attention transfer: each layer learns its original's output                     -> OUTPUT/distilled
    finetune    next-token loss (and KL to the original, `--kl_weight`)                          -> OUTPUT/final

Each folder loads with `hf_rfa.from_pretrained` and can be the `--model` of a run of the later stages alone. Resume a
run that was killed by `--resume true`: finished stages are loaded, and the unfinished one continues from its last
checkpoint, with the same losses and draws of omega as an uninterrupted run.
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
from finetune_options import Options, settle
from transformers import AutoTokenizer, set_seed

import hf_rfa
from hf_rfa.checkpoint import holds_conversion, load_any
from hf_rfa.command_line import parse_arguments
from hf_rfa.data import (
    Batch,
    TokenStream,
    carried_batches,
    check_tokenizer,
    evaluation_windows,
    load_documents,
    packed_batches,
    tokenize_documents,
    training_batches,
)
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation import perplexity
from hf_rfa.evaluation.columns import ColumnSettings, markdown_table, measure_columns, untrained_columns
from hf_rfa.evaluation.model_card import write_model_card
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.record import is_converted
from hf_rfa.training import finetune
from hf_rfa.training.checkpoint import check_output
from hf_rfa.training.sharded import full_state_dict, is_sharded

#: How long processes wait for the one that distils and measures, much longer than for each other in training.
PATIENCE = timedelta(hours=12)

#: Folder of each stage, in the folder of the run.
FOLDERS = {"calibrate": "calibrated", "distill": "distilled", "finetune": "final"}

#: Columns of trained models.
FINE_TUNED, BASELINE = "fine-tuned", "original, same tuning"


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    output = Path(options.output)
    set_seed(options.seed)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found = last_stage(options, output)
    check_start(options)
    model = load(found or options.model).to(state.device)
    check_tokenizer(tokenizer, model)
    tokens = training_tokens(options, tokenizer)
    held_out, num_bytes = tokenize_documents(
        tokenizer,
        load_documents(
            options.data,
            "validation",
            text_column=options.text_column,
            max_documents=options.validation_documents,
        ),
    )
    # Before any work: raises where no held-out document reaches the context.
    validation = evaluation_windows(held_out, options.context, options.evaluation_windows).flatten()
    next(make_batches(options, tokens))  # raises where there is nothing to train on
    if state.is_main_process:
        settle(options, output)
    state.wait_for_everyone()
    check_output(output, model)

    start = convert_and_distill(model, options, tokens, tokenizer, state) or options.model
    del model
    if "finetune" in options.stages:
        makers = {FINE_TUNED: lambda: load(start)}
        if options.baseline:
            makers[BASELINE] = lambda: original(options)
        folders = {FINE_TUNED: output, BASELINE: output / "baseline"}
        trained = {
            name: fine_tune(make, options, folders[name], tokens, validation, state) for name, make in makers.items()
        }
        if state.is_main_process:
            for name, model in trained.items():
                write_folder(model, tokenizer, folders[name] / FOLDERS["finetune"])
            settings = ColumnSettings(
                contexts=(options.context,),
                windows=options.evaluation_windows,
                copy_gaps=(300,) if sum(map(len, held_out)) >= 2000 else (),  # shorter texts have nothing to copy
            )
            columns = untrained_columns(original(options).to(state.device), load(start).to(state.device)) | trained
            finish(options, output, measure_columns(columns, held_out, num_bytes, settings, tokenizer.bos_token_id))
        state.wait_for_everyone()
    state.destroy_process_group()


def convert_and_distill(model, options: Options, tokens, tokenizer, state: PartialState) -> Path | None:
    """Runs the stages before fine-tuning that are wanted; returns the folder of the last one."""
    start = None
    for stage in ("calibrate", "distill"):
        folder = Path(options.output) / FOLDERS[stage]
        if stage not in options.stages:
            continue
        if options.finetuning.resume and folder.exists():
            if state.is_main_process:
                print(f"{stage}: taken from {folder}")
        elif stage == "calibrate":
            batches = itertools.islice(packed_batches(tokens, options.context, 2, options.seed + 1), 2)
            hf_rfa.convert(model, options.conversion, calibrate=[inputs_of(batch) for batch in batches])
            save(model, tokenizer, folder, state)
        else:
            if state.is_main_process:
                distill(model, options, tokens)
            save(model, tokenizer, folder, state)
        start = folder
    return start


def last_stage(options: Options, output: Path) -> Path | None:
    """Folder of the last stage before fine-tuning that a resumed run has finished."""
    folders = [output / FOLDERS[stage] for stage in ("calibrate", "distill") if stage in options.stages]
    return next((folder for folder in reversed(folders) if options.finetuning.resume and folder.exists()), None)


def check_start(options: Options) -> None:
    """Check that the first stage fits the model: an original starts with `calibrate`, a conversion does not."""
    if holds_conversion(options.model) == ("calibrate" in options.stages):
        state = "is converted already" if "calibrate" in options.stages else "is not converted yet"
        raise ConfigError(
            f"{options.model!r} {state}. Got stages={list(options.stages)}. An original starts with the stage "
            "'calibrate', a converted folder without it."
        )


def load(source: str | Path):
    return load_any(source, dtype=torch.float32)


def original(options: Options):
    """The model to compare with, attending by softmax."""
    model = load(options.original or options.model)
    return (hf_rfa.revert(model) if is_converted(model) else model).eval()


def training_tokens(options: Options, tokenizer):
    if not options.streaming:
        documents = load_documents(options.data, "train", text_column=options.text_column)
        return tokenize_documents(tokenizer, documents)[0]
    return TokenStream(tokenizer, options.data, "train", options.text_column)


def make_batches(options: Options, tokens):
    """The training batches, the same sequence in every process and on every resume."""
    if options.documents == "packed":
        return packed_batches(tokens, options.context, options.batch_size, options.seed)
    if options.documents == "carried":
        processes = PartialState().num_processes // options.finetuning.sequence_parallel
        lanes = options.finetuning.batches_per_step or processes
        return carried_batches(tokens, options.context, options.batch_size, options.seed, lanes)
    shares = options.repeat_probability, options.loop_probability
    return training_batches(tokens, options.context, options.batch_size, options.seed, *shares)


def inputs_of(batch) -> dict[str, torch.Tensor]:
    """Arguments of the model, for the stages that have no targets."""
    batch = Batch.of(batch)
    given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    return {name: tensor for name, tensor in given.items() if tensor is not None}


def distill(model, options: Options, tokens) -> None:
    if options.documents == "carried":  # without a state to carry: each piece stands alone
        options = dataclasses.replace(options, documents="packed")
    hf_rfa.distill(model, map(inputs_of, make_batches(options, tokens)), options.distillation)


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


def fine_tune(make, options: Options, output: Path, tokens, validation, state: PartialState):
    """Trains the model that `make` loads; returns the whole of it in the main process, None in the others."""
    set_seed(options.seed)  # whether or not the stages before have run in this process
    model = prepare_training(make(), options).to(state.device)
    teacher = original(options).to(state.device) if options.finetuning.kl_weight else None
    done = finetune(
        model,
        make_batches(options, tokens),
        dataclasses.replace(options.finetuning, output=output),
        teacher=teacher,
        evaluate=lambda m: {"perplexity": perplexity(m, validation, options.context)},
        hooks=[hf_rfa.ResampleCallback()] if is_converted(model) else [],
        description=f"fine-tuning {output}",
    )
    weights = full_state_dict(model) if is_sharded(model) else None
    if not state.is_main_process:
        return None
    (output / "progress.json").write_text(json.dumps(done.state_dict(), indent=1))
    if weights is not None:
        model = prepare_training(make(), options)
        model.load_state_dict(weights)
        model = model.to(state.device)
    return model.merge_and_unload() if options.train == "lora" else model


def finish(options: Options, output: Path, columns) -> None:
    """The model card with the comparison, and the upload."""
    table, folder = markdown_table(columns), output / FOLDERS["finetune"]
    (output / "columns.json").write_text(json.dumps([column.to_dict() for column in columns], indent=1))
    write_model_card(folder, base_model=options.model, table=table, settings=options.to_dict(), data=options.data)
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
    """Written completely or not at all: a run killed here does not resume from half a model."""
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)  # of a converted model: with its conversion
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
