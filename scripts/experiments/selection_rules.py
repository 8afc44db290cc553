"""Rules by which a head may choose its kept keys, and one layer's attention under any of them, plainly.

A rule is a score: at each chunk's end it sees the candidates and says which of them matter most. To try another one,
add a line to `RULES`. Everything else is as in `hf_rfa.ops.kept_keys`: near keys, sinks and K kept keys are seen
exactly, the keys that lose go to the far sums for good.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops import kept_keys
from hf_rfa.ops.combine import Part

#: The kernel whose sums the rules with `recall` ask.
RECALLED = "hyperbolic"


@dataclass(frozen=True)
class Layer:
    """What one layer computes on one text: Hk key heads with G query heads each, S draws of the next tokens.

    Attributes:
        query (Hk, G, N, D), key (Hk, N, D), value (Hk, N, M): scaling is not applied yet.
        exact: (Hk, G, N, M) softmax attention.
        gradients: (S, Hk, G, N, M) of log p(drawn next tokens).
        grams: (Hk, G M, G M) W_h^T W_h of the output projection.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    exact: torch.Tensor
    gradients: torch.Tensor
    grams: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Candidates:
    """L keys of each key head after `count` tokens.

    Attributes:
        mass: (Hk, G, L) sum of the weights that the counted queries of each query head gave.
        queries: (L,) or (Hk, L) how many they were.
        position: (Hk, L) number of the token.
        length, output_length: (Hk, L) |v| and (Hk, G, L) |W v| for the output projection W of each query head.
        chance: (Hk, L) one random number per key.
        recall: () -> (Hk, L), |v - what the far sums say for the key itself|.
    """

    mass: torch.Tensor
    queries: torch.Tensor
    position: torch.Tensor
    length: torch.Tensor
    output_length: torch.Tensor
    chance: torch.Tensor
    recall: Callable[[], torch.Tensor]
    count: int
    window: int

    @property
    def mean(self) -> torch.Tensor:
        """(Hk, G, L) mean weight."""
        return self.mass / self.queries.clamp_min(1).unsqueeze(-2)


@dataclass(frozen=True)
class Rule:
    """A score (Hk, L) of candidates, and which queries count for it.

    Attributes:
        distance: d; the queries nearer than d tokens do not count.
        decay: Earlier weights are multiplied by it at every chunk.
        frozen: Only queries to which the key is near count.
        recalls: Whether it needs the far sums of `RECALLED`.
    """

    score: Callable[[Candidates], torch.Tensor]
    distance: int = 8
    decay: float = 1.0
    frozen: bool = False
    recalls: bool = False


def _product(c: Candidates) -> torch.Tensor:
    return kept_keys.scores(c.mass, c.length, c.position, c.count, c.window)


def _reserve(c: Candidates) -> torch.Tensor:
    newest = c.position >= c.count - c.window - 32
    return torch.where(newest, torch.inf, _product(c))


PRODUCT = "the package's: d = 8, |v|, max"
RULES: Mapping[str, Rule] = {
    PRODUCT: Rule(_product),
    "mean mass": Rule(lambda c: c.mean.mean(1), distance=0),
    "d = 8": Rule(lambda c: c.mean.mean(1)),
    "d = 16": Rule(lambda c: c.mean.mean(1), distance=16),
    "d = 8, max": Rule(lambda c: c.mean.amax(1)),
    "|v|": Rule(lambda c: c.mean.mean(1) * c.length, distance=0),
    "d = 8, |v|": Rule(lambda c: c.mean.mean(1) * c.length),
    "d = 8, |W v|": Rule(lambda c: (c.mean * c.output_length).mean(1)),
    "d = 8, |W v|, max": Rule(lambda c: (c.mean * c.output_length).amax(1)),
    "d = 8, |v|, max, decay 0.9": Rule(lambda c: c.mean.amax(1) * c.length, decay=0.9),
    "d = 8, |v|, max, frozen": Rule(lambda c: c.mean.amax(1) * c.length, frozen=True),
    "d = 8, |v|, max, 32 newest stay": Rule(_reserve),
    "recall error (LoLA)": Rule(lambda c: c.recall(), recalls=True),
    "d = 8, recall error, max": Rule(lambda c: c.mean.amax(1) * c.recall(), recalls=True),
    "random": Rule(lambda c: c.chance),
    "newest": Rule(lambda c: c.position.float()),
}


