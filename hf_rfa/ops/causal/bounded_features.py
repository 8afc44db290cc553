"""The maps of pairs, whose gradient is written out: the hyperbolic one for small exponents, the trigonometric one.

The hyperbolic map is exp(w.x') without a maximum, and exp(-w.x') as its reciprocal:
`FarKernel` divides the features of each token by their maximum, so that no exponent can overflow. Tokens whose |w.x'|
is at most `LARGEST` (tempered kernels hardly ever come near it) need no division, which saves half of the exponentials
and three passes over the features. The trigonometric map needs no division anyway. The features are computed
transposed, (F, tokens), so that the two halves of F are contiguous, and as powers of two, which take a third of the
time of powers of e.
"""

import math
from dataclasses import dataclass

import torch

from hf_rfa.features.far_kernel import FarKernel, pull_in, squared_bound
from hf_rfa.ops.causal.scratch import Scratch

#: The maps that are computed here, where all heads of a layer have the same one.
MAPS = ("hyperbolic", "trigonometric")
#: psi(q).psi(k) then lies within exp(+-2 * 20): far from the ends of float32, for any number of keys.
LARGEST = 20.0
LN2 = math.log(2)


@dataclass(frozen=True)
class BoundedFeatures:
    """psi of tokens (A, n, R, F), its log-scale (A, n, R), and the intermediate results that the gradient needs.

    psi is bfloat16 for products that are, see `narrow_products`.

    With c = x - center, y = A c, w.x' = f a w.y:  y (A, n, R, D), square |y|^2 and shrink f (or None) (A, n, R).
    """

    features: torch.Tensor
    log_scale: torch.Tensor
    y: torch.Tensor
    square: torch.Tensor
    shrink: torch.Tensor | None


