"""The linear heads of a layer while they decode, by the two kernels of `decode`: no step waits for the device.

Every launch has the same shape and reads the number of tokens from memory, so that a step may be captured in a CUDA
graph and replayed on new tokens in the same place.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
import triton

from hf_rfa.features.far_kernel import FarKernel, squared_bound
from hf_rfa.ops import kept_keys
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.state import RFAState
from hf_rfa.ops.triton.decode import decode_step, end_of_chunk
from hf_rfa.ops.triton.fold import affine, form_of
from hf_rfa.ops.triton.launch import FORM_CODES
from hf_rfa.ops.triton.sizes import on_device, tile_size, token_rows

#: Exact keys that a program of `decode_step` reads at a time.
KEY_TILE = 32
#: How the products at a chunk's end are computed, once in many steps: three TF32 products are as good as float32 ones,
#: which tensor cores do not have.
PRECISION = "tf32x3"
#: Warps of the programs.
STEP_WARPS, END_WARPS = 4, 8


class FusedHeads:
    """What `recurrent.RecurrentHeads` is to one group of heads, for all linear heads of a layer; without gradients.

    Heads that keep fewer keys than others have empty slots. The given states are copied.
    """

    #: By row and key head: keys and values, |v|, and their attention received; positions of kept keys; the far sums.
    _table: tuple[torch.Tensor, torch.Tensor]
    _sizes: torch.Tensor
    _mass: torch.Tensor
    _position: torch.Tensor
    _sums: torch.Tensor
    _peaks: torch.Tensor
    _counts: torch.Tensor

    def __init__(self, groups: Sequence[tuple[list[int], OperatorCall]]) -> None:
        """groups: Key heads that keep equally many keys, with their call in float32, which must have a window.

        The calls' tokens are not read, nor is anything of their states changed.
        """
        call = groups[0][1]
        self._heads = [heads for heads, _ in groups]
        self._kept = [group.kept_keys for _, group in groups]
        self._window, self._sinks, self._scaling = call.window, call.sink_tokens, call.scaling
        self._dims, self._groups = (call.query.shape[4], call.value.shape[3]), call.query.shape[2]
        self._far = _joined([group.far for _, group in groups])
        device = call.query.device
        self._head_of = torch.tensor(list(itertools.chain(*self._heads)), dtype=torch.int32, device=device)
        kept = [count for heads, count in zip(self._heads, self._kept, strict=True) for _ in heads]
        self._kept_of = torch.tensor(kept, dtype=torch.int32, device=device)
        self._logits = None
        if call.sink_logits is not None:
            logits = [group.sink_logits for _, group in groups if group.sink_logits is not None]
            self._logits = torch.cat(logits).float().contiguous()
        codes = [int(name == "trigonometric") for name in self._far.feature_maps]
        self._map_codes = torch.tensor(codes, dtype=torch.int32, device=device)
        self._queries, self._keys = (_prepared(self._far, self._scaling, keys) for keys in (False, True))
        self._two = form_of(self._far) in ("PAIR", "WAVE", "MIXED")
        self._linear = len(self._head_of)
        self._take([group.state or group.empty_state() for _, group in groups])

    def step(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, token_mask: torch.Tensor | None,
        statistics: FarStatistics | None,
    ) -> torch.Tensor:  # fmt: skip
        """The output (B, Hk, G, 1, M) for one more token of q (B, Hk, G, 1, D), k, v (B, Hk, 1, D or M).

        All key heads are given; those of other heads are not written. Rows whose token is padding (`token_mask`
        (B, 1) is False) get zeros and keep their state.
        """
        query, key, value = token_rows(query), token_rows(key), token_rows(value)
        batch, key_heads, groups = query.shape[:3]
        output = value.new_empty(batch, key_heads, groups, 1, self._dims[1])
        present = self._counts if token_mask is None else token_mask.to(query.device, torch.uint8).contiguous()
        logits = self._peaks if self._logits is None else self._logits
        sizes = (self._scaling, kept_keys.least_distance(self._window))
        tiles = self._tiles(token_mask is not None)
        tables = (self._table[0], self._table[1], self._sizes, self._position, self._kept_of, self._mass, self._counts)
        with on_device(query):
            decode_step[(len(self._counts) * groups,)](
                query, key, value, present, self._head_of, *tables, self._sums, self._peaks, *self._queries, logits,
                self._map_codes, self._scores, output, self._fate, *query.stride()[:3], *key.stride()[:2],
                *value.stride()[:2], self._linear, groups, key_heads, *sizes, BN=KEY_TILE,
                LOGITS=int(self._logits is not None), **tiles, num_warps=STEP_WARPS, num_stages=1,
            )  # fmt: skip
            end_of_chunk[(len(self._counts),)](
                present, *tables, self._sums, self._peaks, *self._keys, self._map_codes, self._lists, self._linear,
                groups, *sizes, BC=tile_size(self._window), BR=self._lists.shape[-1],
                PRECISION=PRECISION, **tiles, num_warps=END_WARPS, num_stages=1,
            )  # fmt: skip
        if statistics is not None:
            statistics.add(self._fate == 2, self._fate > 0)
        return output

    def state(self) -> RFAState:
        """The state after the last token, as `RecurrentHeads` gives it; waits for the device."""
        begin, found = 0, []
        for heads, kept in zip(self._heads, self._kept, strict=True):
            found.append(self._state_of(slice(begin, begin + len(heads)), kept))
            begin += len(heads)
        first, *others = found
        return dataclasses.replace(first, beside=tuple(others))

    def select_rows(self, rows: torch.Tensor) -> None:
        """Continue with these rows (n,) int64 of the batch."""
        index = rows.to(self._counts.device)

        def select(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(0, (-1, self._linear)).index_select(0, index).flatten(0, 1)

        self._table = select(self._table[0]), select(self._table[1])
        self._sizes, self._position, self._mass = select(self._sizes), select(self._position), select(self._mass)
        self._counts, self._sums, self._peaks = select(self._counts), select(self._sums), select(self._peaks)
        self._make_scratch()

    def _tiles(self, present: bool) -> dict[str, int]:
        """The sizes for which both kernels are compiled."""
        (dim, value_dim), rows = self._dims, self._queries[0].shape[1]
        return {
            "D": dim, "BD": tile_size(dim), "M": value_dim, "BM": tile_size(value_dim), "P": rows,
            "BP": tile_size(rows), "C": self._window, "S": self._sinks, "K": self._position.shape[1],
            "MAP": FORM_CODES[form_of(self._far)].value, "TWO": int(self._two),
            "TRANSFORM": int(self._far.query_transform is not None), "PRESENT": int(present),
        }  # fmt: skip

    def _take(self, states: Sequence[RFAState]) -> None:
        """Fill the tables from the states of the groups."""
        parts = [self._tables_of(state) for state in states]
        joined = [torch.cat(tables, dim=1).flatten(0, 1).contiguous() for tables in zip(*parts, strict=True)]
        key, value, self._position, self._mass, self._sums, self._peaks, self._counts = joined
        self._table = key, value
        self._sizes = torch.linalg.vector_norm(value, dim=-1, dtype=torch.float32)
        self._make_scratch()

    def _make_scratch(self) -> None:
        every, entries = self._sizes.shape
        rivals = triton.next_power_of_2(max(16, self._position.shape[1] + self._window))
        self._scores = self._sizes.new_empty(every * self._groups, entries)
        self._fate = self._counts.new_empty(every * self._groups, dtype=torch.int8)
        self._lists = self._counts.new_empty(every, 3, rivals)

    def _tables_of(self, state: RFAState) -> tuple[torch.Tensor, ...]:
        """Keys, values (B, h, E, D or M), positions (B, h, K), masses (B, h, G, E), sums, peaks and counts."""
        device, window, most = self._head_of.device, self._window, max(self._kept)
        counts = state.count.to(device)
        odd = (counts // window % 2 == 1)[:, None, None]  # the chunk of the next token, which lies behind the other

        def laid_out(kept: torch.Tensor | None, sinks: torch.Tensor | None, near: torch.Tensor) -> torch.Tensor:
            before, own = near.split(window, dim=2)
            last = odd[..., None]
            missing = most - (0 if kept is None else kept.shape[2])
            parts = [near.new_zeros(*near.shape[:2], missing, *near.shape[3:]), sinks]
            parts += [torch.where(last, before, own), torch.where(last, own, before)]
            return torch.cat([part for part in (kept, *parts) if part is not None], dim=2)

        rows, heads = state.log_max.shape
        key = laid_out(state.kept_key, state.sink_key, state.near_key)
        value = laid_out(state.kept_value, state.sink_value, state.near_value)
        position = counts.new_full((rows, heads, most), -1, dtype=torch.int32)
        mass = state.log_max.new_zeros(rows, heads, self._groups, key.shape[2], dtype=torch.float32)
        if state.kept_key is not None:
            _, _, numbers, _, masses = state.kept
            count = numbers.shape[2]
            position[..., :count] = numbers
            of_kept, of_near = masses.float().transpose(2, 3).split([count, 2 * window], dim=2)
            mass = laid_out(of_kept, of_near.new_zeros(rows, heads, self._sinks, self._groups), of_near)
            mass = mass.transpose(2, 3)
        sums = torch.cat([state.kv_state[..., :-1].flatten(2), state.kv_state[..., -1]], dim=-1).float()
        counts = counts.to(torch.int32).unsqueeze(1).expand(-1, heads)
        return key, value, position, mass, sums, state.log_max.float(), counts

    def _state_of(self, part: slice, kept: int) -> RFAState:
        """The state of the linear heads in `part`, which keep `kept` keys each; the inverse of `_tables_of`."""
        window, sinks, most = self._window, self._sinks, self._position.shape[1]

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(0, (-1, self._linear))[:, part]

        counts = heads(self._counts)[:, 0].long()
        odd = (counts // window % 2 == 1)[:, None, None, None]
        filled = torch.arange(2 * window, device=counts.device) < window + (counts % window)[:, None]
        filled = filled[:, None, :, None]

        def near(x: torch.Tensor) -> torch.Tensor:
            even, other = x[:, :, most + sinks :].split(window, dim=2)
            whole = torch.cat([torch.where(odd, even, other), torch.where(odd, other, even)], dim=2)
            return torch.where(filled, whole, torch.zeros_like(whole))

        keys, values, sums = (heads(x) for x in (*self._table, self._sums))
        components = sums.shape[-1] // (self._dims[1] + 1)
        whole, ones = sums[..., :-components].unflatten(-1, (components, -1)), sums[..., -components:]
        state = RFAState(
            torch.cat([whole, ones.unsqueeze(-1)], dim=-1), heads(self._peaks).clone(), near(keys), near(values),
            keys[:, :, most : most + sinks].clone(), values[:, :, most : most + sinks].clone(), counts.cpu(),
        )  # fmt: skip
        if not kept:
            return state
        position, order = heads(self._position)[..., :kept].long().sort(dim=-1)
        masses = heads(self._mass).transpose(2, 3)

        def in_order(x: torch.Tensor) -> torch.Tensor:
            return x[:, :, :kept].gather(2, order.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))

        mass = torch.cat([in_order(masses), near(masses)], dim=2).transpose(2, 3).contiguous()
        decay = torch.zeros_like(position, dtype=torch.float32)
        return dataclasses.replace(
            state, kept_key=in_order(keys), kept_value=in_order(values), kept_position=position, kept_decay=decay,
            mass=mass,
        )  # fmt: skip


def _joined(kernels: Sequence[FarKernel]) -> FarKernel:
    """One kernel for the heads of all of them."""
    if len(kernels) == 1:
        return kernels[0]
    tensors = {name: torch.cat([k.tensors()[name] for k in kernels]) for name in kernels[0].tensors()}
    return FarKernel(tuple(itertools.chain(*(k.feature_maps for k in kernels))), **tensors)


def _prepared(far: FarKernel, scaling: float, keys: bool) -> tuple[torch.Tensor, ...]:
    """Of queries or keys, as the kernels read it: W, b, the shifts, both centres, the change of variable, figures.

    The figures (Hl, 4 or 5): t = alpha sqrt(scaling), the sign of |t r y|^2 / 2, the constants of the log-scale
    (gamma's with the queries'), and the bound of |y|^2; of queries also the log of the far part's limit.
    """
    side = affine(far, scaling, keys)
    centers = (far.key_center, far.query_center) if keys else (far.query_center, far.key_center)
    transform, radius = (
        (far.key_transform, far.key_radius) if keys else (far.query_transform, far.query_radius)
    )  # fmt: skip
    bound = squared_bound(torch.zeros_like(far.alpha) if radius is None else radius)
    constant = side.constant if keys else side.constant + far.log_gamma()
    figures = torch.stack([side.size, side.sign, constant, bound], dim=1)
    if not keys:
        limit = far.log_limit()
        limit = torch.full_like(far.alpha, torch.inf) if limit is None else limit
        figures = torch.cat([figures, limit.unsqueeze(1)], dim=1)
    found = (side.weight, side.bias, side.shift, *centers, figures if transform is None else transform, figures)
    return tuple(x.detach().float().contiguous() for x in found)
