"""A short fine-tuning loop on Accelerate, for the main job and for scripts; it can be cut short and resumed.

from hf_rfa.training import finetune
result = finetune(model, training_batches(token_lists, 2048, 4, seed=0), steps=100, output="run")
"""

import itertools
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, get_scheduler

from hf_rfa.errors import CheckpointError, ConfigError

SCHEDULES = ("cosine", "wsd")
PRECISIONS = ("no", "bf16")
WSD_DECAY_SHARE = 0.3


class StepHook(Protocol):
    """Something to be told after each optimiser step, for example `hf_rfa.ResampleCallback`."""

    def step(self, model: PreTrainedModel) -> object: ...


@dataclass
class Progress:
    """How far a run has come; saved and restored with it."""

    step: int = 0  # optimiser steps done
    tokens: int = 0  # tokens seen, over all processes
    seconds: float = 0.0  # spent in steps, without saving
    losses: list[float] = field(default_factory=list)  # nats/token, one per step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.losses = state["seconds"], list(state["losses"])


def finetune(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    steps: int,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    schedule: str = "cosine",
    max_grad_norm: float = 1.0,
    mixed_precision: str = "no",
    output: str | Path | None = None,
    save_every: int = 100,
    resume: bool = False,
    hooks: Sequence[StepHook] = (),
    progress: bool = True,
    description: str = "fine-tuning",
) -> Progress:
    """Minimises the next-token loss with AdamW, in place, over `steps` batches.

    Works on one process and under `torchrun` / `accelerate launch`: of n processes, process r takes the batches r,
    r + n, r + 2n, ... of the same sequence, and the gradients are averaged.

    Args:
        model: a causal LM, converted or not. Parameters with `requires_grad=False` stay as they are.
        batches: token ids (batch, seq), int64, the same sequence of batches in every process and on every resume.
        steps: optimiser steps in total, those before a resume included.
        learning_rate: its highest value, after the warm-up.
        warmup_steps: steps of linear warm-up; by default a tenth of `steps`.
        schedule: "cosine" (down to 0), or "wsd" (constant, then down to 0 over the last `WSD_DECAY_SHARE`).
        max_grad_norm: the gradient's norm is clipped to it.
        mixed_precision: "bf16" runs the forward pass under autocast; weights and optimiser stay as they are.
        output: folder for the checkpoint `checkpoint-<step>`; None saves nothing.
        save_every: a checkpoint after so many steps and after the last one; the one before it is then deleted.
        resume: go on from the checkpoint in `output`; from the start if there is none yet.
        hooks: `hook.step(model)` is called after each optimiser step; a hook with `state_dict` and `load_state_dict`
            is saved and restored with the run.
        progress: show a bar with loss (nats/token) and speed (tokens/s).

    Returns:
        Steps, tokens, seconds and the loss of each step.

    Raises:
        ConfigError: an argument out of its range, no trainable parameter, or batches that end before `steps`.
        CheckpointError: the checkpoint belongs to a longer run or cannot be read.
        FloatingPointError: the loss is NaN or infinite; the message names the step. The model keeps the weights of
            the step before, and `output` the checkpoint before.
    """
    _check_arguments(steps, learning_rate, schedule, mixed_precision, output, save_every, resume)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("The model has no parameter with `requires_grad=True`. Unfreeze some before fine-tuning.")

    accelerator = Accelerator(cpu=model.device.type == "cpu")
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
    wsd = {"num_decay_steps": max(1, round(WSD_DECAY_SHARE * steps))} if schedule == "wsd" else None
    scheduler = get_scheduler(
        "warmup_stable_decay" if schedule == "wsd" else schedule,
        optimizer,
        num_warmup_steps=steps // 10 if warmup_steps is None else warmup_steps,
        num_training_steps=steps,
        scheduler_specific_kwargs=wsd,
    )
    prepared, optimizer = accelerator.prepare(model, optimizer)
    done = Progress()
    # The scheduler is not prepared: Accelerate would step it once per process.
    stateful = [hook for hook in hooks if hasattr(hook, "state_dict") and hasattr(hook, "load_state_dict")]
    accelerator.register_for_checkpointing(done, scheduler, *stateful)
    if output is not None and resume:
        _load_checkpoint(accelerator, Path(output), done, steps)

    was_training = model.training
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
        for input_ids in _own_batches(batches, accelerator, done.step, steps):
            started = time.perf_counter()
            loss = _train_step(accelerator, prepared, optimizer, input_ids, mixed_precision, max_grad_norm, done.step)
            scheduler.step()
            for hook in hooks:
                hook.step(model)
            done.step += 1
            done.tokens += input_ids.numel() * accelerator.num_processes
            done.seconds += time.perf_counter() - started
            done.losses.append(loss)
            bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{done.tokens_per_second:.0f}", refresh=False)
            bar.update()
            if output is not None and (done.step % save_every == 0 or done.step == steps):
                _save_checkpoint(accelerator, Path(output), done.step)
    finally:
        bar.close()
        model.train(was_training)
        accelerator.free_memory()  # drops Accelerate's references to model and optimiser
    return done


