"""The size r and the log-scale of each token (see `fold`): one kernel each way, which reads a token once.

With g the gradient of |y|^2 (of r where y is clipped, else of the log-scale), d that of the log-scale, o the other
side's centre and s the scaling,

    dx = 2 g A^T y + s d o,        dc = -sum 2 g A^T y  (- sum s d o for keys),        do = sum s d (x or x - c),
    dt = sum +-t r^2 |y|^2 d,      d(constant) = sum d

Where A or the radius is learned, which is rare, the gradients are those of the formula in plain torch, recomputed.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from hf_rfa.features.far_kernel import FarKernel, pull_in, squared_bound
from hf_rfa.ops.recomputing import Flags, recomputing
from hf_rfa.ops.triton.fold import affine
from hf_rfa.ops.triton.pieces import numbers, put, put_numbers, tile
from hf_rfa.ops.triton.sizes import on_device, tile_size, token_rows

#: Tokens per program, and rows of the change of variable that it multiplies at a time.
TOKEN_TILE, ROW_TILE = 64, 64
#: How tokens are multiplied by the change of variable: |y|^2 stands in an exponent. Three TF32 products are as good as
#: float32 ones, which tensor cores do not have.
PRECISION = "tf32x3"
#: Places of the change of variable and of the radius among the tensors of `token_numbers_in_torch`.
_TRANSFORM, _RADIUS = 3, 4


@dataclasses.dataclass(frozen=True)
class Side:
    """The far kernel for queries, or for keys: weight (Hk, P, D), bias and shift (Hk, P) of the arguments
    r (W x + b) + shift; r and log_scale (B, Hk, ..., T) per token, float32."""

    weight: torch.Tensor
    bias: torch.Tensor
    shift: torch.Tensor
    r: torch.Tensor
    log_scale: torch.Tensor


def fold_queries(query: torch.Tensor, far: FarKernel, scaling: float) -> Side:
    """Fold queries (B, Hk, G, T, D); gamma is part of their log-scale, which is -inf for heads without a far part."""
    return _fold(query, far, scaling, keys=False)


def fold_keys(key: torch.Tensor, far: FarKernel, scaling: float) -> Side:
    """Fold keys (B, Hk, T, D)."""
    return _fold(key, far, scaling, keys=True)


def _fold(x: torch.Tensor, far: FarKernel, scaling: float, keys: bool) -> Side:
    center, other = (far.key_center, far.query_center) if keys else (far.query_center, far.key_center)
    transform, radius = (
        (far.key_transform, far.key_radius) if keys else (far.query_transform, far.query_radius)
    )  # fmt: skip
    side = affine(far, scaling, keys)
    constant = side.constant if keys else side.constant + far.log_gamma()
    recipe = _Recipe(scaling, keys)
    r, log_scale = recomputing(recipe, x, center, other, transform, radius, side.size, side.sign, constant)
    return Side(side.weight, side.bias, side.shift, r, log_scale)


def token_numbers_in_torch(
    x: torch.Tensor, center: torch.Tensor, other: torch.Tensor, transform: torch.Tensor | None,
    radius: torch.Tensor | None, size: torch.Tensor, sign: torch.Tensor, constant: torch.Tensor, *, scaling: float,
    keys: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """r and the log-scale (B, Hk, ..., T) of tokens x (B, Hk, ..., T, D), which are differentiable.

    center, other: (Hk, D) the side's own centre, and the other side's; transform (Hk, D, D) and radius (Hk,) or None;
    size t, sign and constant (Hk,) as in `fold.Affine`.
    """
    heads = (-1, *(1,) * (x.dim() - 3))  # broadcasts against (B, Hk, ..., T), one number per token
    wide = x.to(center.dtype)
    centred = wide - center.view(*heads, x.shape[-1])
    moved = centred if transform is None else torch.einsum("bh...d,hed->bh...e", centred, transform)
    square = moved.square().sum(-1)
    r = torch.ones_like(square)
    if radius is not None:
        r = pull_in(square, squared_bound(radius).view(heads))
    square = square * (size.view(heads) * r).square() / 2
    exact = ((centred if keys else wide) * other.view(*heads, x.shape[-1])).sum(-1)
    return r, sign.view(heads) * square + exact * scaling + constant.view(heads)


@triton.jit
def tokens_of(
    x, center, other, each, start, rows, dims, x_b, x_h, x_g, x_t, heads, groups, length, D: tl.constexpr,
    BD: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """A tile of tokens x, x - c, and o, all in float32."""
    a, g = each // groups, each % groups
    row, head = a // heads, a % heads
    own_center = tl.load(center + head * D + dims, mask=dims < D, other=0.0)
    other_center = tl.load(other + head * D + dims, mask=dims < D, other=0.0)
    tokens = tile(x + row * x_b + head * x_h + g * x_g, start, rows, length, x_t, D, BD, BT).to(tl.float32)
    return tokens, tokens - own_center[None, :], other_center


@triton.jit
def token_numbers(
    x, center, other, transform, figures, r, log_scale, x_b, x_h, x_g, x_t, heads, groups, length, scaling,
    D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, KEYS: tl.constexpr,
    TRANSFORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of T, B * Hk * G). figures (Hk, 4): t, sign, constant, and the bound of |y|^2."""
    part, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, rows, dims, start = each // groups % heads, tl.arange(0, BT), tl.arange(0, BD), part * BT
    in_d = dims < D
    tokens, centred, other_center = tokens_of(
        x, center, other, each, start, rows, dims, x_b, x_h, x_g, x_t, heads, groups, length, D, BD, BT
    )  # fmt: skip
    figures += head * 4
    size, sign, constant, bound = (
        tl.load(figures), tl.load(figures + 1), tl.load(figures + 2), tl.load(figures + 3),
    )  # fmt: skip
    if TRANSFORM:
        square = tl.zeros((BT,), tl.float32)
        for first in range(0, D, BE):
            rows_of = first + tl.arange(0, BE)
            pointers = transform + head * D * D + rows_of[None, :] * D + dims[:, None]
            matrix = tl.load(pointers, mask=(rows_of < D)[None, :] & in_d[:, None], other=0.0)
            moved = tl.dot(centred, matrix, input_precision=PRECISION)
            square += tl.sum(moved * moved, 1)
    else:
        square = tl.sum(centred * centred, 1)
    clipped = tl.sqrt(bound / tl.maximum(square, bound))
    factor = size * clipped
    exact = tl.sum((centred if KEYS else tokens) * other_center[None, :], 1)
    put_numbers(r + each * length, start, rows, length, clipped, BT)
    result = sign * (square * (factor * factor) / 2) + exact * scaling + constant
    put_numbers(log_scale + each * length, start, rows, length, result, BT)


