"""The tokens that the main job uses, and its measurement of one model after the other on them."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_rfa.data.documents import load_documents, tokenize_documents
from hf_rfa.data.sequences import evaluation_windows, training_batches
from hf_rfa.evaluation import measures
from hf_rfa.evaluation.results import ORIGINAL, WINDOW_ONLY, CompareSettings, Quality

GREEDY_PROMPT, GREEDY_NEW, GREEDY_SAMPLES = 512, 100, 4  # tokens, tokens, prompts


class Tokens:
    """The tokens that a comparison is made with; held-out ones are never trained or calibrated on."""

    def __init__(self, settings: CompareSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings = settings
        self.longest = max(settings.contexts)
        self.first_token = tokenizer.bos_token_id
        self.train, _ = tokenize_documents(tokenizer, load_documents(settings.data, "train"))
        held_out, num_bytes = tokenize_documents(tokenizer, load_documents(settings.data, "validation"))
        self.held_out = torch.cat(held_out)
        self.bytes_per_token = sum(num_bytes) / len(self.held_out)
        # The same tokens for every context: shorter windows are parts of the longest ones.
        self.evaluated = evaluation_windows(held_out, self.longest, settings.eval_windows).flatten()

    def prompt(self, length: int) -> Tensor:
        """So many held-out tokens, over again if there are too few: what they say makes no difference to the speed."""
        return self.held_out.repeat(-(-length // len(self.held_out)))[:length]

    def calibration_batches(self) -> list[Tensor]:
        drawn = training_batches(self.train, self.longest, self._settings.batch_size, self._settings.seed + 1)
        return list(itertools.islice(drawn, self._settings.calibration_batches))

    def training_batches(self) -> Iterator[Tensor]:
        s = self._settings
        return training_batches(self.train, self.longest, s.batch_size, s.seed, s.repeat_probability)


class Measurer:
    """Measures the quality of one model after the other on the same tokens, against the same original."""

    def __init__(self, original: PreTrainedModel, tokens: Tokens, settings: CompareSettings) -> None:
        self._original, self._tokens, self._settings = original, tokens, settings
        self._prompt = min(GREEDY_PROMPT, tokens.longest // 2)
        new = min(GREEDY_NEW, tokens.longest - self._prompt)
        self._continuations = measures.greedy_continuations(
            original, tokens.held_out, self._prompt, new, GREEDY_SAMPLES
        )

    def __call__(self, model: PreTrainedModel) -> Quality:
        tokens, contexts = self._tokens, self._settings.contexts
        losses = {n: measures.token_nll(model, tokens.evaluated, n) for n in contexts}
        mean = {n: loss.double().mean().item() for n, loss in losses.items()}
        kl, agreement = 0.0, 1.0  # of the original with itself, by definition
        if model is not self._original:
            kl = measures.kl_divergence(self._original, model, tokens.evaluated, tokens.longest)
            agreement = measures.greedy_agreement(model, self._continuations, self._prompt)
        return Quality(
            perplexity={n: math.exp(nll) for n, nll in mean.items()},
            bits_per_byte={n: measures.bits_per_byte(nll, tokens.bytes_per_token) for n, nll in mean.items()},
            by_position=measures.perplexity_by_position(losses[tokens.longest], self._settings.window),
            kl_to_original=kl,
            far_recovery=None,
            copy_perplexity={
                gap: measures.copy_perplexity(model, tokens.held_out, gap, first_token=tokens.first_token)
                for gap in self._settings.copy_gaps
            },
            greedy_agreement=agreement,
        )


def with_far_recovery(qualities: dict[str, Quality], context: int) -> dict[str, Quality]:
    """The same with `far_recovery` filled in, which needs the figures of the original and of the window alone."""
    nll = {name: math.log(quality.perplexity[context]) for name, quality in qualities.items()}
    return {
        name: dataclasses.replace(
            quality, far_recovery=measures.far_recovery(nll[ORIGINAL], nll[WINDOW_ONLY], nll[name])
        )
        for name, quality in qualities.items()
    }
