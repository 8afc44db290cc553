"""The kept keys of decoding heads: the attention that each exact key has received, and the choice at a chunk's end."""

import dataclasses
from collections.abc import Sequence

import torch

from hf_rfa.ops import kept_keys
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import Part
from hf_rfa.ops.state import RFAState


@dataclasses.dataclass(frozen=True)
class Rivals:
    """The keys that compete at the end of a chunk.

    Attributes:
        counts: Tokens of each row, the last one included.
        candidates: (B, C) bool: which keys of the chunk that leaves the window may be kept.
        moved: (B, 1) bool: the rows in which a chunk leaves the window.
        lengths: (B, Hk, K + C) |v| of the kept keys and of that chunk.
        behind: (B, Hk, C) log g summed from behind each of its keys; None without a gate.
    """

    counts: Sequence[int]
    candidates: torch.Tensor
    moved: torch.Tensor
    lengths: torch.Tensor
    behind: torch.Tensor | None


class KeepingHeads:
    """Mass, position and decay for the tables `[kept | sinks | chunk c0 - 1 | chunk c0]` of `RecurrentHeads`.

    A token's slot among the last two chunks is its place in them, so that everything about a key is stored at its
    slot. Only log g has a gradient.
    """

    def __init__(self, call: OperatorCall, state: RFAState) -> None:
        _, _, self.position, decay, mass = state.kept
        self._window, self._count, self._sinks = call.window, call.kept_keys, state.sink_key.shape[2]
        self._sink_logits = call.sink_logits
        self.decay, mass = decay.to(call.query.dtype), mass.to(call.query.dtype)
        near = self._count + self._sinks
        self._mass = mass.new_zeros(*mass.shape[:3], near + 2 * self._window)  # the mass of sinks is never used
        self._mass[..., : self._count], self._mass[..., near:] = mass[..., : self._count], mass[..., self._count :]

    def into(self, state: RFAState, key: torch.Tensor, value: torch.Tensor) -> RFAState:
        """The state of `RecurrentHeads` with the kept keys and values (B, Hk, K, D or M) added."""
        kept, _, near = self._mass.split([self._count, self._sinks, 2 * self._window], dim=-1)
        return dataclasses.replace(
            state, kept_key=key, kept_value=value, kept_position=self.position.clone(), kept_decay=self.decay.clone(),
            mass=torch.cat([kept, near], dim=-1),
        )  # fmt: skip

    def select_rows(self, index: torch.Tensor) -> None:
        """Continue with these rows (n,) of the batch."""
        self.position, self.decay = self.position.index_select(0, index), self.decay.index_select(0, index)
        self._mass = self._mass.index_select(0, index)

    def put_rows(self, index: torch.Tensor, part: "KeepingHeads") -> None:
        """Take over the rows of `part` as the rows `index` (n,) of the batch; without gradients."""
        self.position = self.position.index_copy(0, index, part.position)
        self.decay = self.decay.index_copy(0, index, part.decay)
        self._mass[index] = part._mass

    def forget(self, log_gate: torch.Tensor) -> None:
        """Add a new token's log g (B, Hk) to the decay of all kept keys."""
        self.decay = torch.where(self.position < 0, self.decay, self.decay + log_gate.unsqueeze(-1))

    @torch.no_grad()
    def receive(self, weights: torch.Tensor, part: Part, slots: slice, counted: torch.Tensor | None) -> None:
        """Add the attention that a token's queries give to the exact keys.

        Args:
            weights: (B, Hk, G, W) unnormalised weights of the exact keys, which begin with those in `slots`.
            part: Their sums, see `near_part_and_weights`.
            counted: (B, slots or 1) bool: for which keys the token counts, for none if it is padding; None: for all.
        """
        whole = part.denominator
        if self._sink_logits is not None:
            whole = whole + (self._sink_logits.to(whole.dtype) - part.log_scale).exp()
        given = weights[..., : slots.stop - slots.start] / whole.unsqueeze(-1)
        self._mass[..., slots] += given if counted is None else given.masked_fill(~counted[:, None, None], 0.0)

    def choose(self, rivals: "Rivals") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Choose again in the rows where a chunk leaves the window.

        Returns:
            Indices into [kept | leaving chunk] of the evicted (B, Hk, C) and of the kept keys (B, Hk, K), and log g
            summed from behind the evicted ones, -inf where there is no key.
        """
        size, kept, moved, behind = self._window, self._count, rivals.moved, rivals.behind
        batch, heads = self.position.shape[:2]
        count = torch.tensor([count // size * size for count in rivals.counts], device=moved.device).unsqueeze(-1)
        slots = torch.arange(size, device=moved.device)
        leaving = torch.where(rivals.candidates & moved, count - 2 * size + slots, -1)
        position = torch.cat([self.position, leaving.unsqueeze(1).expand(batch, heads, size)], dim=2)
        first = kept + self._sinks
        mass = torch.cat([self._mass[..., :kept], self._mass[..., first : first + size]], dim=-1)
        decay = torch.cat([self.decay, mass.new_zeros(batch, heads, size) if behind is None else behind], dim=2)
        score = kept_keys.scores(mass, rivals.lengths, position, count.unsqueeze(1), size)
        still = torch.where(torch.arange(kept + size, device=score.device) < kept, 0.0, kept_keys.NOTHING)
        score = torch.where(moved.unsqueeze(1), score, still.to(score))
        going, staying = kept_keys.split(score, kept)
        of_going = decay.gather(2, going).masked_fill(position.gather(2, going) < 0, -torch.inf)
        self.position = position.gather(2, staying)
        empty = self.position < 0
        self.decay = decay.gather(2, staying).masked_fill(empty, 0.0)
        chosen = staying.unsqueeze(2).expand(-1, -1, mass.shape[2], -1)
        self._mass[..., :kept] = mass.gather(3, chosen).masked_fill(empty.unsqueeze(2), 0.0)
        return going, staying, of_going

    def shift(self, moved: torch.Tensor) -> None:
        """Move chunk c0 to the place of chunk c0 - 1 in the rows `moved` (B, 1)."""
        previous, own = self._mass[..., self._count + self._sinks :].split(self._window, dim=-1)
        rows = moved[..., None, None]
        previous.copy_(torch.where(rows, own, previous))
        own.masked_fill_(rows, 0.0)
