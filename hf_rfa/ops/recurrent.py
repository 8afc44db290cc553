"""One token at a time: the decoding step, whose time and memory do not depend on how many tokens came before."""

from collections.abc import Sequence

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics, Part, combine, near_part
from hf_rfa.ops.prepared import PreparedQueries
from hf_rfa.ops.scan import chunk_sums, merge_states
from hf_rfa.ops.state import RFAState


class RecurrentHeads:
    """The linear heads of a layer while they decode.

    Every new token is written into their tables of near keys, one row of slots `[sinks | chunk c0 - 1 | chunk c0]`
    each, which are theirs alone: the state that they begin with and those that they hand out are copies.
    """

    def __init__(self, call: OperatorCall, state: RFAState, prepare: bool = False) -> None:
        """Of the call, which is in float32 or float64, neither tokens nor state are read.

        `prepare` works out what the queries of all steps have in common, which pays from the second step on.
        """
        self._far, self._window, self._scaling, wide = call.far, call.window, call.scaling, call.query.dtype
        self._sinks = state.sink_key.shape[2]
        self._sink_logits = None if call.sink_logits is None else call.sink_logits.to(wide)
        keys, values = (state.sink_key, state.near_key), (state.sink_value, state.near_value)
        self._tables: tuple[torch.Tensor, ...] = torch.cat(keys, dim=2), torch.cat(values, dim=2)
        self._kv_state, self._log_max = state.kv_state.to(wide), state.log_max.to(wide)
        self._counts: list[int] = state.count.tolist()
        self._log_gamma = call.far.log_gamma()
        self._features = PreparedQueries(call.far, call.scaling) if prepare else call.far.query_features

    def state(self) -> RFAState:
        """The state after the last token."""
        sinks = self._sinks
        near_key, near_value = (t[:, :, sinks:].clone(memory_format=torch.contiguous_format) for t in self._tables)
        sink_key, sink_value = (t[:, :, :sinks].clone(memory_format=torch.contiguous_format) for t in self._tables)
        count = torch.tensor(self._counts)
        return RFAState(self._kv_state, self._log_max, near_key, near_value, sink_key, sink_value, count)

    def select_rows(self, rows: torch.Tensor) -> None:
        """Go on with these rows (n,) int64 of the batch, for beams and batch selection."""
        index = rows.to(self._kv_state.device)
        self._tables = tuple(table.index_select(0, index) for table in self._tables)
        self._kv_state, self._log_max = self._kv_state.index_select(0, index), self._log_max.index_select(0, index)
        self._counts = [self._counts[row] for row in rows.tolist()]

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, token_mask: torch.Tensor | None,
        statistics: FarStatistics | None,
    ) -> torch.Tensor:  # fmt: skip
        """The output (B, Hk, G, 1, M) of one more token: q (B, Hk, G, 1, D), k (B, Hk, 1, D), v (B, Hk, 1, M).

        Rows whose token is padding (`token_mask` (B, 1) is False) get zeros and keep their state.
        """
        far, scaling = self._far, self._scaling
        rows = range(len(key)) if token_mask is None else token_mask[:, 0].nonzero().flatten().tolist()
        present = None if token_mask is None else token_mask.to(query.device)
        log_gate = far.log_gate(key)
        if log_gate is not None:  # what is far counts from the new token on
            forgotten = log_gate.squeeze(-1)
            self._log_max = self._log_max + (forgotten if present is None else forgotten.masked_fill(~present, 0.0))
        query = query.squeeze(3)
        near = None
        if self._window:
            self._write(key, value, rows)
            near = self._near(query)
        else:
            self._fold(
                key, value, torch.ones(1, 1, dtype=torch.bool, device=key.device) if present is None else present
            )
        features, log_scale = self._features(query, scaling)
        products = features @ self._kv_state
        log_scale = log_scale + (self._log_max + self._log_gamma).unsqueeze(-1)
        far_part = Part(products[..., :-1], products[..., -1], log_scale)
        counted = None if present is None else present.unsqueeze(-1)
        output = combine(near, far_part, self._sink_logits, statistics, counted)
        for row in rows:
            self._counts[row] += 1
        if self._window:
            self._roll(rows)
        output = output if counted is None else output * counted.unsqueeze(-1)
        return output.unsqueeze(3)

    def _write(self, key: torch.Tensor, value: torch.Tensor, rows: Sequence[int]) -> None:
        """Put the new token into its place among the near keys, and among the sinks if it is one of the first."""
        slots = [self._sinks + self._window + self._counts[row] % self._window for row in rows]
        self._put(key, value, rows, slots)
        first = [row for row in rows if self._counts[row] < self._sinks]
        if first:
            self._put(key, value, first, [self._counts[row] for row in first])

    def _put(self, key: torch.Tensor, value: torch.Tensor, rows: Sequence[int], slots: list[int]) -> None:
        for table, new in zip(self._tables, (key, value), strict=True):
            if len(rows) == len(table) and len(set(slots)) == 1:
                table.narrow(2, slots[0], 1).copy_(new)
            elif rows:
                index = torch.tensor(rows, device=table.device)
                table[index, :, torch.tensor(slots, device=table.device)] = new[index, :, 0].to(table.dtype)

    def _near(self, query: torch.Tensor) -> Part:
        """Attention to the near keys, those that all rows see being one slice of the tables."""
        first, end = zip(*(self._seen(count) for count in self._counts), strict=True)
        start, stop = min(first), max(end)
        key, value = (t.narrow(2, start, stop - start).to(query.dtype) for t in self._tables)
        visible = None
        if len(set(first)) > 1 or len(set(end)) > 1:
            slots = torch.arange(start, stop)
            visible = (slots >= torch.tensor(first)[:, None]) & (slots < torch.tensor(end)[:, None])
            visible = visible[:, None, None].to(query.device)
        return near_part((query * self._scaling) @ key.mT, value, visible)

    def _seen(self, count: int) -> tuple[int, int]:
        """The slots, from the first to behind the last, that token number `count` of a row sees."""
        own = self._sinks + self._window
        earlier = count // self._window
        start = 0 if earlier > 1 else self._sinks if earlier else own  # sinks lie in the chunks themselves till then
        return start, own + count % self._window + 1

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
        """Where a chunk has just been filled, the chunk before it becomes far."""
        window, sinks = self._window, self._sinks
        full = [row in rows and self._counts[row] % window == 0 for row in range(len(self._counts))]
        if not any(full):
            return
        device, wide = self._kv_state.device, self._kv_state.dtype
        # The chunk that becomes far; -1 if there is none yet. Those of its keys that are sinks stay near.
        chunk = torch.tensor([count // window - 2 for count in self._counts], device=device).unsqueeze(-1)
        moved = torch.tensor(full, device=device).unsqueeze(-1)
        keep = (chunk >= 0) & ~((chunk == 0) & (torch.arange(window, device=device) < sinks)) & moved
        keys, values = (t[:, :, sinks:].to(wide) for t in self._tables)
        log_gate, behind = self._far.log_gate(keys), None
        if log_gate is not None:
            behind = log_gate[..., 1:].flip(-1).cumsum(-1).flip(-1)[..., :window]
        self._fold(keys[:, :, :window], values[:, :, :window], keep, behind)
        self._tables = tuple(self._shifted(table, moved[..., None, None]) for table in self._tables)

    def _shifted(self, table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The table with its last chunk in the place of the one before, in the `rows` (B, 1, 1, 1) bool."""
        if table.requires_grad:  # autograd still needs the one that was read
            table = table.clone()
        middle = self._sinks + self._window
        previous, own = table[:, :, self._sinks : middle], table[:, :, middle:]
        previous.copy_(torch.where(rows, own, previous))
        own.masked_fill_(rows, 0.0)
        return table
