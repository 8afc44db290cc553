"""Passkey retrieval: the model is asked, at the end of a long text, for tokens that occur once in it.

    filler ... [marker key] ... filler [marker] -> key

The needle is planted at a depth, 0 (the beginning) to 1 (just before the end). It consists of plain tokens and needs
no instruction, so that small models can be tested too: a model that copies from far away answers.
Source: Mohtashami and Jaggi 2023 (passkey), Kamradt 2023 (needle in a haystack, by depth and length).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.measures import next_token_nll, window_logits
from hf_rfa.runtime.quiet import evaluation_mode

#: Number of tokens of the marker, which is repeated to ask for the key, and of the key.
MARKER, KEY = 16, 8


@dataclass(frozen=True)
class PasskeyScore:
    """One cell of the depth-by-length table."""

    length: int
    depth: float
    accuracy: float  # share of the key's tokens that are ranked first, given those before
    nll: float  # of the key's tokens, nats/token


def passkey_retrieval(
    model: PreTrainedModel,
    ids: Tensor,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75),
    samples: int = 4,
    first_token: int | None = None,
    seed: int = 0,
) -> list[PasskeyScore]:
    """Scores at each length (tokens, everything included) and depth, averaged over `samples`.

    Args:
        ids: token ids (N,) of ordinary text, for the filler. Marker and key are spans of it, from elsewhere, whose
            key tokens are shuffled: the text itself does not say what follows.

    Raises:
        ConfigError: a length with no room for the needle, a depth outside [0, 1], or too little text.
    """
    shortest = 2 * (MARKER + KEY) + 1
    if min(lengths, default=0) < shortest or not all(0 <= depth <= 1 for depth in depths) or samples < 1:
        raise ConfigError(
            f"Needs lengths of at least {shortest} tokens, depths in [0, 1] and `samples` >= 1. Got {list(lengths)}, "
            f"{list(depths)} and {samples}."
        )
    if len(ids) < 2 * max(lengths):
        raise ConfigError(f"A length of {max(lengths)} needs {2 * max(lengths)} tokens of text. Got {len(ids)}.")
    start = ids.new_tensor([] if first_token is None else [first_token])
    scores = []
    with evaluation_mode(model):
        for length in lengths:
            for depth in depths:
                # The same needles at every depth, so that only the depth differs.
                generator = torch.Generator().manual_seed(seed)
                hits, losses = [], []
                for number in range(samples):
                    sequence = _haystack(ids, length - len(start), depth, generator)
                    sequence = torch.cat([start, sequence])
                    logits = window_logits(model, sequence, f"passkey {number} at length {length}")
                    logits, key = logits[-KEY - 1 : -1], sequence[-KEY:].to(logits.device)
                    hits.append((logits.argmax(-1) == key).float().mean())
                    losses.append(next_token_nll(logits, key).mean())
                accuracy, nll = torch.stack(hits).mean().item(), torch.stack(losses).mean().item()
                scores.append(PasskeyScore(length, depth, accuracy, nll))
    return scores


def _haystack(ids: Tensor, length: int, depth: float, generator: torch.Generator) -> Tensor:
    def span(size: int) -> Tensor:
        first = int(torch.randint(len(ids) - size + 1, (), generator=generator))
        return ids[first : first + size]

    marker, key = span(MARKER), span(KEY * 8)[torch.randperm(KEY * 8, generator=generator)[:KEY]]
    filler = span(length - 2 * (MARKER + KEY))
    place = round(depth * len(filler))
    return torch.cat([filler[:place], marker, key, filler[place:], marker, key])
