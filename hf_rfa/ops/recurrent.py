"""The decoding step: one token at a time, in time and memory independent of the number of earlier tokens."""

import copy
from collections.abc import Sequence

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics, Part, combine, near_part_and_weights
from hf_rfa.ops.keeping_heads import KeepingHeads, Rivals
from hf_rfa.ops.kept_keys import least_distance, number_kept
from hf_rfa.ops.prepared import PreparedQueries
from hf_rfa.ops.scan import chunk_sums, merge_states
from hf_rfa.ops.state import RFAState


def seen_slots(count: int, window: int, sinks: int, kept: int) -> tuple[int, int]:
    """The range (first, last + 1) of slots in a table of exact keys that token number `count` of its row sees."""
    own, earlier = kept + sinks + window, count // window
    # Until then the sinks are within the near chunks themselves.
    start = kept if earlier > 1 else kept + sinks if earlier else own
    return start - number_kept(count, window, sinks, kept), own + count % window + 1


class RecurrentHeads:
    """The linear heads of a layer while they decode.

    Each new token is written to their tables of exact keys and values, rows of slots `[kept | sinks | chunk c0 - 1 |
    chunk c0]`. The tables are private: the initial state and the states returned are copies.
    """

    def __init__(self, call: OperatorCall, state: RFAState, prepare: bool = False) -> None:
        """The call must be in float32 or float64; its tokens and its state are not read.

        `prepare` computes in advance what all steps share, which pays from the second step on.
        """
        self._far, self._window, self._scaling, wide = call.far, call.window, call.scaling, call.query.dtype
        self._sinks, self._kept = state.sink_key.shape[2], call.kept_keys
        self._sink_logits = None if call.sink_logits is None else call.sink_logits.to(wide)
        keys = *(() if state.kept_key is None else (state.kept_key,)), state.sink_key, state.near_key
        values = *(() if state.kept_value is None else (state.kept_value,)), state.sink_value, state.near_value
        self._tables: tuple[torch.Tensor, ...] = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        self._keeping = KeepingHeads(call, state) if self._kept else None
        self._kv_state, self._log_max = state.kv_state.to(wide), state.log_max.to(wide)
        self._counts: list[int] = state.count.tolist()
        self._log_gamma = call.far.log_gamma()
        limit = call.far.log_limit()
        self._log_limit = None if limit is None else limit.unsqueeze(-1)
        self._features = PreparedQueries(call.far, call.scaling) if prepare else call.far.query_features

    def state(self) -> RFAState:
        """The state after the last token."""
        sizes = [self._kept, self._sinks, 2 * self._window]
        parts = [[x.clone(memory_format=torch.contiguous_format) for x in t.split(sizes, 2)] for t in self._tables]
        (kept_key, sink_key, near_key), (kept_value, sink_value, near_value) = parts
        count = torch.tensor(self._counts)
        state = RFAState(self._kv_state, self._log_max, near_key, near_value, sink_key, sink_value, count)
        return state if self._keeping is None else self._keeping.into(state, kept_key, kept_value)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Continue with these rows (n,) int64 of the batch, for beams and batch selection."""
        index = rows.to(self._kv_state.device)
        self._tables = tuple(table.index_select(0, index) for table in self._tables)
        self._kv_state, self._log_max = self._kv_state.index_select(0, index), self._log_max.index_select(0, index)
        self._counts = [self._counts[row] for row in rows.tolist()]
        if self._keeping is not None:
            self._keeping.select_rows(index)

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, token_mask: torch.Tensor | None,
        statistics: FarStatistics | None,
    ) -> torch.Tensor:  # fmt: skip
        """The output (B, Hk, G, 1, M) for one more token: q (B, Hk, G, 1, D), k (B, Hk, 1, D), v (B, Hk, 1, M).

        Rows whose token is padding (`token_mask` (B, 1) is False) get zeros and keep their state.
        """
        far, scaling = self._far, self._scaling
        rows = range(len(key)) if token_mask is None else token_mask[:, 0].nonzero().flatten().tolist()
        present = None if token_mask is None else token_mask.to(query.device)
        log_gate = far.log_gate(key)
        if log_gate is not None:  # log_max is relative to the newest token
            forgotten = log_gate.squeeze(-1)
            forgotten = forgotten if present is None else forgotten.masked_fill(~present, 0.0)
            self._log_max = self._log_max + forgotten
            if self._keeping is not None:
                self._keeping.forget(forgotten)
        query = query.squeeze(3)
        near = None
        if self._window:
            self._write(key, value, rows)
            near = self._near(query, present)
        else:
            self._fold(
                key, value, torch.ones(1, 1, dtype=torch.bool, device=key.device) if present is None else present
            )
        features, log_scale = self._features(query, scaling)
        products = features @ self._kv_state
        log_scale = log_scale + (self._log_max + self._log_gamma).unsqueeze(-1)
        far_part = Part(products[..., :-1], products[..., -1], log_scale)
        counted = None if present is None else present.unsqueeze(-1)
        output = combine(near, far_part, self._sink_logits, statistics, counted, self._log_limit)
        for row in rows:
            self._counts[row] += 1
        if self._window:
            self._roll(rows)
        output = output if counted is None else output * counted.unsqueeze(-1)
        return output.unsqueeze(3)

    def _write(self, key: torch.Tensor, value: torch.Tensor, rows: Sequence[int]) -> None:
        """Write the new token to its place among the near keys, and among the sinks if it is one of the first."""
        own = self._kept + self._sinks + self._window
        self._put(key, value, rows, [own + self._counts[row] % self._window for row in rows])
        first = [row for row in rows if self._counts[row] < self._sinks]
        if first:
            self._put(key, value, first, [self._kept + self._counts[row] for row in first])

    def _put(self, key: torch.Tensor, value: torch.Tensor, rows: Sequence[int], slots: list[int]) -> None:
        for table, new in zip(self._tables, (key, value), strict=True):
            if len(rows) == len(table) and len(set(slots)) == 1:
                table.narrow(2, slots[0], 1).copy_(new)
            elif rows:
                index = torch.tensor(rows, device=table.device)
                table[index, :, torch.tensor(slots, device=table.device)] = new[index, :, 0].to(table.dtype)

    def _near(self, query: torch.Tensor, present: torch.Tensor | None) -> Part:
        """Attention to the exact keys; those that all rows see are one slice of the tables."""
        sizes = self._window, self._sinks, self._kept
        first, end = zip(*(seen_slots(count, *sizes) for count in self._counts), strict=True)
        start, stop = min(first), max(end)
        key, value = (t.narrow(2, start, stop - start).to(query.dtype) for t in self._tables)
        visible = None
        if len(set(first)) > 1 or len(set(end)) > 1:
            slots = torch.arange(start, stop)
            visible = (slots >= torch.tensor(first)[:, None]) & (slots < torch.tensor(end)[:, None])
            visible = visible[:, None, None].to(query.device)
        scores = (query * self._scaling) @ key.mT
        part, weights = near_part_and_weights(scores, value, visible)
        if self._keeping is not None:
            # Only the slots that are far enough from the new token for its queries to count.
            counted, ends = None, [max(start, last - least_distance(self._window)) for last in end]
            if len(set(ends)) > 1:
                slots = torch.arange(start, max(ends), device=query.device)
                counted = slots < torch.tensor(ends, device=query.device)[:, None]
            if present is not None:
                counted = present if counted is None else counted & present
            self._keeping.receive(weights, part, slice(start, max(ends)), counted)
        return part

    def _fold(
        self, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor, behind: torch.Tensor | None = None
    ) -> None:
        """Add keys (B, H, C, D) to the far sums; keep (B or 1, C) bool; behind (B, H, C), log g summed behind each."""
        features, log_scale = self._far.key_features(key, self._scaling)
        if behind is not None:
            log_scale = log_scale + behind
        added, peak = chunk_sums(features.unsqueeze(2), log_scale.unsqueeze(2), value.unsqueeze(2), keep.unsqueeze(1))
        added, peak = added.squeeze(2), peak.squeeze(2)
        self._kv_state, self._log_max = merge_states((self._kv_state, self._log_max), (added, peak))

    def _roll(self, rows: Sequence[int]) -> None:
        """In rows whose chunk has just been filled, the previous chunk becomes far."""
        full = [row for row in rows if self._counts[row] % self._window == 0]
        if not full:
            return
        if len(full) == len(self._counts) or torch.is_grad_enabled():
            self._roll_rows(full)
            return
        # Rows of different lengths fill their chunks at different times; the others are not touched.
        part, index = copy.copy(self), torch.tensor(full)
        part._keeping = copy.copy(self._keeping)
        part.select_rows(index)
        part._roll_rows(range(len(full)))
        self._put_rows(index, part)

    def _put_rows(self, rows: torch.Tensor, part: "RecurrentHeads") -> None:
        """Take over the rows of `part` as the rows (n,) int64 of this one."""
        index = rows.to(self._kv_state.device)
        for table, new in zip(self._tables, part._tables, strict=True):
            table[index] = new
        # A state that was returned holds these.
        self._kv_state = self._kv_state.index_copy(0, index, part._kv_state)
        self._log_max = self._log_max.index_copy(0, index, part._log_max)
        if self._keeping is not None and part._keeping is not None:
            self._keeping.put_rows(index, part._keeping)

    def _roll_rows(self, rows: Sequence[int]) -> None:
        window, sinks, kept = self._window, self._sinks, self._kept
        full = [row in rows for row in range(len(self._counts))]
        device, wide = self._kv_state.device, self._kv_state.dtype
        # The chunk that becomes far, -1 if there is none yet; its sinks stay exact.
        chunk = torch.tensor([count // window - 2 for count in self._counts], device=device).unsqueeze(-1)
        moved = torch.tensor(full, device=device).unsqueeze(-1)
        keep = (chunk >= 0) & ~((chunk == 0) & (torch.arange(window, device=device) < sinks)) & moved
        keys, values = (t[:, :, kept + sinks :].to(wide) for t in self._tables)
        log_gate, behind = self._far.log_gate(keys), None
        if log_gate is not None:
            behind = log_gate[..., 1:].flip(-1).cumsum(-1).flip(-1)[..., :window]
        leaving = keys[:, :, :window], values[:, :, :window]
        if self._keeping is not None:
            far_key, far_value, behind = self._exchange(leaving, keep, moved, behind)
            leaving, keep = (far_key, far_value), torch.ones_like(keep)  # `behind` is -inf where there is no key
        self._fold(*leaving, keep, behind)
        self._tables = tuple(self._shifted(table, moved[..., None, None]) for table in self._tables)
        if self._keeping is not None:
            self._keeping.shift(moved)

    def _exchange(
        self, leaving: tuple[torch.Tensor, torch.Tensor], keep: torch.Tensor, moved: torch.Tensor,
        behind: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Let the keys of the `leaving` chunk compete with the kept ones in the rows `moved` (B, 1).

        Returns key and value (B, H, C, D or M) of the evicted ones, and log g summed from behind each, -inf where
        there is no key.
        """
        assert self._keeping is not None
        values = torch.cat([self._tables[1][:, :, : self._kept].to(leaving[1].dtype), leaving[1]], dim=2)
        lengths = torch.linalg.vector_norm(values, dim=-1)
        going, staying, behind = self._keeping.choose(Rivals(self._counts, keep, moved, lengths, behind))
        found, empty = [], (self._keeping.position < 0).unsqueeze(-1)
        for number, (table, new) in enumerate(zip(self._tables, leaving, strict=True)):
            rivals = torch.cat([table[:, :, : self._kept].to(new.dtype), new], dim=2)
            wide = (index.unsqueeze(-1).expand(-1, -1, -1, new.shape[3]) for index in (going, staying))
            far, kept = (rivals.gather(2, index) for index in wide)
            found.append(far)
            if table.requires_grad:  # autograd still needs the one that was read
                table = table.clone()
                self._tables = *self._tables[:number], table, *self._tables[number + 1 :]
            table[:, :, : self._kept] = kept.to(table.dtype).masked_fill(empty, 0.0)
        return found[0], found[1], behind

    def _shifted(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The table with its last chunk moved to the place of the one before, in the `rows` (B, 1, 1, 1) bool."""
        if table.requires_grad:  # autograd still needs the one that was read
            table = table.clone()
        first = self._kept + self._sinks
        middle = first + self._window
        previous, own = table[:, :, first:middle], table[:, :, middle:]
        previous.copy_(torch.where(rows, own, previous))
        own.masked_fill_(rows, 0.0)
        return table
