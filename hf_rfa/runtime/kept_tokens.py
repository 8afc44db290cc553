"""`kept_tokens`: which far tokens the heads of a converted model go on seeing exactly, and for how long."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from hf_rfa.errors import ConfigError, UnsupportedModelError
from hf_rfa.ops import kept_keys
from hf_rfa.ops.state import RFAState
from hf_rfa.runtime.arguments import cache_argument, cache_of
from hf_rfa.runtime.cache import RFACacheLayer
from hf_rfa.runtime.devices import execution_device
from hf_rfa.runtime.quiet import quiet_eval
from hf_rfa.runtime.record import base_model, conversion_config

#: Positions that a row of the table shows.
SHOWN = 8


@dataclass(frozen=True)
class KeptHead:
    """What one linear key head keeps of one row of the batch.

    Attributes:
        row, layer, key_head: Its place.
        positions: Numbers of the kept tokens in their document (padding does not count), in order.
        scores: The attention that each has received per query, of the query head that gave it most, times the norm of
            its value: those with the largest scores stay, see `hf_rfa.ops.kept_keys`.
        history: `positions` after each whole chunk of the text; empty where a cache was asked, which forgets them.
    """

    row: int
    layer: int
    key_head: int
    positions: tuple[int, ...]
    scores: tuple[float, ...]
    history: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class KeptTokens:
    """The result of `kept_tokens`; `str()` is a table.

    Attributes:
        heads: One entry for each row of the batch and each linear key head, by row, layer and head.
        tokens: Length of each row's document.
        kept_keys: The most that a head keeps.
        window: Tokens per chunk.
    """

    heads: tuple[KeptHead, ...]
    tokens: tuple[int, ...]
    kept_keys: int
    window: int

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary (row, layer, key_head, position, score) for each kept token, for a data frame."""
        return [
            {"row": h.row, "layer": h.layer, "key_head": h.key_head, "position": position, "score": score}
            for h in self.heads
            for position, score in zip(h.positions, h.scores, strict=True)
        ]

    def lifetimes(self, row: int = 0) -> torch.Tensor:
        """(heads, tokens) int64: after how many chunks of the text each head kept each token of a row.

        Raises:
            ConfigError: There is no such row, or no history: it was made of a cache.
        """
        heads = [head for head in self.heads if head.row == row]
        if not heads:
            raise ConfigError(f"`row` must be one of 0..{len(self.tokens) - 1}. Got {row!r}.")
        if not any(head.history for head in heads):
            raise ConfigError(
                "A cache knows only what is kept now, and a text of less than a chunk has no choice behind it. Pass "
                "the model and a longer text: hf_rfa.kept_tokens(model, input_ids)."
            )
        counts = torch.zeros(len(heads), self.tokens[row], dtype=torch.int64)
        for number, head in enumerate(heads):
            for positions in head.history:
                counts[number, list(positions)] += 1
        return counts

    def plot(self, path: str | Path, row: int = 0) -> None:
        """Write a map of the tokens (columns) that each head (rows) kept, coloured by how long; see `lifetimes`."""
        import matplotlib.pyplot as plt  # slow to import, and only needed here
        import numpy as np

        kept = self.lifetimes(row).numpy() * float(self.window)
        names = [f"{h.layer}.{h.key_head}" for h in self.heads if h.row == row]
        figure, axes = plt.subplots(figsize=(9, 1.6 + 0.16 * len(names)), layout="constrained")
        image = axes.imshow(
            np.where(kept, kept, np.nan), aspect="auto", cmap="viridis_r", interpolation="nearest",
            vmin=self.window, vmax=max(self.window + 1.0, kept.max()),
        )  # fmt: skip
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set(xlabel="token of the text", ylabel="layer.key head")
        axes.set_title(f"far tokens that each head kept, at most {self.kept_keys} at a time", fontsize=9)
        figure.colorbar(image, label="kept for so many tokens")
        figure.savefig(path)
        plt.close(figure)

    def __str__(self) -> str:
        lines = [
            f"at most {self.kept_keys} far tokens per key head, chosen after every {self.window}; "
            f"tokens seen: {', '.join(map(str, self.tokens))}",
            "score: attention received per query, times the norm of the value",
            "",
            "row  layer  key head  kept  best score  positions, best first",
        ]
        for h in self.heads:
            pairs = sorted(zip(h.scores, h.positions, strict=True), reverse=True)
            shown = " ".join([*(str(position) for _, position in pairs[:SHOWN]), *["..."][: len(pairs) > SHOWN]])
            best = f"{pairs[0][0]:10.5f}" if pairs else " " * 9 + "-"
            lines.append(f"{h.row:3d}  {h.layer:5d}  {h.key_head:8d}  {len(pairs):4d}  {best}  {shown}".rstrip())
        return "\n".join(lines)


def kept_tokens(model_or_cache: nn.Module | Cache, input_ids: torch.Tensor | None = None) -> KeptTokens:
    """The far tokens that each linear head of a model with `RFAConfig(kept_keys=K)` sees exactly, with their scores.

    Args:
        model_or_cache: A cache that a converted model filled: what is kept now. Or a converted language model: what
            it keeps of `input_ids`, and what it kept after each chunk of it.
        input_ids: (batch, seq) or (seq,) token ids without padding; with a model only.

    Raises:
        UnsupportedModelError: The model is not converted, keeps no keys, or is no decoder of text; or the cache was
            filled by a model of which that is true.
        ConfigError: An empty cache; `input_ids` missing, of another shape or dtype, or given with a cache.

    Example:
        >>> import torch, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> _ = torch.manual_seed(0)
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> config = hf_rfa.RFAConfig(window=16, kept_keys=3)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), config, calibrate=False).eval()
        >>> kept = hf_rfa.kept_tokens(model, torch.randint(64, (200,)))
        >>> [len(head.positions) for head in kept.heads], len(kept.rows())
        ([3, 3], 6)
        >>> kept.plot("kept_tokens.png")  # doctest: +SKIP
    """
    if isinstance(model_or_cache, Cache):
        if input_ids is not None:
            raise ConfigError(
                "A cache holds its tokens already. Got a cache and `input_ids`. Pass one of them: kept_tokens(cache), "
                "or kept_tokens(model, input_ids)."
            )
        return _of_cache(model_or_cache)
    return _over_text(model_or_cache, input_ids)


