"""From documents to sequences: the batches used for training, calibration and evaluation.

token_lists, num_bytes = tokenize_documents(tokenizer, load_documents("stdlib", "train"))
batches = training_batches(token_lists, context=2048, batch_size=4, seed=0, repeat_probability=0.5)
input_ids = next(batches)  # LongTensor (4, 2048)

Documents come from `hf_rfa.data.documents`; whole long documents go through `hf_rfa.data.document_batches`.
"""

import math
from collections.abc import Iterator, Sequence

import torch

from hf_rfa.errors import ConfigError

REPEAT_SPAN = (32, 256)  # tokens, shortest and longest planted repeat
REPEAT_MIN_GAP = 64  # tokens between a span's end and its repeat
_MIN_REPEAT_CONTEXT = 2 * REPEAT_SPAN[0] + REPEAT_MIN_GAP
LOOP_SHORTEST, LOOP_LONGEST = 128, 4 / 5  # tokens; share of the context
_MIN_LOOP_CONTEXT = math.ceil(LOOP_SHORTEST / LOOP_LONGEST)


def evaluation_windows(
    token_lists: Sequence[torch.Tensor], context: int, max_windows: int | None = None
) -> torch.Tensor:
    """Consecutive windows of `context` tokens, each inside one document.

    With `max_windows` they are spaced evenly over all documents.

    Returns:
        LongTensor (num_windows, context).

    Raises:
        ConfigError: no document reaches `context` tokens.
    """
    windows = [ids[i : i + context] for ids in token_lists for i in range(0, len(ids) - context + 1, context)]
    if not windows:
        longest = max((len(ids) for ids in token_lists), default=0)
        raise ConfigError(
            f"No document reaches the context of {context} tokens: the longest has {longest}. Use a context of at "
            f"most {longest}, or longer documents."
        )
    if max_windows is not None and max_windows < len(windows):
        windows = [windows[i * len(windows) // max_windows] for i in range(max_windows)]
    return torch.stack(windows)


def training_batches(
    token_lists: Sequence[torch.Tensor], context: int, batch_size: int, seed: int, repeat_probability: float = 0.0,
    loop_probability: float = 0.0,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """Endless batches from random positions in the concatenated documents, determined by `seed`.

    With probability `repeat_probability` a sequence gets one to four planted repeats: an earlier span of
    `REPEAT_SPAN` tokens (at most a quarter of the context) is pasted over the text at a random later place, at least
    `REPEAT_MIN_GAP` tokens after its end. Only a model that retrieves from beyond the window predicts these.

    With probability `loop_probability` it is a loop instead: its first tokens, `LOOP_SHORTEST` or more and at most
    `LOOP_LONGEST` of the context, repeat until it is full. Half of all tokens can then be retrieved, twice as many as
    with planted repeats, and in longer spans: heads that no longer retrieve learn it again in a fraction of the steps.
    Mix loops with plain text, or the model learns to repeat itself.

    Yields:
        LongTensor (batch_size, context).

    Raises:
        ConfigError: `context` or `batch_size` below 1, fewer than `context` tokens in all documents together, a
            probability outside [0, 1], or a context too short for a planted repeat or a loop.
    """
    if context < 1 or batch_size < 1:
        raise ConfigError(f"`context` and `batch_size` must be at least 1. Got {context} and {batch_size}.")
    for name, share in (("repeat_probability", repeat_probability), ("loop_probability", loop_probability)):
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"`{name}` must be in [0, 1]. Got {share}. Set, for example, 0.5.")
    if repeat_probability and context < _MIN_REPEAT_CONTEXT:
        raise ConfigError(
            f"A context of {context} tokens has no room for a repeat beyond {REPEAT_MIN_GAP} tokens. Use a context of "
            f"at least {_MIN_REPEAT_CONTEXT}, or set `repeat_probability=0`."
        )
    if loop_probability and context < _MIN_LOOP_CONTEXT:
        raise ConfigError(
            f"A context of {context} tokens has no room for a loop of {LOOP_SHORTEST} tokens or more. Use a context "
            f"of at least {_MIN_LOOP_CONTEXT}, or set `loop_probability=0`."
        )
    total = sum(len(ids) for ids in token_lists)
    if total < context:
        raise ConfigError(
            f"The documents hold {total} tokens together, fewer than one sequence of {context}. Use a context of at "
            f"most {total}, or more text."
        )
    # The generator is a separate function, so that the checks run at the call and not at the first `next`.
    return _draw_batches(torch.cat(list(token_lists)), context, batch_size, seed, repeat_probability, loop_probability)


def _draw_batches(
    ids: torch.Tensor, context: int, batch_size: int, seed: int, repeat_probability: float, loop_probability: float
) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int) -> int:  # both ends included
        return int(torch.randint(low, high + 1, (), generator=generator))

    while True:
        starts = torch.randint(len(ids) - context + 1, (batch_size,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + context] for start in starts])
        planted = torch.rand(batch_size, generator=generator) < repeat_probability
        if loop_probability:  # without it the draws are those of versions without loops
            looped = torch.rand(batch_size, generator=generator) < loop_probability
            for sequence in (batch[i] for i in looped.nonzero()[:, 0].tolist()):
                period = randint(LOOP_SHORTEST, int(LOOP_LONGEST * context))
                sequence.copy_(sequence[:period].repeat(-(-context // period))[:context])
            planted &= ~looped
        for sequence in (batch[i] for i in planted.nonzero()[:, 0].tolist()):
            for _ in range(randint(1, 4)):
                longest = min(REPEAT_SPAN[1], max(REPEAT_SPAN[0], context // 4))
                span = randint(REPEAT_SPAN[0], min(longest, (context - REPEAT_MIN_GAP) // 2))
                source = randint(0, context - 2 * span - REPEAT_MIN_GAP)
                target = randint(source + span + REPEAT_MIN_GAP, context - span)
                sequence[target : target + span] = sequence[source : source + span].clone()
        yield batch
