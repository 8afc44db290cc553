"""Metric learning on Accelerate, on one process or many; it can be interrupted and resumed.

from hf_rfa.embeddings import MetricConfig, train_embeddings
config = MetricConfig(steps=100, loss="harmonic", output="run")
done = train_embeddings(encoder, passages.labels, config, features=text_features(encoder, passages.texts), old=vectors)
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from tqdm import tqdm
from transformers import get_scheduler

from hf_rfa.embeddings.batches import groups_of, identity_batch
from hf_rfa.embeddings.config import MetricConfig
from hf_rfa.embeddings.gather import gather_with_gradients
from hf_rfa.embeddings.losses import Loss, both, make_loss
from hf_rfa.embeddings.mining import TripletCounts, count_triplets
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.runtime.quiet import training_flags_kept
from hf_rfa.training.checkpoint import check_output, load_checkpoint, save_checkpoint
from hf_rfa.training.loop import StepHook

logger = logging.getLogger(__name__)

#: Numbers of texts -> what the encoder takes, as `SentenceTransformer.preprocess` makes it of texts.
Features = Callable[[list[int]], dict[str, Any]]


@dataclasses.dataclass
class MetricProgress:
    """What has happened so far.

    Attributes:
        losses: One for each step.
        triplets: Counts of the batch of each step, before its update.
        cpu_seconds: CPU time of this process in the steps.
        collapsed_at: The first step whose embeddings were all alike; None if there is none.
        evaluations: {"step": step, ...} of each evaluation.
    """

    step: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)
    triplets: list[TripletCounts] = dataclasses.field(default_factory=list)
    cpu_seconds: float = 0.0
    collapsed_at: int | None = None
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)
        self.triplets = [TripletCounts(**counts) for counts in state["triplets"]]


def text_features(encoder: Any, texts: Sequence[str]) -> Features:
    """What a SentenceTransformer takes, of texts by their numbers."""

    def features(numbers: list[int]) -> dict[str, Any]:
        found: dict[str, Any] = encoder.preprocess([texts[number] for number in numbers])
        return found

    return features


def train_embeddings(
    encoder: nn.Module,
    labels: Sequence[int],
    config: MetricConfig,
    *,
    features: Features,
    old: torch.Tensor | None = None,
    evaluate: Callable[[Any], Mapping[str, float]] | None = None,
    hooks: Sequence[StepHook] = (),
    description: str = "metric learning",
) -> MetricProgress:
    """Trains an encoder by `config.loss` with AdamW, in place.

    Works on one process and under `torchrun` / `accelerate launch`: of a batch each process encodes its share, and the
    loss is over all of it, so that it does not depend on the number of processes.

    Args:
        encoder: A SentenceTransformer, converted or not, or modules of sentence-transformers on stored embeddings.
        labels: The identity of each text.
        features: The encoder's inputs for texts by their numbers (`text_features`).
        old: Stored embeddings (texts, d) of the old encoder, for the loss "harmonic".
        evaluate: Called every `config.evaluate_every` steps and after the last.
        hooks: `hook.step(encoder)` after each step, for example `hf_rfa.ResampleCallback`.

    Raises:
        ConfigError: The batches do not fit the texts or the processes, or `old` does not fit the loss or the encoder.
        CheckpointError: `output` cannot be written, or its checkpoint belongs to a longer run or cannot be read.
        FloatingPointError: The loss is not finite; the message names the step.
    """
    _check(labels, config, old)
    output = None if config.output is None else Path(config.output)
    if output is not None:
        check_output(output, encoder)
    device = next(encoder.parameters()).device
    # BERT's pooler, for example, has no part in mean-pooled embeddings.
    accelerator = Accelerator(
        cpu=device.type == "cpu", kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
    )
    batch = config.identities * config.passages
    if batch % accelerator.num_processes:
        raise ConfigError(
            f"A batch of {batch} texts cannot be split over {accelerator.num_processes} processes. Set `identities` "
            "so that it can."
        )
    optimizer = torch.optim.AdamW(
        [p for p in encoder.parameters() if p.requires_grad], lr=config.learning_rate, weight_decay=config.weight_decay
    )
    warmup = config.steps // 10 if config.warmup_steps is None else config.warmup_steps
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=warmup, num_training_steps=config.steps)
    prepared, optimizer = accelerator.prepare(encoder, optimizer)
    done = MetricProgress()
    stateful: list[Any] = [h for h in hooks if hasattr(h, "state_dict") and hasattr(h, "load_state_dict")]
    accelerator.register_for_checkpointing(done, scheduler, *stateful)
    if output is not None and config.resume:
        load_checkpoint(accelerator, output, {})
    if done.step > config.steps:
        raise CheckpointError(
            f"The checkpoint in {str(output)!r} has {done.step} steps, more than `steps`={config.steps}. "
            "Raise `steps` or choose another `output`."
        )
    step = _Step(accelerator, prepared, optimizer, make_loss(config), config, features, labels, old)
    shown = config.progress and accelerator.is_main_process
    with ExitStack() as modes:
        modes.enter_context(training_flags_kept(encoder))
        modes.enter_context(_dropout(encoder, config.dropout))
        prepared.train()
        bar = modes.enter_context(
            tqdm(total=config.steps, initial=done.step, desc=description, unit="step", leave=False, disable=not shown)
        )
        while done.step < config.steps:
            started = time.process_time()
            loss, counts = step(done.step)
            scheduler.step()
            for hook in hooks:
                hook.step(encoder)  # type: ignore[arg-type]
            done.step += 1
            done.cpu_seconds += time.process_time() - started
            done.losses.append(loss)
            done.triplets.append(counts)
            _tell_collapse(done, counts)
            bar.set_postfix(loss=f"{loss:.3f}", semi_hard=f"{counts.semi_hard / counts.total:.0%}", refresh=False)
            bar.update()
            last = done.step == config.steps
            if output is not None and last and evaluate is not None:
                save_checkpoint(accelerator, output, done.step, {})  # an evaluation that fails loses no training
            if evaluate is not None and (last or done.step % config.evaluate_every == 0):
                encoder.eval()
                done.evaluations.append({"step": done.step, **evaluate(encoder)})
                prepared.train()
            if output is not None and (last or done.step % config.save_every == 0):
                save_checkpoint(accelerator, output, done.step, {})
    accelerator.free_memory()
    return done


class _Step:
    """One optimiser step."""

    def __init__(
        self, accelerator: Accelerator, prepared: nn.Module, optimizer: Any, loss: Loss, config: MetricConfig,
        features: Features, labels: Sequence[int], old: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.accelerator, self.prepared, self.optimizer = accelerator, prepared, optimizer
        self.loss, self.config, self.features, self.old = loss, config, features, old
        self.labels, self.groups = torch.tensor(list(labels)), groups_of(labels)

    def __call__(self, number: int) -> tuple[float, TripletCounts]:
        """The loss and the triplets of batch `number`, before the update that it makes."""
        config, accelerator = self.config, self.accelerator
        batch = identity_batch(
            self.groups, number, identities=config.identities, passages=config.passages, seed=config.seed
        )
        share = len(batch) // accelerator.num_processes
        own = batch[accelerator.process_index * share : (accelerator.process_index + 1) * share]
        if config.dropout:  # the same after a resume, another one in each process
            torch.manual_seed((config.seed * 1_000_003 + number) * 1024 + accelerator.process_index)
        inputs = {k: v.to(accelerator.device) if hasattr(v, "to") else v for k, v in self.features(own).items()}
        mine = F.normalize(self.prepared(inputs)["sentence_embedding"], dim=-1)
        embeddings = gather_with_gradients(mine, accelerator)
        labels = self.labels[batch].to(embeddings.device)
        old = None if self.old is None else self.old[batch].to(embeddings)
        if old is not None and old.shape[1] != embeddings.shape[1]:
            raise ConfigError(
                f"Old and new embeddings are compared with each other. Got {old.shape[1]} and {embeddings.shape[1]} "
                "dimensions. Give the new encoder the old one's dimension, or choose another loss."
            )
        loss = self.loss(embeddings, labels, old)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss of step {number + 1} is {loss.item()}. Lower `learning_rate`; the last checkpoint is whole."
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(self.prepared.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), count_triplets(*both(embeddings.detach(), labels, old), config.margin)


def _check(labels: Sequence[int], config: MetricConfig, old: torch.Tensor | None) -> None:
    """Before any work: batches can be made, and old embeddings are there exactly where they are used."""
    identity_batch(groups_of(labels), 0, identities=config.identities, passages=config.passages)
    if (old is not None) != (config.loss == "harmonic"):
        raise ConfigError(
            f"The loss 'harmonic' and `old` belong together. Got loss={config.loss!r} and old="
            f"{None if old is None else tuple(old.shape)}. Pass both or neither."
        )
    if old is not None and len(old) != len(labels):
        raise ConfigError(
            f"`old` must hold one embedding for each text. Got {len(old)} for {len(labels)}. Encode the same texts."
        )


def _tell_collapse(done: MetricProgress, counts: TripletCounts) -> None:
    if counts.collapsed and done.collapsed_at is None:
        done.collapsed_at = done.step
        logger.warning(
            "The embeddings have collapsed at step %d: texts of different identities are at a mean squared distance "
            "of %.4f. Lower `learning_rate`, or use semi-hard negatives (loss 'triplet' or 'harmonic').",
            done.step, counts.spread,
        )  # fmt: skip


@contextmanager
def _dropout(encoder: nn.Module, rate: float) -> Iterator[None]:
    """All dropout of the encoder at a rate, and back as it was."""
    before = [(module, module.p) for module in encoder.modules() if isinstance(module, nn.Dropout)]
    for module, _ in before:
        module.p = rate
    try:
        yield
    finally:
        for module, p in before:
            module.p = p