def _train_step(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    input_ids: Tensor,
    mixed_precision: str,
    max_grad_norm: float,
    step: int,
) -> float:
    """One optimiser step; returns the loss in nats/token, averaged over the processes."""
    input_ids = input_ids.to(accelerator.device)
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
    # The mean over the processes is checked, not each one's own, so that all of them stop at the same step.
    mean_loss = accelerator.reduce(loss.detach().float(), reduction="mean").item()
    if not math.isfinite(mean_loss):
        raise FloatingPointError(
            f"The loss is {mean_loss} at step {step + 1}. The weights are those of the step before. Lower "
            "`learning_rate`, lower `max_grad_norm`, or train without `mixed_precision`; `resume=True` goes on from "
            "the last checkpoint."
        )
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return mean_loss


def _own_batches(batches: Iterable[Tensor], accelerator: Accelerator, first: int, steps: int) -> Iterator[Tensor]:
    """The batches of this process for the steps from `first` on."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    number = first
    for batch in itertools.islice(batches, first * processes + rank, steps * processes, processes):
        yield batch
        number += 1
    if number < steps:
        raise ConfigError(
            f"The batches ended after {number} of {steps} steps ({processes} processes). Pass an endless iterator, "
            "for example `hf_rfa.data.training_batches(...)`, or lower `steps`."
        )


def _save_checkpoint(accelerator: Accelerator, output: Path, step: int) -> None:
    """Writes `output/checkpoint-<step>` in one go, then removes those before it."""
    partial, final = output / f"checkpoint-{step}.partial", output / f"checkpoint-{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)  # a run that is killed while it saves keeps the checkpoint before
        for other in output.glob("checkpoint-*"):
            if other != final:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()


def _load_checkpoint(accelerator: Accelerator, output: Path, done: Progress, steps: int) -> None:
    found = {int(path.name.split("-")[1]): path for path in output.glob("checkpoint-*") if path.suffix != ".partial"}
    if not found:
        return
    path = found[max(found)]
    try:
        accelerator.load_state(str(path))
    except Exception as error:  # Accelerate raises whatever its readers raise
        raise CheckpointError(
            f"Cannot resume from {path.name} in {str(output)!r}: {error} Delete it, or start without `resume`."
        ) from error
    if done.step > steps:
        raise CheckpointError(
            f"The checkpoint in {str(output)!r} has {done.step} steps, more than `steps`={steps}. Raise `steps` or "
            "choose another `output`."
        )


def _check_arguments(
    steps: int,
    learning_rate: float,
    schedule: str,
    mixed_precision: str,
    output: str | Path | None,
    save_every: int,
    resume: bool,
) -> None:
    if steps < 1 or save_every < 1:
        raise ConfigError(f"`steps` and `save_every` must be at least 1. Got {steps} and {save_every}.")
    if not 0 < learning_rate < math.inf:
        raise ConfigError(f"`learning_rate` must be positive. Got {learning_rate}. Set, for example, 1e-4.")
    if schedule not in SCHEDULES:
        raise ConfigError(f"`schedule` must be one of {list(SCHEDULES)}. Got {schedule!r}.")
    if mixed_precision not in PRECISIONS:
        raise ConfigError(f"`mixed_precision` must be one of {list(PRECISIONS)}. Got {mixed_precision!r}.")
    if resume and output is None:
        raise ConfigError("`resume=True` needs the folder of the run. Set `output`.")
