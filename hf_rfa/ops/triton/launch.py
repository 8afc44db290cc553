"""Sizes, buffers and kernel launches of the forward pass of one call; `launch_exact` has those for kept keys."""

import dataclasses
from typing import Any

import torch
import triton
import triton.language as tl

from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import Plan
from hf_rfa.ops.triton import forward, launch_exact, pieces
from hf_rfa.ops.triton.sizes import on_device, precision, tile_size, token_rows

FORM_CODES = {"EXP": pieces.EXP, "PAIR": pieces.PAIR, "WAVE": pieces.WAVE, "MIXED": pieces.MIXED,
              "CLUSTER": pieces.CLUSTER}  # fmt: skip
#: Elements of the state per program of the scan.
SCAN_TILE = 1024
#: Blocks that it loads ahead of the sum, which is sequential.
SCAN_STAGES = 4
#: Columns of the values per program where they are shared out, the first that divides them: the far sums of 64 fit
#: into the registers.
VALUE_TILES = (64, 32, 16)
#: Warps of these programs: four are as many rows of tensor cores as a chunk of 64 queries has.
PART_WARPS = 4


@dataclasses.dataclass(frozen=True)
class Settings:
    """Arguments of the kernels that are not tensors with gradients.

    Attributes:
        plan: The layout of the tokens.
        window: Chunk size, or 0.
        scaling: Factor of q.k.
        form: See `fold.form_of`.
        map_codes: (Hk,) int32, 1 for trigonometric heads in a layer that mixes them with hyperbolic ones.
        block: L, the chunks per program.
        statistics: Counts dropped far parts.
    """

    plan: Plan
    window: int
    scaling: float
    form: str
    map_codes: torch.Tensor
    block: int
    statistics: FarStatistics | None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tensors with gradients. query (B, Hk, G, T, D); key, value (B, Hk, T, D or M); sinks of the state (B, Hk, s, D
    or M); sink_logits (Hk, G) or None; kv_state (B, Hk, F, M + 1) and its peak (B, Hk); then both `fold.Side`s.
    Without gradients log_limit (Hk,), log of the kernel's `far_limit`, or None.

    With kept keys, kept_key, kept_value (B, Hk, K, D or M), those of the state, and the lists of `kept.Choice`; r and
    the log-scale of the keys are then those of the `evicted` ones."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sink_key: torch.Tensor
    sink_value: torch.Tensor
    sink_logits: torch.Tensor | None
    kv_state: torch.Tensor
    log_max: torch.Tensor
    query_weight: torch.Tensor
    query_bias: torch.Tensor
    query_shift: torch.Tensor
    query_r: torch.Tensor
    query_scale: torch.Tensor
    key_weight: torch.Tensor
    key_bias: torch.Tensor
    key_shift: torch.Tensor
    key_r: torch.Tensor
    key_scale: torch.Tensor
    log_limit: torch.Tensor | None = None
    kept_key: torch.Tensor | None = None
    kept_value: torch.Tensor | None = None
    listed: torch.Tensor | None = None
    evicted: torch.Tensor | None = None


INPUTS = tuple(f.name for f in dataclasses.fields(Inputs))
#: Products have both operands in the queries' dtype; everything else is computed in float32.
_NARROW = ("query", "key", "value", "sink_key", "sink_value", "kept_key", "kept_value", "query_weight", "key_weight")
#: Tensors that a kernel reads token by token; the others are contiguous.
_STRIDED = ("query", "key", "value")


