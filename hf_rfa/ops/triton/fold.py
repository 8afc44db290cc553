"""The far kernel in the form that the Triton kernels read: one affine map, and a size and a log-scale per token.

With y = A (x - c), the clipped size r = 1 / max(1, |y| / radius) and t = alpha sqrt(scaling), a feature's argument is

    omega_i . (t r y) = r (W_i . x + b_i),        W = t omega A,  b = -W c

and the log-scale of psi (without the maximum of the exponents) is

    +-(t r |y|)^2 / 2  +  (exact part of the kernel)  +  (constants of the map)

W and b are small tensors per head, computed here in plain differentiable torch; r and the log-scale are one number
each per token, see `fold_tokens`. Gradients of alpha, gamma, centres, transforms and radii follow from theirs.
"""

import functools
import math
from dataclasses import dataclass

import torch

from hf_rfa.features.far_kernel import FarKernel

#: Form of the components, see `pieces`.
FORMS = {"positive": "EXP", "optimal_positive": "EXP", "hyperbolic": "PAIR", "trigonometric": "WAVE",
         "clustered": "CLUSTER"}  # fmt: skip


def form_of(far: FarKernel) -> str:
    """The kernels' name for a layer's feature maps; `dispatch` sends maps they do not cover elsewhere."""
    forms = {FORMS[name] for name in far.feature_maps}
    return "MIXED" if len(forms) > 1 else forms.pop()


@dataclass(frozen=True)
class Affine:
    """What a side has per head, whatever the token: W (Hk, P, D), b and shift (Hk, P), the sign of |t r y|^2 / 2 and
    the constants of the log-scale (Hk,), t = alpha sqrt(scaling) (Hk,)."""

    weight: torch.Tensor
    bias: torch.Tensor
    shift: torch.Tensor
    sign: torch.Tensor
    constant: torch.Tensor
    size: torch.Tensor


def affine(far: FarKernel, scaling: float, keys: bool) -> Affine:
    """The affine map of queries, or of keys; gamma is not part of it."""
    center, transform = (far.key_center, far.key_transform) if keys else (far.query_center, far.query_transform)
    size = far.alpha * math.sqrt(scaling)
    weight = far.omega * size.view(-1, 1, 1)
    if transform is not None:
        weight = weight @ transform
    bias = -torch.einsum("hmd,hd->hm", weight, center)
    device, dtype = far.omega.device, far.omega.dtype
    sign, constant = _constants(far.feature_maps, far.omega.shape[1], device, dtype)
    shift = torch.zeros_like(bias)
    if "optimal_positive" in far.feature_maps:  # the positive map is the case of proposal 0
        optimal = _is(far.feature_maps, "optimal_positive", device, dtype)
        proposal = far.proposal * optimal
        shrink = 1 - 4 * proposal
        weight, bias = weight * shrink.sqrt().view(-1, 1, 1), bias * shrink.sqrt().view(-1, 1)
        shift = proposal.view(-1, 1) * far.omega.square().sum(-1)
        constant = constant + far.omega.shape[2] / 4 * shrink.log()
    elif keys and "clustered" in far.feature_maps:
        shift = -far.omega.square().sum(-1) / 2
    return Affine(weight, bias, shift, sign, constant, size)


@functools.lru_cache(maxsize=64)
def _constants(
    maps: tuple[str, ...], count: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per head: the sign of |x'|^2 / 2, and half the log of the number that psi.psi is divided by."""
    signs = {"trigonometric": 1.0, "clustered": 0.0}
    half = -math.log(count) / 2
    logs = {"hyperbolic": half - math.log(2) / 2, "clustered": 0.0}
    sign, constant = [signs.get(name, -1.0) for name in maps], [logs.get(name, half) for name in maps]
    return torch.tensor(sign, dtype=dtype, device=device), torch.tensor(constant, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _is(maps: tuple[str, ...], wanted: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([float(name == wanted) for name in maps], dtype=dtype, device=device)