class BoundedMap:
    """Features of the queries or of the keys, for a far kernel whose heads all have one of `MAPS`."""

    def __init__(
        self, far: FarKernel, scaling: float, rows: int, keys: bool, scratch: Scratch, narrow: bool = False
    ) -> None:  # fmt: skip
        def of_rows(x: torch.Tensor) -> torch.Tensor:
            return x.detach().repeat(rows, *(1,) * (x.dim() - 1))

        size = far.alpha * math.sqrt(scaling)
        centers = (far.key_center, far.query_center) if keys else (far.query_center, far.key_center)
        center, other = (of_rows(x).unsqueeze(1) if bool(x.any()) else None for x in centers)
        transform = far.key_transform if keys else far.query_transform
        radius = far.key_radius if keys else far.query_radius
        self._center, self._other, self._scaling, self._keys, self._scratch = center, other, scaling, keys, scratch
        self._transform = None if transform is None else of_rows(transform)
        self._bound = None
        if radius is not None and bool((radius > 0).any()):
            self._bound = of_rows(squared_bound(radius)).view(-1, 1, 1)
        self._omega = of_rows(far.omega * size[:, None, None])
        self._longest = torch.linalg.vector_norm(self._omega, dim=-1).amax(-1)
        self._waves = far.feature_maps[0] == "trigonometric"
        #: -|x'|^2 / 2 per |y|^2; of the trigonometric map with the other sign.
        self._slope = of_rows(size.square() / (2 if self._waves else -2)).view(-1, 1, 1)
        self._narrow = narrow
        self._constant = -math.log((1 if self._waves else 2) * far.omega.shape[1]) / 2
        self._multiples: dict[float, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor) -> BoundedFeatures:
        """The features of x (A, n, R, D)."""
        count, chunks, tokens, _ = x.shape
        centred = x if self._center is None else x - self._center.unsqueeze(2)
        y = centred if self._transform is None else (centred.flatten(1, 2) @ self._transform.mT).view_as(x)
        square = torch.linalg.vector_norm(y, dim=-1).square_()
        omega, side = self._times(1.0 if self._waves else 1 / LN2), "key" if self._keys else "query"
        exponent = self._scratch(f"{side} exponents", x, count * chunks, omega.shape[1], tokens)
        for row, (left, right) in enumerate(zip(omega, y.mT, strict=True)):  # omega is not copied for each chunk
            torch.bmm(left.expand(chunks, -1, -1), right, out=exponent[row * chunks : (row + 1) * chunks])
        shrink, inside = None, square
        if self._bound is not None:
            shrink, inside = pull_in(square, self._bound), torch.minimum(square, self._bound)
            exponent.mul_(shrink.view(-1, 1, tokens))
        large = None if self._waves else self._large(exponent, inside)
        like = x.new_empty(0, dtype=torch.bfloat16) if self._narrow else x
        buffer = self._scratch(f"{side} features", like, count * chunks, 2, *exponent.shape[1:])
        projection, inverse = buffer[:, 0], buffer[:, 1]
        if self._waves:
            torch.sin(exponent, out=projection)
            torch.cos(exponent, out=inverse)
        else:
            self._powers(exponent, projection, inverse)
        log_scale = self._constant + self._slope * inside
        if large is not None:
            # Handled apart, so that other tokens do not change.
            where, peak, highest = large
            projection.mT[where] = (highest - peak).exp2_().to(projection.dtype)
            inverse.mT[where] = (-highest - peak).exp2_().to(projection.dtype)
            log_scale.view(-1, tokens)[where] += peak.squeeze(-1) * LN2
        if self._other is not None:
            exact = (centred if self._keys else x).flatten(1, 2) @ self._other.mT
            log_scale = log_scale.add_(exact.view_as(log_scale), alpha=self._scaling)
        features = buffer.view(count, chunks, -1, tokens).mT
        return BoundedFeatures(features, log_scale, y, square, shrink)

    def gradient(self, made: BoundedFeatures, features: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        """Gradient of x (A, n, R, D) from those of the features (overwritten) and of their log-scale."""
        count, chunks, tokens = made.square.shape
        halves = [x.mT.reshape(count * chunks, 2, -1, tokens) for x in (features, made.features)]
        (given, given_inverse), (value, inverse) = (half.unbind(1) for half in halves)
        if self._waves:
            projection = given.mul_(inverse).addcmul_(given_inverse, value, value=-1)
        else:
            projection = given.mul_(value).addcmul_(given_inverse, inverse, value=-1)
        square = self._slope * log_scale
        omega = self._times(1.0)
        if made.shrink is not None:
            projection.mul_(made.shrink.view(-1, 1, tokens))
        if self._narrow:
            projection = projection.to(torch.bfloat16)
        x = projection.new_empty(*made.y.shape)
        for row, (left, right) in enumerate(zip(projection.mT.unflatten(0, (count, chunks)), omega, strict=True)):
            torch.bmm(left, right.to(left.dtype).expand(chunks, -1, -1), out=x[row])
        x = x.to(made.y.dtype)
        if self._bound is not None:
            # Beyond the bound f = bound / |y|, so |f y| is constant.
            outside = made.square > self._bound
            square = torch.where(outside, (x * made.y).sum(-1) / (-2 * made.square), square)
        x.addcmul_(made.y, square.unsqueeze(-1), value=2)
        if self._transform is not None:
            x = (x.flatten(1, 2) @ self._transform).view_as(x)
        if self._other is not None:
            x.addcmul_(log_scale.unsqueeze(-1), self._other.unsqueeze(2), value=self._scaling)
        return x

    def _powers(self, exponent: torch.Tensor, projection: torch.Tensor, inverse: torch.Tensor) -> None:
        """Write 2^exponent and 2^-exponent to `projection` and `inverse`; `exponent` is overwritten."""
        torch.exp2(exponent, out=projection)
        if self._narrow:  # not of a rounded number
            torch.exp2(exponent.neg_(), out=inverse)
        else:
            torch.reciprocal(projection, out=inverse)

    def _large(
        self, exponent: torch.Tensor, square: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor] | None:
        """Tokens with large exponents (A * n, m, R) in base 2: indices, maxima, exponents; None if there are none."""
        if (square.amax((1, 2)).sqrt_() * self._longest).max() <= LARGEST:  # |w.x'| <= |w| |x'|
            return None
        low, high = torch.aminmax(exponent)
        if low >= -LARGEST / LN2 and high <= LARGEST / LN2:
            return None
        peak = torch.maximum(exponent.amax(1), exponent.amin(1).neg_())
        where = (peak > LARGEST / LN2).nonzero(as_tuple=True)
        return where, peak[where].unsqueeze(-1), exponent.mT[where]

    def _times(self, factor: float) -> torch.Tensor:
        """`factor` times omega (A, m, D)."""
        if factor not in self._multiples:
            self._multiples[factor] = self._omega * factor
        return self._multiples[factor]
