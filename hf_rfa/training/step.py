"""One optimiser step, the part of each process in it, and the progress of a run."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from hf_rfa.data.document_batches import IGNORED, Batch
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.arguments import cache_argument
from hf_rfa.training.carry import Carry
from hf_rfa.training.sequence_parallel import shard_batch


@dataclass
class Progress:
    """The progress of a run; saved and restored with it."""

    step: int = 0  # optimiser steps done
    tokens: int = 0  # tokens seen, over all processes
    seconds: float = 0.0  # spent in steps, without saving and evaluation
    batches: int = 0  # batches taken, over all processes
    losses: list[float] = field(default_factory=list)  # nats/token, one per step
    evaluations: list[dict[str, float]] = field(default_factory=list)  # the figures of `evaluate`, with the step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@dataclass(frozen=True)
class Share:
    """The part of each step that this process computes."""

    batches_per_step: int
    lanes: tuple[int, ...]  # places of its batches in a step
    replicas: int  # groups of processes with batches of their own
    group: Any = None  # the processes that share a document with it
    rank: int = 0  # its place among them
    size: int = 1

    @classmethod
    def of(cls, accelerator: Accelerator, batches_per_step: int | None, size: int) -> "Share":
        processes = accelerator.num_processes
        if processes % size:
            raise ConfigError(
                f"`sequence_parallel` must divide the {processes} processes. Got {size}. Start as many processes as "
                "it says, or a multiple: `torchrun --nproc_per_node ...`."
            )
        replicas = processes // size
        per_step = replicas if batches_per_step is None else batches_per_step
        if per_step % replicas:
            raise ConfigError(
                f"`batches_per_step` must be a multiple of the {replicas} processes that have batches of their own. "
                f"Got {per_step}."
            )
        replica, rank = divmod(accelerator.process_index, size)
        group = None
        if size > 1:
            # A group even if it holds all processes: sums of gradients must not mix with the layers' exchange.
            group, _ = dist.new_subgroups(size)
        return cls(per_step, tuple(range(replica, per_step, replicas)), replicas, group, rank, size)


@dataclass(frozen=True)
class Step:
    """One optimiser step on this process's batches."""

    accelerator: Accelerator
    model: Any
    optimizer: Any
    share: Share
    carries: dict[int, Carry]
    max_grad_norm: float

    def __call__(self, batches: list[Batch], done: Progress, checkpoint: Path | None) -> tuple[float, int]:
        """Returns the loss in nats/token and the number of tokens, both over all processes."""
        accelerator, share = self.accelerator, self.share
        tokens = sum(batch.input_ids.numel() for batch in batches) * share.replicas
        if share.group is not None:
            batches = [shard_batch(batch, share.rank, share.size) for batch in batches]
        targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        count = accelerator.reduce(torch.tensor(float(targets), device=accelerator.device)).item()
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            accelerator.sync_gradients = last  # DeepSpeed takes its step in the backward pass of the last batch
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self._forward(batch, share.lanes[number]) * (accelerator.num_processes / max(count, 1.0))
                total += loss.detach().float()
                # Reduced, so that all processes stop at the same step.
                mean = accelerator.reduce(loss.detach().float(), reduction="mean").item()
                if not math.isfinite(mean):
                    # Each replica was computing one batch.
                    first = done.batches + number * share.replicas
                    raise self._stop(f"The loss is {mean}", done, range(first, first + share.replicas), checkpoint)
                accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            whole = range(done.batches, done.batches + share.batches_per_step)
            stepped = accelerator.distributed_type == DistributedType.DEEPSPEED  # in the backward pass
            raise self._stop(f"The gradient's norm is {float(norm)}", done, whole, checkpoint, stepped)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return accelerator.reduce(total, reduction="mean").item(), tokens

    def _stop(
        self, what: str, done: Progress, batches: range, checkpoint: Path | None, stepped: bool = False
    ) -> FloatingPointError:
        self.accelerator.sync_gradients = True  # or the next line does nothing
        self.optimizer.zero_grad()
        which = f"batch {batches[0]}" if len(batches) == 1 else f"one of the batches {batches[0]} to {batches[-1]}"
        weights = "are broken" if stepped else "are those of the step before"
        return FloatingPointError(
            f"{what} at step {done.step + 1}, in {which} (counted from 0). The weights {weights}. "
            f"Last good checkpoint: {checkpoint or 'none'}. Lower `learning_rate`, lower `max_grad_norm`, or train "
            "without `mixed_precision`; `resume=True` goes on from there."
        )

    def _forward(self, batch: Batch, lane: int) -> Tensor:
        device = self.accelerator.device
        inputs: dict[str, Any] = {"use_cache": False}
        if batch.position_ids is not None:
            inputs["position_ids"] = batch.position_ids.to(device)
        if batch.fresh is not None:
            name = cache_argument(self.accelerator.unwrap_model(self.model).model)
            inputs |= {"use_cache": True, name: self.carries[lane].start(batch)}
        return self.model(input_ids=batch.input_ids.to(device), targets=batch.targets.to(device), **inputs)