class Launch:
    """One call; after `forward`, its buffers hold everything that the backward pass needs."""

    def __init__(self, inputs: Inputs, settings: Settings) -> None:
        plan, kind = settings.plan, inputs.query.dtype
        placed: dict[str, Any] = {name: _placed(name, getattr(inputs, name), kind) for name in INPUTS}
        self.inputs = x = Inputs(**placed)
        self.settings, self.keeps = settings, x.listed is not None
        #: What is added to the far sums: chunk after chunk of tokens, or the evicted ones instead.
        self.far_key, self.far_value = launch_exact.evicted_tokens(x, plan.history) if self.keeps else (x.key, x.value)
        batch, heads, groups, length, dim = inputs.query.shape
        value_dim, self.projected = inputs.value.shape[-1], inputs.query_weight.shape[1]
        self.batch, self.heads, self.groups, self.length = batch, heads, groups, length
        self.all = batch * heads
        self.chunks, chunk = plan.token_mask.shape[1:]
        self.blocks = triton.cdiv(self.chunks, settings.block)
        self.two = settings.form in ("PAIR", "WAVE", "MIXED")
        self.components = self.projected * (2 if self.two else 1)
        self.size = self.components * (value_dim + 1)
        self.codes, self.flags, self.sink_chunks = plan.codes
        # Which evicted keys there are is in their log-scale.
        self.far_codes = torch.full_like(self.codes, pieces.FOLD.value) if self.keeps else self.codes
        rows = len(self.codes)
        self.code_row, self.flag_row = (0, 0) if rows == 1 else (self.codes.stride(0), self.flags.stride(0))
        self.tiles = {
            "D": dim, "BD": tile_size(dim), "M": value_dim, "BM": tile_size(value_dim), "P": self.projected,
            "BP": tile_size(self.projected), "C": chunk, "BC": tile_size(chunk), "DELAY": 1 if settings.window else 0,
            "MAP": FORM_CODES[settings.form], "TWO": int(self.two), "PRECISION": precision(kind),
            # Not float16, which sums of float16 numbers overflow.
            "STATE": tl.bfloat16 if kind == torch.bfloat16 else tl.float32,
        }  # fmt: skip
        # The exact part of calls that keep keys, sinks included, has kernels of its own.
        sinks = 0 if self.keeps else inputs.sink_key.shape[2]
        self.near = {"NEAR": int(bool(settings.window) and not self.keeps)}
        self.sinks = {"S": sinks, "BS": tile_size(sinks)}
        columns = next((size for size in VALUE_TILES if value_dim % size == 0), value_dim)
        self.parts = value_dim // columns
        values = {"MV": columns, "BV": tile_size(columns)}
        self.part_tiles = {name: size for name, size in self.tiles.items() if name != "BM"} | values
        self.part_options = {"num_warps": PART_WARPS, "num_stages": 1}

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, far sums and their log-scale; fills the buffers that the backward pass needs."""
        x, blocks, every = self.inputs, self.blocks, self.all
        new = x.kv_state.new_empty
        self.states, block_peaks = new(every, blocks, self.size), new(every, 2, blocks + 1)
        self.kept = x.kv_state.new_empty(every, blocks, dtype=torch.int32)
        value_dim = x.value.shape[-1]
        with on_device(x.query):
            forward.block_sums[(self.parts * blocks, every)](
                self.far_key, self.far_value, x.key_r, x.key_scale, x.key_weight, x.key_bias, x.key_shift,
                self.settings.map_codes, self.far_codes, self.flags, self.states, block_peaks, self.kept,
                *self.far_key.stride()[:3], *self.far_value.stride()[:3], self.code_row, self.flag_row, self.heads,
                self.length, self.chunks, blocks, self.settings.block, **self.part_tiles, **self.part_options,
            )  # fmt: skip
            kv_state = self.flat(x.kv_state)
            forward.scan_sums[(triton.cdiv(self.size, SCAN_TILE), every)](
                self.states, block_peaks, self.kept, kv_state, x.log_max, blocks, self.size, BE=SCAN_TILE,
                STAGES=SCAN_STAGES,
            )  # fmt: skip
            output = _output_like(x.query, value_dim)
            tokens = (self.batch, self.heads, self.groups, self.length)
            self.log_total, self.log_weight = new(tokens), new(tokens)
            self.peaks = new(every, self.chunks + 1)
            logits = x.kv_state if x.sink_logits is None else x.sink_logits
            limit = new(self.heads).fill_(torch.inf) if x.log_limit is None else x.log_limit
            near = launch_exact.outputs(self) if self.keeps else (x.kv_state, x.kv_state)
            forward.block_outputs[(self.parts * blocks, every)](
                x.query, self.far_key, self.far_value, x.query_r, x.query_scale, x.key_r, x.key_scale, *self.maps(),
                limit, logits, x.sink_key, x.sink_value, self.far_codes, self.flags,
                self.sink_chunks, self.states, block_peaks, *near, output, self.log_total, self.log_weight, self.peaks,
                *x.query.stride()[:4],
                *self.far_key.stride()[:3], *self.far_value.stride()[:3], *output.stride()[:4], self.code_row,
                self.flag_row, self.heads, self.groups, self.length, self.chunks, blocks, self.settings.block,
                self.settings.scaling,
                LOGITS=int(x.sink_logits is not None), **self.part_tiles, **self.near, **self.sinks,
                **self.part_options,
            )  # fmt: skip
        if self.settings.statistics is not None:
            self._count(self.settings.statistics)
        return output, self.matrix(kv_state), block_peaks[:, 1, -1].reshape(self.batch, self.heads)

    def maps(self) -> tuple[torch.Tensor, ...]:
        """The affine maps of queries and keys, and the codes of the feature maps."""
        x = self.inputs
        query, key = (x.query_weight, x.query_bias, x.query_shift), (x.key_weight, x.key_bias, x.key_shift)
        return *query, *key, self.settings.map_codes

    def flat(self, state: torch.Tensor) -> torch.Tensor:
        """The kernels' form (A, F * M + F) of [S, z] (B, Hk, F, M + 1)."""
        return torch.cat([state[..., :-1].flatten(2), state[..., -1]], dim=-1).view(self.all, self.size)

    def matrix(self, flat: torch.Tensor) -> torch.Tensor:
        """The inverse of `flat`."""
        flat = flat.view(self.batch, self.heads, -1)
        whole, ones = flat[..., : -self.components], flat[..., -self.components :]
        return torch.cat([whole.unflatten(-1, (self.components, -1)), ones.unsqueeze(-1)], dim=-1)

    def _count(self, statistics: FarStatistics) -> None:
        """Add the number of queries whose far part was dropped, without padding."""
        asked = self.settings.plan.asked.flatten(1)[:, None, None, : self.length]
        dropped = (self.log_weight == torch.inf) & asked
        statistics.add(dropped, dropped | ((self.log_weight > -torch.inf) & asked))


def _placed(name: str, x: torch.Tensor | None, kind: torch.dtype) -> torch.Tensor | None:
    """An input as the kernels need it."""
    if x is None or not x.is_floating_point():
        return x
    x = x.to(kind if name in _NARROW else torch.float32)
    return token_rows(x) if name in _STRIDED else x.contiguous()


def _output_like(query: torch.Tensor, value_dim: int) -> torch.Tensor:
    """(B, Hk, G, T, M), stored token by token with all heads of a token contiguous, as models need it."""
    batch, heads, groups, length, _ = query.shape
    return query.new_empty(batch, length, heads, groups, value_dim).permute(0, 2, 3, 1, 4)