class FarFeatures:
    """psi of a layer's queries and keys for one far kernel, and the sums over the keys that were added.

    Attributes:
        query (Hk, G, N, F), query_scale (Hk, G, N); key (Hk, N, F), all keys under one log-scale `top` (Hk,).
    """

    def __init__(self, kernel: FarKernel, layer: Layer) -> None:
        query, query_scale = kernel.query_features(layer.query[None], layer.scaling)
        key, key_scale = kernel.key_features(layer.key[None], layer.scaling)
        self.query, self.query_scale = query[0], query_scale[0]
        self.top = key_scale[0].amax(1)
        self.key = key[0] * (key_scale[0] - self.top[:, None]).exp().unsqueeze(-1)
        self.of_keys = kernel.query_features(layer.key[None], layer.scaling)[0][0]
        self.rows = torch.cat([layer.value, torch.ones_like(layer.value[..., :1])], dim=-1)  # [v, 1]
        self.reset()

    def reset(self) -> None:
        """Forget all keys."""
        self.sums = self.key.new_zeros(len(self.key), self.key.shape[-1], self.rows.shape[-1])

    def add(self, index: torch.Tensor) -> None:
        """Add the keys (Hk, E) to the sums."""
        self.sums += rows_of(self.key, index).mT @ rows_of(self.rows, index)

    def answer(self, span: slice) -> Part:
        """The far part of the queries of a span, without gamma."""
        estimate = self.query[:, :, span] @ self.sums.unsqueeze(1)
        return self.part(estimate, span)

    def part(self, estimate: torch.Tensor, span: slice) -> Part:
        """(Hk, G, C, M + 1) sums of a span as a part."""
        return Part(estimate[..., :-1], estimate[..., -1], self.query_scale[:, :, span] + self.top[:, None, None])

    def recall(self, index: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(Hk, L) |v_j - S^T psi(k_j) / z.psi(k_j)| for the keys (Hk, L)."""
        estimate = rows_of(self.of_keys, index) @ self.sums
        mass = estimate[..., -1:]
        mean = torch.where(mass > 0, estimate[..., :-1] / mass.clamp_min(1e-30), 0.0)
        return (rows_of(value, index) - mean).norm(dim=-1)


def rows_of(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x (Hk, N, E) at (Hk, L): (Hk, L, E)."""
    first = torch.arange(len(x)).unsqueeze(1) * x.shape[1]  # of each head; a plain gather takes many times as long
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).view(*index.shape, x.shape[-1])


def attend(
    layer: Layer, rule: Rule, kept: int, far: Mapping[str, FarFeatures], *, window: int, sinks: int
) -> tuple[Part, dict[str, Part]]:
    """The exact part (its numerator is the output, its log_scale the log-normaliser) and each kernel's far part."""
    query, key, value = layer.query * layer.scaling, layer.key, layer.value
    heads, groups, length, _ = query.shape
    note = _Notes(layer, rule, window)
    for features in far.values():
        features.reset()
    everything = torch.arange(length)
    index = everything[:0].expand(heads, 0)
    exact, parts = [], {name: list[Part]() for name in far}
    for start in range(0, length, window):
        end, near = min(length, start + window), max(0, start - window)
        if near:
            leaving = everything[max(sinks, near - window) : near].expand(heads, -1)
            index = torch.cat([index, leaving], dim=1)
            if index.shape[1] > kept:
                score = rule.score(note.candidates(index, start, far)) if kept else index.float()
                going, staying = kept_keys.split(score, kept, all_keys=True)
                for features in far.values():
                    features.add(index.gather(1, going))
                index = index.gather(1, staying)
        old = torch.cat([everything[: sinks if near else 0].expand(heads, -1), index], dim=1)
        keys, values = (torch.cat([rows_of(x, old), x[:, near:end]], dim=1) for x in (key, value))
        logits = (query[:, :, start:end].flatten(1, 2) @ keys.mT).view(heads, groups, end - start, -1)
        logits[..., old.shape[1] :].masked_fill_(everything[near:end] > everything[start:end, None], -torch.inf)
        highest = logits.amax(-1, keepdim=True)
        weights = logits.sub_(highest).exp_()
        total = weights.sum(-1, keepdim=True)
        output = (weights.flatten(1, 2) @ values).view(heads, groups, end - start, -1) / total
        exact.append(Part(output, torch.ones_like(total[..., 0]), (highest + total.log())[..., 0]))
        for name, features in far.items():
            parts[name].append(features.answer(slice(start, end)))
        if kept:
            note.add(weights, 1 / total, old, slice(near, end), start)
    return _joined(exact), {name: _joined(each) for name, each in parts.items()}