@triton.jit
def token_gradients(
    x, center, other, transform, figures, d_r, d_log, dx, sums, x_b, x_h, x_g, x_t, heads, groups, length, tiles,
    scaling, D: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, KEYS: tl.constexpr,
    TRANSFORM: tl.constexpr, LEARNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid as that of `token_numbers`; dx (B, Hk, G, T, D). sums (B * Hk * G, tiles, 2 D + 2): those of dc, do, dt and
    d(constant) over the tile's tokens."""
    part, each = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head, rows, dims, start = each // groups % heads, tl.arange(0, BT), tl.arange(0, BD), part * BT
    in_d = dims < D
    tokens, centred, other_center = tokens_of(
        x, center, other, each, start, rows, dims, x_b, x_h, x_g, x_t, heads, groups, length, D, BD, BT
    )  # fmt: skip
    figures += head * 4
    size, sign, bound = tl.load(figures), tl.load(figures + 1), tl.load(figures + 3)
    # Beyond the sequence both gradients are 0, and with them everything that is summed.
    of_r = numbers(d_r + each * length, start, rows, length, BT)
    of_log = numbers(d_log + each * length, start, rows, length, BT)
    if TRANSFORM:
        square, back = tl.zeros((BT,), tl.float32), tl.zeros((BT, BD), tl.float32)
        for first in range(0, D, BE):
            rows_of = first + tl.arange(0, BE)
            pointers = transform + head * D * D + rows_of[None, :] * D + dims[:, None]
            matrix = tl.load(pointers, mask=(rows_of < D)[None, :] & in_d[:, None], other=0.0)
            moved = tl.dot(centred, matrix, input_precision=PRECISION)
            square += tl.sum(moved * moved, 1)
            back += tl.dot(moved, tl.trans(matrix), input_precision=PRECISION)
    else:
        square, back = tl.sum(centred * centred, 1), centred
    clips = square > bound
    clipped = tl.where(clips, tl.sqrt(bound / tl.maximum(square, bound)), 1.0)
    of_square = tl.where(clips, -of_r * clipped / tl.maximum(square, bound) / 2, of_log * sign * size * size / 2)
    through = 2 * of_square[:, None] * back
    beside = (of_log * scaling)[:, None]
    result = through + beside * other_center[None, :]
    put(dx + each * length * D, start, rows, length, D, result, D, BD, BT)
    if LEARNED:
        sums += (each * tiles + part) * (2 * D + 2)
        tl.store(sums + dims, -tl.sum(result if KEYS else through, 0), mask=in_d)
        tl.store(sums + D + dims, tl.sum(beside * (centred if KEYS else tokens), 0), mask=in_d)
        factor = size * clipped * clipped
        tl.store(sums + 2 * D, tl.sum(of_log * sign * factor * square, 0))
        tl.store(sums + 2 * D + 1, tl.sum(of_log, 0))


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """See `ops.recomputing`; the tensors are those of `token_numbers_in_torch`."""

    scaling: float
    keys: bool
    outputs: int = 2
    constant: tuple[int, ...] = ()
    forward_only: tuple[int, ...] = ()

    def forward(self, tensors: Sequence[Any], followed: Flags) -> tuple[torch.Tensor, ...]:
        x = token_rows(tensors[0])
        r, log_scale = (tensors[1].new_empty(x.shape[:-1]) for _ in range(2))
        tokens, grid, given, tiles = self._launch(x, tensors)
        with on_device(x):
            token_numbers[grid](
                tokens, *given, r, log_scale, *tokens.stride()[:4], *tokens.shape[1:4], self.scaling, **tiles
            )
        return r, log_scale

    def backward(
        self, tensors: Sequence[Any], outputs: Sequence[Any], kept: Sequence[Any], above: Sequence[Any],
        followed: Flags,
    ) -> Sequence[torch.Tensor | None]:  # fmt: skip
        up = [torch.zeros_like(output) if g is None else g for g, output in zip(above, outputs, strict=True)]
        if followed[_TRANSFORM] or followed[_RADIUS]:
            return self._backward_in_torch(tensors, up, followed)
        x = token_rows(tensors[0])
        tokens, grid, given, tiles = self._launch(x, tensors)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        learned, dim = any(followed[1:]), x.shape[-1]
        sums = tensors[1].new_empty(grid[1] if learned else 0, grid[0], 2 * dim + 2)
        with on_device(x):
            token_gradients[grid](
                tokens, *given, *(g.contiguous() for g in up), dx, sums, *tokens.stride()[:4], *tokens.shape[1:4],
                grid[0], self.scaling, LEARNED=int(learned), **tiles,
            )  # fmt: skip
        if not learned:
            return [dx, *(None for _ in tensors[1:])]
        heads = sums.view(tokens.shape[0], tokens.shape[1], -1, 2 * dim + 2).sum((0, 2))
        center, other, size, constant = heads.split([dim, dim, 1, 1], dim=-1)
        return [dx, center, other, None, None, size.squeeze(-1), None, constant.squeeze(-1)]

    def _launch(
        self, x: torch.Tensor, tensors: Sequence[Any]
    ) -> tuple[torch.Tensor, tuple[int, int], tuple[torch.Tensor, ...], dict[str, Any]]:
        """The tokens (B, Hk, G, T, D), the grid, the other tensors of both kernels, and their tiles."""
        _, center, other, transform, radius, size, sign, constant = tensors
        tokens = x if x.dim() == 5 else x.unsqueeze(2)
        batch, heads, groups, length, dim = tokens.shape
        bound = squared_bound(torch.zeros_like(size) if radius is None else radius)
        figures = torch.stack([size, sign, constant, bound], dim=1)
        center = center.contiguous()
        matrix = center if transform is None else transform.contiguous()
        tiles = {
            "D": dim, "BD": tile_size(dim), "BT": TOKEN_TILE, "BE": min(ROW_TILE, tile_size(dim)),
            "KEYS": int(self.keys), "TRANSFORM": int(transform is not None), "PRECISION": PRECISION,
        }  # fmt: skip
        grid = triton.cdiv(length, TOKEN_TILE), batch * heads * groups
        return tokens, grid, (center, other.contiguous(), matrix, figures), tiles

    def _backward_in_torch(
        self, tensors: Sequence[Any], above: Sequence[torch.Tensor], followed: Flags
    ) -> Sequence[torch.Tensor | None]:
        asked = [index for index, follow in enumerate(followed) if follow]

        def formula(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            whole = list(tensors)
            for index, tensor in zip(asked, given, strict=True):
                whole[index] = tensor
            return token_numbers_in_torch(*whole, scaling=self.scaling, keys=self.keys)

        pull_back = torch.func.vjp(formula, *(tensors[index] for index in asked))[1]
        found = dict(zip(asked, pull_back(tuple(above)), strict=True))
        return [found.get(index) for index in range(len(tensors))]
