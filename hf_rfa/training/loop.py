"""The fine-tuning loop on Accelerate, for the main job and for scripts; it can be cut short and resumed.

from hf_rfa.training import finetune
result = finetune(model, training_batches(token_lists, 2048, 4, seed=0), steps=100, output="run")
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler

from hf_rfa.data.document_batches import Batch
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.runtime.adapter import named_adapters
from hf_rfa.runtime.quiet import training_flags_kept
from hf_rfa.training.carry import Carry, check_carry
from hf_rfa.training.checkpoint import check_output, load_checkpoint, save_checkpoint
from hf_rfa.training.loss import LossModule
from hf_rfa.training.sequence_parallel import sequence_parallel as parallel_layers
from hf_rfa.training.sharded import callable_inside, tell_deepspeed
from hf_rfa.training.step import Progress, Share, Step

SCHEDULES = ("cosine", "wsd")
PRECISIONS = ("no", "bf16")
WSD_DECAY_SHARE = 0.3


class StepHook(Protocol):
    """Something to be told after each optimiser step, for example `hf_rfa.ResampleCallback`."""

    def step(self, model: PreTrainedModel) -> object: ...


def finetune(
    model: PreTrainedModel,
    batches: Iterable[Tensor | Batch],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    feature_learning_rate: float | None = None,
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    schedule: str = "cosine",
    max_grad_norm: float = 1.0,
    mixed_precision: str = "no",
    batches_per_step: int | None = None,
    sequence_parallel: int = 1,
    fused_loss: bool = False,
    kl_weight: float = 0.0,
    teacher: PreTrainedModel | None = None,
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    evaluate_every: int = 100,
    output: str | Path | None = None,
    save_every: int = 100,
    resume: bool = False,
    trackers: Sequence[str | GeneralTracker] = (),
    hooks: Sequence[StepHook] = (),
    progress: bool = True,
    description: str = "fine-tuning",
) -> Progress:
    """Minimises the next-token loss with AdamW, in place.

    Works on one process and under `torchrun` / `accelerate launch`. A step averages over the targets of
    `batches_per_step` batches, which the processes share: of n processes, process r takes the batches r, r + n, ...
    of the same sequence. So the losses do not depend on n, and a run resumes on another number of processes.

    Args:
        model: a causal LM, converted or not. Parameters with `requires_grad=False` stay as they are. Under FSDP2 its
            weights are spread over the processes afterwards: see `hf_rfa.training.sharded.full_state_dict`.
        batches: token ids (batch, seq) int64, or `Batch`es; the same sequence in every process and on every resume.
        steps: optimiser steps in total, those before a resume included.
        learning_rate: its highest value, after the warm-up.
        feature_learning_rate: the same for learned random features (see `distill`), which want a higher one; None:
            `learning_rate`. They are never decayed.
        warmup_steps: steps of linear warm-up; by default a tenth of `steps`.
        schedule: "cosine" (down to 0), or "wsd" (constant, then down to 0 over the last `WSD_DECAY_SHARE`).
        max_grad_norm: the gradient's norm is clipped to it.
        mixed_precision: "bf16" runs the forward pass under autocast; weights and optimiser stay as they are.
        batches_per_step: over all processes; by default one a process. More than that is gradient accumulation.
        sequence_parallel: so many neighbouring processes share each document (`hf_rfa.training.sequence_parallel`).
        fused_loss: never hold the logits of all positions (see `hf_rfa.training.loss`).
        kl_weight: adds so many times KL(teacher || model), nats/token; the losses then are the sum of both.
        teacher: the original model, on the same device.
        evaluate: called on the model after every `evaluate_every` steps and the last; its figures are tracked.
        output: folder for the checkpoint `checkpoint-<step>` and the trackers; None saves nothing.
        save_every: a checkpoint after so many steps and after the last one; the one before it is then deleted.
        resume: go on from the checkpoint in `output`; from the start if there is none yet.
        trackers: of Accelerate, for example "tensorboard", "trackio", "wandb", or a tracker of your own.
        hooks: `hook.step(model)` is called after each optimiser step; a hook with `state_dict` and `load_state_dict`
            is saved and restored with the run.
        progress: show a bar with loss (nats/token) and speed (tokens/s).

    Returns:
        Steps, tokens, seconds and the loss of each step.

    Raises:
        ConfigError: an argument out of its range, no trainable parameter, or batches that end before `steps`.
        CheckpointError: `output` cannot be written, or its checkpoint belongs to a longer run or cannot be read.
        FloatingPointError: the loss is NaN or infinite; the message names the step, the batches and the last good
            checkpoint. The model keeps the weights of the step before.
    """
    _check_rates(learning_rate, feature_learning_rate)
    _check_arguments(steps, schedule, mixed_precision, output, save_every, resume)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("The model has no parameter with `requires_grad=True`. Unfreeze some before fine-tuning.")
    if evaluate_every < 1:
        raise ConfigError(f"`evaluate_every` must be at least 1. Got {evaluate_every}.")
    if (kl_weight > 0) != (teacher is not None) or kl_weight < 0:
        raise ConfigError(
            f"`kl_weight` > 0 and a `teacher` belong together. Got {kl_weight} and "
            f"{'a' if teacher is not None else 'no'} teacher. Pass both or neither."
        )
    if trackers and output is None:
        raise ConfigError(f"Trackers write into the folder of the run. Got {list(trackers)}. Set `output`.")
    if output is not None:
        check_output(Path(output), model)

    accelerator = Accelerator(
        cpu=model.device.type == "cpu", log_with=list(trackers) or None, project_dir=output if trackers else None
    )
    share = Share.of(accelerator, batches_per_step, sequence_parallel, kl_weight)
    groups = _parameter_groups(model, learning_rate, feature_learning_rate or learning_rate, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    wsd = {"num_decay_steps": max(1, round(WSD_DECAY_SHARE * steps))} if schedule == "wsd" else None
    scheduler = get_scheduler(
        "warmup_stable_decay" if schedule == "wsd" else schedule,
        optimizer,
        num_warmup_steps=steps // 10 if warmup_steps is None else warmup_steps,
        num_training_steps=steps,
        scheduler_specific_kwargs=wsd,
    )
    autocast = torch.bfloat16 if mixed_precision == "bf16" else None
    loss_module = LossModule(model, fused=fused_loss, autocast=autocast, kl_weight=kl_weight, teacher=teacher)
    tell_deepspeed(accelerator, max_grad_norm)
    prepared, optimizer = accelerator.prepare(loss_module, optimizer)
    if trackers:
        accelerator.init_trackers("hf_rfa")
    done = Progress()
    # The scheduler is not prepared: Accelerate would step it once per process.
    stateful = [hook for hook in hooks if hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict")]
    accelerator.register_for_checkpointing(done, scheduler, *stateful)
    batches = iter(batches)
    first = next(batches, None)
    batches = itertools.chain([] if first is None else [first], batches)
    carries: dict[int, Carry] = {}
    if first is not None and Batch.of(first).fresh is not None:
        check_carry(model)
        if kl_weight:
            raise ConfigError("The original has no state of constant size to carry. Set `kl_weight=0`, or pack.")
        carries = {lane: Carry() for lane in share.lanes}
    checkpoint = load_checkpoint(accelerator, Path(output), carries) if output is not None and resume else None
    if done.step > steps:
        raise CheckpointError(
            f"The checkpoint in {str(output)!r} has {done.step} steps, more than `steps`={steps}. Raise `steps` or "
            "choose another `output`."
        )

    trainer = Step(accelerator, prepared, optimizer, share, carries, max_grad_norm)
    modes = ExitStack()
    modes.enter_context(training_flags_kept(model))
    prepared.train()
    bar = tqdm(
        total=steps,
        initial=done.step,
        desc=description,
        unit="step",
        leave=False,
        disable=not (progress and accelerator.is_main_process),
    )
    try:
        for own in _own_batches(batches, share, done, steps):
            started = time.perf_counter()
            with ExitStack() as stack:
                if share.group is not None:
                    stack.enter_context(parallel_layers(model, share.group))
                loss, tokens = trainer(own, done, checkpoint)
            scheduler.step()
            for hook in hooks:
                hook.step(model)
            done.step += 1
            done.batches += share.batches_per_step
            done.tokens += tokens
            done.seconds += time.perf_counter() - started
            done.losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{done.tokens_per_second:.0f}", refresh=False)
            bar.update()
            if trackers:
                rate = scheduler.get_last_lr()[0]
                accelerator.log(
                    {"loss": loss, "learning_rate": rate, "tokens": done.tokens, "tokens/s": done.tokens_per_second},
                    step=done.step,
                )
            if evaluate is not None and (done.step % evaluate_every == 0 or done.step == steps):
                with callable_inside(prepared):
                    figures = dict(evaluate(model))
                done.evaluations.append({"step": done.step, **figures})
                if trackers:
                    accelerator.log(figures, step=done.step)
                prepared.train()
            if output is not None and (done.step % save_every == 0 or done.step == steps):
                checkpoint = save_checkpoint(accelerator, Path(output), done.step, carries)
    finally:
        bar.close()
        modes.close()
        if trackers:
            accelerator.end_training()
        accelerator.free_memory()  # drops Accelerate's references to model and optimiser
    return done


def _own_batches(batches: Iterable[Tensor | Batch], share: Share, done: Progress, steps: int) -> Iterator[list[Batch]]:
    """The batches of this process, one list a step, from where the run stands."""
    if done.batches % share.batches_per_step:
        raise CheckpointError(
            f"The checkpoint was made after {done.batches} batches, which are no whole steps of "
            f"{share.batches_per_step}. Resume with the `batches_per_step` that it was made with."
        )
    remaining = itertools.islice(batches, done.batches, None)
    for number in range(done.step, steps):
        whole = list(itertools.islice(remaining, share.batches_per_step))
        if len(whole) < share.batches_per_step:
            raise ConfigError(
                f"The batches ended after {number} of {steps} steps ({share.batches_per_step} batches each). Pass an "
                "endless iterator, for example `hf_rfa.data.training_batches(...)`, or lower `steps`."
            )
        yield [Batch.of(whole[lane]) for lane in share.lanes]


def _parameter_groups(model: nn.Module, rate: float, feature_rate: float, decay: float) -> list[dict[str, Any]]:
    """The trainable parameters: those of the model itself, and those of the adapters, which are not decayed."""
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    features = [trained.pop(id(p)) for _, _, a in named_adapters(model) for p in a.parameters() if id(p) in trained]
    groups = [
        {"params": list(trained.values()), "lr": rate, "weight_decay": decay},
        {"params": features, "lr": feature_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _check_rates(learning_rate: float, feature_learning_rate: float | None) -> None:
    for name, rate in (("learning_rate", learning_rate), ("feature_learning_rate", feature_learning_rate)):
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigError(f"`{name}` must be positive. Got {rate}. Set, for example, 1e-4.")


def _check_arguments(
    steps: int,
    schedule: str,
    mixed_precision: str,
    output: str | Path | None,
    save_every: int,
    resume: bool,
) -> None:
    if steps < 1 or save_every < 1:
        raise ConfigError(f"`steps` and `save_every` must be at least 1. Got {steps} and {save_every}.")
    if schedule not in SCHEDULES:
        raise ConfigError(f"`schedule` must be one of {list(SCHEDULES)}. Got {schedule!r}.")
    if mixed_precision not in PRECISIONS:
        raise ConfigError(f"`mixed_precision` must be one of {list(PRECISIONS)}. Got {mixed_precision!r}.")
    if resume and output is None:
        raise ConfigError("`resume=True` needs the folder of the run. Set `output`.")
