"""Which keys each chunk of a call keeps, chosen by a kernel, and the far kernel of the keys that are evicted."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from hf_rfa.ops import kept_keys
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.chunked import Aligned
from hf_rfa.ops.causal.rivals import mass_so_far, places_of_rivals, value_lengths
from hf_rfa.ops.layout import Plan
from hf_rfa.ops.recomputing import Flags, recomputing
from hf_rfa.ops.triton.choice import choose
from hf_rfa.ops.triton.fold_tokens import Side, fold_keys
from hf_rfa.ops.triton.sizes import on_device, precision, tile_size, token_rows

#: The most kept keys whose scores a program of `choose` has in its registers.
LIST_TILE = 128
#: Warps of a program.
CHOICE_WARPS = 4


@dataclasses.dataclass(frozen=True)
class Choice:
    """The keys that a call keeps, as entries of the pool of `exact`; -1 in empty places. A = B * Hk, n chunks.

    Attributes:
        listed: (A, n + 1, s + K) int32: the sinks, then the kept keys, that the queries of each chunk see; the last
            row has those kept after the last chunk.
        evicted: (A, T) int32: in the places of chunk i, the keys added to the far sums with it, after chunk i + 1.
        mass: (A, G, K + n * C): attention received by the keys in `last`, then by the tokens.
        last: (A, K) int64: the keys kept after the last chunk, counted without the sinks.
    """

    listed: torch.Tensor
    evicted: torch.Tensor
    mass: torch.Tensor
    last: torch.Tensor


def choose_keys(aligned: Aligned, call: OperatorCall) -> Choice:
    """The choice for a call with kept keys, without gradients."""
    x, plan, state = aligned.inputs, aligned.plan, aligned.state
    recipe = _Recipe(plan, call.scaling, call.window, call.kept_of_heads)
    mass = mass_so_far(state, plan)
    tensors = (x.query, x.key, x.value, x.sink_key, x.sink_logits, x.kept_key, x.kept_value, state.kept[2], mass)
    return Choice(*recomputing(recipe, *tensors))


def fold_evicted(aligned: Aligned, call: OperatorCall, choice: Choice) -> Side:
    """The far kernel for keys in the order of their eviction, with the log-scale -inf where nothing is evicted."""
    x = aligned.inputs
    assert x.kept_key is not None
    sides = [fold_keys(keys, call.far, call.scaling) for keys in (x.kept_key, x.key)]
    index = (choice.evicted - x.sink_key.shape[2]).clamp_min(0).view(*x.key.shape[:2], -1).long()
    r, log_scale = (torch.cat([getattr(s, name) for s in sides], 2).gather(2, index) for name in ("r", "log_scale"))
    nothing = choice.evicted.view(index.shape) < 0
    return dataclasses.replace(sides[1], r=r, log_scale=log_scale.masked_fill(nothing, -torch.inf))


@functools.lru_cache(maxsize=256)
def _numbers(of_heads: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(of_heads, dtype=torch.int32, device=device)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """See `ops.recomputing`; none of the outputs has a gradient."""

    plan: Plan
    scaling: float
    window: int
    kept_of_heads: tuple[int, ...]
    outputs: int = len(dataclasses.fields(Choice))
    constant: tuple[int, ...] = tuple(range(outputs))
    forward_only: tuple[int, ...] = ()

    def forward(self, tensors: Sequence[Any], followed: Flags) -> tuple[torch.Tensor, ...]:
        query, key, value, sink_key, logits, kept_key, kept_value, position, mass = tensors
        plan, kind = self.plan, query.dtype
        (batch, heads, groups, length, dim), (sinks, count) = query.shape, (sink_key.shape[2], kept_key.shape[2])
        every, (chunks, size) = batch * heads, plan.token_mask.shape[1:]
        lengths = value_lengths(kept_value, value, plan, torch.float32).flatten(0, 1)
        places = self._rows(places_of_rivals(plan, sinks).flatten(1), batch, heads)
        position = position.flatten(0, 1)
        listed = self._lists(position, batch, heads, sinks, key.device)
        evicted = listed.new_full((every, chunks, size), -1)
        # Sinks, which never compete, take part in no score.
        positions = torch.cat([position.new_full((every, sinks), -1), position, places], dim=1).int()
        lengths = torch.cat([lengths.new_zeros(every, sinks), lengths], dim=1)
        mass = mass.flatten(0, 1).float()
        mass = torch.cat([mass.new_zeros(every, groups, sinks), mass], dim=2)
        query, key = token_rows(query), token_rows(key.to(kind))
        state_key = torch.cat([sink_key, kept_key], dim=2).to(kind)
        codes, flags, _ = plan.codes
        ranks, numbers = plan.rank.int(), _numbers(self.kept_of_heads, key.device)
        code_row, flag_row = (0, 0) if len(codes) == 1 else (codes.stride(0), flags.stride(0))
        with on_device(query):
            choose[(every,)](
                query, key, state_key, mass if logits is None else logits.float().contiguous(), codes, flags, ranks,
                numbers, positions, lengths, mass, listed, evicted, *query.stride()[:4], *key.stride()[:3], code_row,
                flag_row, heads, groups, length, chunks, sinks + count, positions.shape[1], self.scaling,
                kept_keys.least_distance(self.window), D=dim, BD=tile_size(dim), C=size, BC=tile_size(size), S=sinks,
                BS=tile_size(sinks), K=count, BN=min(LIST_TILE, tile_size(count)), BR=tile_size(count + size),
                LOGITS=int(logits is not None), PRECISION=precision(kind), num_warps=CHOICE_WARPS, num_stages=1,
            )  # fmt: skip
        last = listed[:, -1, sinks:].long()
        of_last = mass.gather(2, last.clamp_min(0).unsqueeze(1).expand(-1, groups, -1))
        mass = torch.cat([of_last, mass[..., sinks + count :]], dim=2)
        # Far sums are read behind the evicted keys' chunk, so the last chunk's places are never filled.
        evicted = evicted.flatten(1)[:, :length].contiguous()
        return listed, evicted, mass, torch.where(last >= 0, last - sinks, -1)

    def _lists(self, position: torch.Tensor, batch: int, heads: int, sinks: int, device: torch.device) -> torch.Tensor:
        """`Choice.listed` with the sinks of all chunks, and the kept keys that the first one has from the state."""
        plan, (every, count) = self.plan, position.shape
        size, slots = plan.token_mask.shape[-1], torch.arange(sinks + count, device=device)
        listed = slots.new_full((every, plan.rank.shape[1] + 1, sinks + count), -1, dtype=torch.int32)
        first = plan.sink_chunk.unsqueeze(-1)
        of_sinks = torch.where(first < 0, slots[:sinks], sinks + count + first * size + slots[:sinks])
        of_sinks = of_sinks.masked_fill((plan.rank <= 1).unsqueeze(-1), -1)
        listed[:, :-1, :sinks] = self._rows(of_sinks, batch, heads)
        continues = self._rows(plan.segment_ids[:, :1] == 0, batch, heads)
        listed[:, 0, sinks:] = torch.where((position >= 0) & continues, slots[sinks:], -1)
        return listed

    @staticmethod
    def _rows(x: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
        """(R, ...) expanded to (A, ...)."""
        return x.expand(batch, *x.shape[1:]).repeat_interleave(heads, 0)

    def backward(self, *_: object) -> Sequence[torch.Tensor | None]:
        raise AssertionError("a choice has no gradient")
