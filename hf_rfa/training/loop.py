"""The fine-tuning loop on Accelerate; it can be interrupted and resumed.

from hf_rfa.training import FinetuneConfig, finetune
config = FinetuneConfig(steps=100, output="run")
result = finetune(model, training_batches(token_lists, 2048, 4, seed=0), config)
"""

import itertools
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
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.quiet import training_flags_kept
from hf_rfa.training.carry import Carry, check_carry
from hf_rfa.training.checkpoint import check_output, load_checkpoint, save_checkpoint
from hf_rfa.training.config import WSD_DECAY_SHARE, FinetuneConfig
from hf_rfa.training.loss import LossModule
from hf_rfa.training.sequence_parallel import sequence_parallel as parallel_layers
from hf_rfa.training.sharded import callable_inside, tell_deepspeed
from hf_rfa.training.step import Progress, Share, Step


class StepHook(Protocol):
    """An object that is called after each optimiser step, for example `hf_rfa.ResampleCallback`."""

    def step(self, model: PreTrainedModel) -> object: ...


def finetune(
    model: PreTrainedModel,
    batches: Iterable[Tensor | Batch],
    config: FinetuneConfig,
    *,
    teacher: PreTrainedModel | None = None,
    evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    hooks: Sequence[StepHook] = (),
    trackers: Sequence[GeneralTracker] = (),
    description: str = "fine-tuning",
) -> Progress:
    """Minimises the next-token loss with AdamW, in place.

    Works on one process and under `torchrun` / `accelerate launch`. A step averages over the targets of
    `config.batches_per_step` batches, split over the processes: of n processes, process r takes the batches r, r + n,
    ... of the same sequence. So the losses do not depend on n, and a run can resume on another number of processes.

    Args:
        model: a causal LM, converted or not. Parameters with `requires_grad=False` stay as they are. Under FSDP2 its
            weights are spread over the processes afterwards: see `hf_rfa.training.sharded.full_state_dict`.
        batches: token ids (batch, seq) int64, or `Batch`es; the same sequence in every process and on every resume.
        config: see `FinetuneConfig`.
        teacher: the original model, on the same device, for `config.kl_weight`; losses are then the sum of both terms.
        evaluate: called on the model every `config.evaluate_every` steps and after the last; its figures are tracked.
        hooks: `hook.step(model)` is called after each optimiser step; a hook with `state_dict` and `load_state_dict`
            is saved and restored with the run.
        trackers: trackers of your own, in addition to those of `config.trackers`.
        description: title of the progress bar.

    Returns:
        Steps, tokens, seconds and the loss of each step.

    Raises:
        ConfigError: no trainable parameter, a teacher without `kl_weight` or the reverse, processes or batches that do
            not fit the config, or batches that end before `config.steps`.
        CheckpointError: `output` cannot be written, or its checkpoint belongs to a longer run or cannot be read.
        FloatingPointError: the loss is NaN or infinite; the message names the step, the batches and the last good
            checkpoint. The model keeps the weights of the step before.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("The model has no parameter with `requires_grad=True`. Unfreeze some before fine-tuning.")
    if (config.kl_weight > 0) != (teacher is not None):
        raise ConfigError(
            f"`kl_weight` > 0 and a `teacher` belong together. Got {config.kl_weight} and "
            f"{'a' if teacher is not None else 'no'} teacher. Pass both or neither."
        )
    output, log_with = None if config.output is None else Path(config.output), [*config.trackers, *trackers]
    if log_with and output is None:
        raise ConfigError(f"Trackers write into the folder of the run. Got {log_with} and no folder. Set `output`.")
    if output is not None:
        check_output(output, model)

    accelerator = Accelerator(
        cpu=model.device.type == "cpu", log_with=log_with or None, project_dir=output if log_with else None
    )
    share = Share.of(accelerator, config.batches_per_step, config.sequence_parallel)
    optimizer = torch.optim.AdamW(_parameter_groups(model, config), lr=config.learning_rate)
    scheduler = _scheduler(optimizer, config)
    autocast = torch.bfloat16 if config.mixed_precision == "bf16" else None
    loss_module = LossModule(
        model, fused=config.fused_loss, autocast=autocast, kl_weight=config.kl_weight, teacher=teacher
    )
    tell_deepspeed(accelerator, config.max_grad_norm)
    prepared, optimizer = accelerator.prepare(loss_module, optimizer)
    if log_with:
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
        if config.kl_weight:
            raise ConfigError("The original has no state of constant size to carry. Set `kl_weight=0`, or pack.")
        carries = {lane: Carry() for lane in share.lanes}
    checkpoint = load_checkpoint(accelerator, output, carries) if output is not None and config.resume else None
    if done.step > config.steps:
        raise CheckpointError(
            f"The checkpoint in {str(output)!r} has {done.step} steps, more than `steps`={config.steps}. "
            "Raise `steps` or choose another `output`."
        )

    trainer = Step(accelerator, prepared, optimizer, share, carries, config.max_grad_norm)
    modes = ExitStack()
    modes.enter_context(training_flags_kept(model))
    prepared.train()
    bar = tqdm(
        total=config.steps,
        initial=done.step,
        desc=description,
        unit="step",
        leave=False,
        disable=not (config.progress and accelerator.is_main_process),
    )
    try:
        for own in _own_batches(batches, share, done, config.steps):
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
            if log_with:
                rate = scheduler.get_last_lr()[0]
                accelerator.log(
                    {"loss": loss, "learning_rate": rate, "tokens": done.tokens, "tokens/s": done.tokens_per_second},
                    step=done.step,
                )
            if evaluate is not None and (done.step % config.evaluate_every == 0 or done.step == config.steps):
                with callable_inside(prepared):
                    figures = dict(evaluate(model))
                done.evaluations.append({"step": done.step, **figures})
                if log_with:
                    accelerator.log(figures, step=done.step)
                prepared.train()
            if output is not None and (done.step % config.save_every == 0 or done.step == config.steps):
                checkpoint = save_checkpoint(accelerator, output, done.step, carries)
    finally:
        bar.close()
        modes.close()
        if log_with:
            accelerator.end_training()
        accelerator.free_memory()  # drops Accelerate's references to model and optimiser
    return done


def _own_batches(batches: Iterable[Tensor | Batch], share: Share, done: Progress, steps: int) -> Iterator[list[Batch]]:
    """The batches of this process, one list per step, from the current step on."""
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


def _parameter_groups(model: nn.Module, config: FinetuneConfig) -> list[dict[str, Any]]:
    """The trainable parameters: those of the model itself, and those of the adapters, which have no weight decay."""
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    features = [trained.pop(id(p)) for _, _, a in named_adapters(model) for p in a.parameters() if id(p) in trained]
    groups = [
        {"params": list(trained.values()), "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": features, "lr": config.feature_learning_rate or config.learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _scheduler(optimizer: torch.optim.Optimizer, config: FinetuneConfig) -> Any:
    """The schedule of the learning rate, `warmup_steps` of linear warm-up first."""
    wsd = {"num_decay_steps": max(1, round(WSD_DECAY_SHARE * config.steps))} if config.schedule == "wsd" else None
    return get_scheduler(
        "warmup_stable_decay" if config.schedule == "wsd" else config.schedule,
        optimizer,
        num_warmup_steps=config.steps // 10 if config.warmup_steps is None else config.warmup_steps,
        num_training_steps=config.steps,
        scheduler_specific_kwargs=wsd,
    )