def oracle(
    layer: Layer, wanted: Mapping[int, Mapping[str, FarFeatures]], *, window: int, sinks: int
) -> dict[int, tuple[Part, dict[str, Part]]]:
    """As `attend`, where each query sees those K of its own far keys that have the largest weight.

    wanted: The far kernels by K.
    """
    query, key, value = layer.query * layer.scaling, layer.key, layer.value
    everything = torch.arange(query.shape[2])
    found = {kept: (list[Part](), {name: list[Part]() for name in far}) for kept, far in wanted.items()}
    for start in range(0, len(everything), window):
        end, near = min(len(everything), start + window), max(0, start - window)
        span, seen = slice(start, end), everything[:end]
        logits = query[:, :, span] @ key[:, None, :end].mT
        logits.masked_fill_(seen > everything[span, None], -torch.inf)
        is_far = (seen >= sinks) & (seen < near)
        best = logits[..., sinks : max(near, sinks)].sort(descending=True).values
        for kept, (exact, parts) in found.items():
            left = is_far.expand_as(logits)
            if kept:
                more = best.shape[-1] >= kept
                left = left & (logits < best[..., kept - 1 : kept]) if more else torch.zeros_like(left)
            shown = logits.masked_fill(left, -torch.inf)
            total = shown.logsumexp(-1)
            output = (shown - total.unsqueeze(-1)).exp_() @ value[:, None, :end]
            exact.append(Part(output, torch.ones_like(total), total))
            for name, features in wanted[kept].items():
                weights = (features.query[:, :, span] @ features.key[:, None, :end].mT) * left
                parts[name].append(features.part(weights @ features.rows[:, None, :end], span))
    return {kept: (_joined(e), {name: _joined(p) for name, p in parts.items()}) for kept, (e, parts) in found.items()}


class _Notes:
    """What each key of a layer has received so far."""

    def __init__(self, layer: Layer, rule: Rule, window: int) -> None:
        self.rule, self.window, self.value = rule, window, layer.value
        self.distance = min(rule.distance, window)
        heads, groups, length, width = layer.exact.shape
        self.mass = layer.query.new_zeros(heads, groups, length)
        self.queries = layer.query.new_zeros(length)
        self.length = layer.value.norm(dim=-1)
        blocks = layer.grams.unflatten(2, (groups, width)).unflatten(1, (groups, width))
        own = blocks.diagonal(dim1=1, dim2=3)  # (Hk, M, M, G)
        square = torch.einsum("hnm,hmeg,hne->hgn", layer.value, own, layer.value)
        self.output_length = square.clamp_min(0).sqrt()
        self.chance = torch.rand(heads, length, generator=torch.Generator().manual_seed(0))

    def candidates(self, index: torch.Tensor, count: int, far: Mapping[str, FarFeatures]) -> Candidates:
        """The keys (Hk, L) as they stand."""
        of_groups = index.unsqueeze(1).expand(-1, self.mass.shape[1], -1)
        return Candidates(
            self.mass.gather(2, of_groups), self.queries[index], index, self.length.gather(1, index),
            self.output_length.gather(2, of_groups), self.chance.gather(1, index),
            lambda: far[RECALLED].recall(index, self.value), count, self.window,
        )  # fmt: skip

    def add(
        self, weights: torch.Tensor, share: torch.Tensor, old: torch.Tensor, near: slice, start: int
    ) -> None:  # fmt: skip
        """Add what the queries of a chunk from `start` on give: weights (Hk, G, C, L) times share (Hk, G, C, 1).

        The keys are the old ones (Hk, E), then the near ones.
        """
        mine = torch.arange(start, near.stop)
        counts = (mine[:, None] - torch.arange(near.start, near.stop) >= self.distance).to(weights)
        weights[..., old.shape[1] :] *= counts
        given = (share.mT @ weights).squeeze(2)
        self.mass *= self.rule.decay
        self.queries *= self.rule.decay
        if not self.rule.frozen:
            received = given[..., : old.shape[1]]
            self.mass.scatter_add_(2, old.unsqueeze(1).expand(-1, received.shape[1], -1), received)
            self.queries[: near.start] += len(mine)
        self.mass[:, :, near] += given[..., old.shape[1] :]
        self.queries[near] += counts.sum(0)


def _joined(parts: list[Part]) -> Part:
    fields: Any = zip(*(vars(part).values() for part in parts), strict=True)
    return Part(*(torch.cat(tensors, dim=2) for tensors in fields))
