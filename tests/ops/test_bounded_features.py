"""The hyperbolic map without a maximum is the map of `FarKernel`, in its numbers and in its gradient."""

import pytest
import torch
from operator_inputs import assert_near

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.causal.bounded_features import LARGEST, MAPS, BoundedMap
from hf_rfa.ops.causal.scratch import Scratch

ROWS, HEADS, DIM, CHUNKS, TOKENS = 2, 2, 8, 3, 5
SCALING = 0.3


def kernel(*, plain: bool, name: str = "hyperbolic") -> FarKernel:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def numbers(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    centers = torch.zeros(2, HEADS, DIM, dtype=torch.float64) if plain else draw(2, HEADS, DIM)
    rest = [None] * 4 if plain else [*draw(2, HEADS, DIM, DIM).unbind(), numbers(3.0, 0.0), numbers(0.0, 3.0)]
    return FarKernel(
        (name,) * HEADS, draw(HEADS, 16, DIM), numbers(0.5, 0.7), numbers(1.0, 1.0), numbers(0.0, 0.0),
        *centers.unbind(), *rest,
    )  # fmt: skip


@pytest.mark.parametrize("keys", [False, True], ids=["queries", "keys"])
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "centres, transforms and bounds"])
@pytest.mark.parametrize("outlier", [False, True], ids=["", "outlier"])
@pytest.mark.parametrize("name", MAPS)
def test_psi_and_its_gradient_are_those_of_the_kernel(keys, plain, outlier, name):
    far = kernel(plain=plain, name=name)
    tokens = torch.randn(ROWS * HEADS, CHUNKS, TOKENS, DIM, generator=torch.Generator().manual_seed(1)).double()
    if outlier:
        tokens[1, 1, 2] *= 40 if name == "hyperbolic" else 4  # beyond that exp(|x|^2 / 2) overflows in here
    leaf = tokens.clone().requires_grad_()
    split = leaf.unflatten(0, (ROWS, HEADS))
    features, log_scale = far.key_features(split, SCALING) if keys else far.query_features(split, SCALING)
    want = (features * log_scale.exp().unsqueeze(-1)).flatten(0, 1)
    bounded = BoundedMap(far, SCALING, ROWS, keys, Scratch())
    made = bounded(tokens)
    psi = made.features * made.log_scale.exp().unsqueeze(-1)
    assert_near(psi, want, 1e-13)
    if outlier and plain and name == "hyperbolic":
        assert float(made.features[0].max()) > 1  # not divided by a maximum, but for the outlier
        assert float(made.features[1, 1, 2].max()) <= 1
    weights = torch.randn(want.shape, generator=torch.Generator().manual_seed(2)).double()
    (gradient,) = torch.autograd.grad(want, leaf, weights)
    of_features = weights * made.log_scale.exp().unsqueeze(-1)
    got = bounded.gradient(made, of_features.mT.contiguous().mT, (weights * psi).sum(-1))
    assert_near(got, gradient, 1e-12, "gradient")


@pytest.mark.parametrize("narrow", [False, True], ids=["", "bfloat16"])
def test_an_outlier_changes_no_bit_of_other_tokens(narrow):
    far = kernel(plain=True)
    tokens = torch.randn(ROWS * HEADS, CHUNKS, TOKENS, DIM, generator=torch.Generator().manual_seed(1)).double()
    changed = tokens.clone()
    changed[:, :, -1] = 100.0
    one, two = (BoundedMap(far, SCALING, ROWS, False, Scratch(), narrow)(x) for x in (tokens, changed))
    assert (one.features.dtype == torch.bfloat16) == narrow
    assert torch.equal(one.features[:, :, :-1], two.features[:, :, :-1])
    assert torch.equal(one.log_scale[:, :, :-1], two.log_scale[:, :, :-1])
    assert bool(two.features.isfinite().all())
    assert float(two.log_scale[:, :, -1].abs().max()) > LARGEST
