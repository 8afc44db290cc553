"""The measurement of one model after the other on the same tokens, and the tokens that `compare` uses."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rfa.data.documents import load_documents, tokenize_documents
from hf_rfa.data.sequences import evaluation_windows, training_batches
from hf_rfa.evaluation import measures
from hf_rfa.evaluation.equal_bytes import bytes_after
from hf_rfa.evaluation.results import WINDOW_ONLY, CompareSettings, Quality
from hf_rfa.evaluation.tasks.measuring import TaskScore, TaskSettings, make_documents, measure_tasks

AnyQuality = TypeVar("AnyQuality", bound=Quality)

GREEDY_PROMPT, GREEDY_NEW, GREEDY_SAMPLES = 512, 100, 4  # tokens, tokens, prompts


class Tokens:
    """The tokens of a comparison; nothing is trained or calibrated on the held-out ones."""

    def __init__(self, settings: CompareSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings = settings
        self.longest = max(settings.contexts)
        self.first_token = tokenizer.bos_token_id
        self.train, _ = tokenize_documents(tokenizer, load_documents(settings.data, "train"))
        documents = load_documents(settings.data, "validation")
        held_out, num_bytes = tokenize_documents(tokenizer, documents)
        self.held_out = torch.cat(held_out)
        self.bytes_per_token = sum(num_bytes) / len(self.held_out)
        # The same tokens for every context: shorter windows are parts of the longest ones.
        self.evaluated = evaluation_windows(held_out, self.longest, settings.eval_windows).flatten()
        self.asked = Asked(settings.task_settings, tokenizer, (document.text for document in documents))

    def prompt(self, length: int) -> Tensor:
        """`length` held-out tokens, repeated if there are too few: the speed does not depend on the text."""
        return self.held_out.repeat(-(-length // len(self.held_out)))[:length]

    def calibration_batches(self) -> list[Tensor]:
        drawn = training_batches(self.train, self.longest, self._settings.batch_size, self._settings.seed + 1)
        return list(itertools.islice(drawn, self._settings.calibration_batches))

    def measurer(self, original: PreTrainedModel) -> "Measurer":
        return Measurer(
            original, evaluated=self.evaluated, held_out=self.held_out, bytes_per_token=self.bytes_per_token,
            contexts=self._settings.contexts, copy_gaps=self._settings.copy_gaps, first_token=self.first_token,
            first_bin=self._settings.conversion.window, asked=self.asked,
        )  # fmt: skip

    def training_batches(self) -> Iterator[Tensor]:
        s = self._settings
        return training_batches(self.train, self.longest, s.batch_size, s.seed, s.repeat_probability)


class Asked:
    """The documents of the tasks, the same for every model.

    Args:
        texts: Held-out texts, in which the tasks hide what they ask for.
    """

    def __init__(self, settings: TaskSettings, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._documents = make_documents(settings, tokenizer, "\n\n".join(texts)) if settings.tasks else {}

    def __call__(self, model: PreTrainedModel) -> list[TaskScore]:
        """The model's scores; none without tasks."""
        return measure_tasks(model, self._tokenizer, self._documents)


class Measurer:
    """Measures the quality of one model after the other on the same tokens, against the same original."""

    def __init__(
        self, original: PreTrainedModel, *, evaluated: Tensor, held_out: Tensor, bytes_per_token: float,
        contexts: Sequence[int], copy_gaps: Sequence[int], first_token: int | None, first_bin: int = 64,
        asked: Asked | None = None,
    ) -> None:  # fmt: skip
        """`evaluated`: windows of the longest context, one after the other; `held_out`: all tokens, to copy from."""
        self._asked = asked
        self._original, self._evaluated, self._held_out = original, evaluated, held_out
        self._bytes_per_token, self._contexts, self._copy_gaps = bytes_per_token, contexts, copy_gaps
        self._first_token, self._first_bin, self._longest = first_token, first_bin, max(contexts)
        self._prompt = min(GREEDY_PROMPT, self._longest // 2, len(held_out) // GREEDY_SAMPLES)
        new = min(GREEDY_NEW, self._longest - self._prompt)
        self._continuations = measures.greedy_continuations(original, held_out, self._prompt, new, GREEDY_SAMPLES)

    def __call__(self, model: PreTrainedModel) -> Quality:
        """All figures except the far recovery, which needs those of other models."""
        losses = {n: measures.token_nll(model, self._evaluated, n) for n in self._contexts}
        mean = {n: loss.double().mean().item() for n, loss in losses.items()}
        kl, agreement = 0.0, 1.0  # of the original with itself, by definition
        if model is not self._original:
            kl = measures.kl_divergence(self._original, model, self._evaluated, self._longest)
            agreement = measures.greedy_agreement(model, self._continuations, self._prompt)
        return Quality(
            perplexity={n: math.exp(nll) for n, nll in mean.items()},
            bits_per_byte={n: measures.bits_per_byte(nll, self._bytes_per_token) for n, nll in mean.items()},
            by_position=measures.perplexity_by_position(losses[self._longest], self._first_bin),
            kl_to_original=kl,
            far_recovery=None,
            copy_perplexity={
                gap: measures.copy_perplexity(model, self._held_out, gap, first_token=self._first_token)
                for gap in self._copy_gaps
            },
            greedy_agreement=agreement,
            cache_bytes=bytes_after(model, self._evaluated[: self._longest]),
            tasks=[] if self._asked is None else self._asked(model),
        )


def with_far_recovery(qualities: Mapping[str, AnyQuality], context: int) -> dict[str, AnyQuality]:
    """The same with `far_recovery` filled in, from the figures of the original (the first) and of `WINDOW_ONLY`.

    Without a model of that name it stays None.
    """
    nll = {name: math.log(quality.perplexity[context]) for name, quality in qualities.items()}
    if WINDOW_ONLY not in nll:
        return dict(qualities)
    original = next(iter(nll.values()))
    return {
        name: dataclasses.replace(quality, far_recovery=measures.far_recovery(original, nll[WINDOW_ONLY], nll[name]))
        for name, quality in qualities.items()
    }