def _of_cache(cache: Cache) -> KeptTokens:
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    layers = [layer for layer in own.layers if isinstance(layer, RFACacheLayer)]
    if not own.get_seq_length() and not any(layer.seen for layer in layers):
        raise ConfigError("The cache is empty. Call the model with it first, or pass kept_tokens(model, input_ids).")
    if not layers:
        kinds = sorted({type(layer).__name__ for layer in own.layers})
        raise UnsupportedModelError(
            f"No converted model filled this cache. Got layers of {kinds}. Pass the cache of a model converted with "
            "RFAConfig(kept_keys=K)."
        )
    found = [(layer, state) for layer in _with_companions(layers) if (state := layer.state) is not None]
    found = [(layer, state) for layer, state in found if layer.linear_heads]
    most = max((_most(state) for _, state in found), default=0)
    if not most:
        raise UnsupportedModelError(
            "The model that filled this cache keeps no far keys: it was converted with kept_keys=0, or all its heads "
            "are exact. Convert with RFAConfig(kept_keys=K)."
        )
    each = [head for layer, state in found for head in _heads_of(layer, state)]
    heads, state = sorted(each, key=lambda head: (head.row, head.layer, head.key_head)), found[0][1]
    return KeptTokens(tuple(heads), tuple(state.count.tolist()), most, state.near_key.shape[2] // 2)


def _most(state: RFAState) -> int:
    """The largest number of keys that a head of a layer keeps."""
    return max(0 if part.kept_key is None else part.kept_key.shape[2] for part in (state, *state.beside))


def _with_companions(layers: list[RFACacheLayer]) -> Iterator[RFACacheLayer]:
    for layer in layers:
        yield layer
        yield from _with_companions(list(layer.companions.values()))


def _heads_of(layer: RFACacheLayer, whole: RFAState) -> Iterator[KeptHead]:
    """Every row and linear head of a layer; heads that keep equally many keys have a state of their own."""
    names = iter(layer.linear_heads)
    for state in (whole, *whole.beside):
        own = list(itertools.islice(names, state.kv_state.shape[1]))
        if state.kept_key is None:
            for row, (number, head) in itertools.product(range(len(state.count)), own):
                yield KeptHead(row, number, head, (), ())
            continue
        _, value, position, _, mass = state.kept
        window, length = state.near_key.shape[2] // 2, torch.linalg.vector_norm(value, dim=-1, dtype=mass.dtype)
        count = state.count.to(position.device).view(-1, 1, 1)
        score = kept_keys.scores(mass[..., : position.shape[2]], length, position, count, window)
        for row, (positions, scores) in enumerate(zip(position.tolist(), score.tolist(), strict=True)):
            for (number, head), places, values in zip(own, positions, scores, strict=True):
                pairs = [(place, value) for place, value in zip(places, values, strict=True) if place >= 0]
                yield KeptHead(row, number, head, tuple(p for p, _ in pairs), tuple(s for _, s in pairs))


def _over_text(model: nn.Module, input_ids: Any) -> KeptTokens:
    config, base = conversion_config(model), base_model(model)
    if not config.most_kept_keys:
        raise UnsupportedModelError(
            f"This {type(base).__name__} keeps no far keys: it was converted with kept_keys=0. Convert it with "
            "RFAConfig(kept_keys=K)."
        )
    if base.config.is_encoder_decoder or not base.can_generate():
        raise UnsupportedModelError(
            f"`kept_tokens` reads a text with a causal language model. Got a {type(base).__name__}. For the decoder "
            "of an encoder-decoder model pass the cache that it filled."
        )
    ids = _checked(input_ids).to(execution_device(base))
    cache: Any = None
    history = []
    with quiet_eval(base):
        for piece in ids.split(config.window, dim=1):  # answers do not depend on where a text is split
            output = base(input_ids=piece, use_cache=True, **{cache_argument(base): cache})
            cache = cache_of(output)
            if piece.shape[1] == config.window:
                history.append([head.positions for head in _of_cache(cache).heads])
    now = _of_cache(cache)
    each = zip(*history, strict=True) if history else [()] * len(now.heads)
    heads = tuple(
        KeptHead(h.row, h.layer, h.key_head, h.positions, h.scores, tuple(past))
        for h, past in zip(now.heads, each, strict=True)
    )
    return KeptTokens(heads, now.tokens, now.kept_keys, now.window)


def _checked(input_ids: Any) -> torch.Tensor:
    """Token ids (batch, seq)."""
    wanted = "`input_ids` must be token ids (batch, seq) or (seq,), at least one"
    if not isinstance(input_ids, torch.Tensor):
        got = "none" if input_ids is None else type(input_ids).__name__
        raise ConfigError(f"{wanted}. Got {got}. Pass a tensor, or the cache that the model filled.")
    ids = input_ids.unsqueeze(0) if input_ids.dim() == 1 else input_ids
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or not ids.numel():
        raise ConfigError(
            f"{wanted}. Got shape {tuple(input_ids.shape)}, {input_ids.dtype}. Pass what the tokenizer gives."
        )
    return ids
