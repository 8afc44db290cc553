"""Draws of omega: a pure function of (seed, layer, draw), and rows that are distributed as N(0, I)."""

import math

import pytest
import torch
from torch.testing import assert_close

from hf_rfa.config import OMEGA_DRAWS
from hf_rfa.features.omega import draw_omega


def draw(
    kind: str, *, heads: int = 3, features: int = 20, dim: int = 8, seed: int = 1, layer: int = 2, number: int = 0
):
    return draw_omega(heads, features, dim, kind=kind, seed=seed, layer=layer, draw=number)


@pytest.mark.parametrize("kind", OMEGA_DRAWS)
@pytest.mark.parametrize("features", [1, 7, 8, 9, 20])
def test_shape_and_type(kind, features):
    omega = draw(kind, features=features)
    assert omega.shape == (3, features, 8)
    assert omega.dtype == torch.float32
    assert omega.device.type == "cpu"
    assert bool(omega.isfinite().all())


@pytest.mark.parametrize("kind", OMEGA_DRAWS)
def test_the_same_arguments_give_the_same_draw(kind):
    assert_close(draw(kind), draw(kind), rtol=0, atol=0)


@pytest.mark.parametrize("kind", OMEGA_DRAWS)
@pytest.mark.parametrize("change", [{"seed": 2}, {"layer": 3}, {"number": 1}, {"seed": 2, "layer": 1}])
def test_each_argument_changes_the_whole_draw(kind, change):
    # `seed + layer + draw` as the seed would pass the first three and fail the last.
    assert not bool((draw(kind) == draw(kind, **change)).any())


def test_a_permutation_of_the_arguments_is_another_draw():
    draws = [
        draw("gaussian", seed=seed, layer=layer, number=number)
        for seed, layer, number in [
            (0, 1, 2),
            (0, 2, 1),
            (1, 0, 2),
            (1, 2, 0),
            (2, 0, 1),
            (2, 1, 0),
            (0, 0, 3),
            (3, 0, 0),
        ]
    ]
    assert len({float(omega[0, 0, 0]) for omega in draws}) == len(draws)


@pytest.mark.parametrize("kind", OMEGA_DRAWS)
def test_large_seeds(kind):
    assert not bool((draw(kind, seed=2**40) == draw(kind, seed=0)).any())


@pytest.mark.parametrize("kind", OMEGA_DRAWS)
def test_the_two_kinds_and_the_heads_differ(kind):
    omega = draw(kind, heads=3)
    assert not bool((omega[0] == omega[1]).any())
    assert not bool((omega[1] == omega[2]).any())


@pytest.mark.parametrize("kind", OMEGA_DRAWS)
def test_the_global_generator_is_neither_read_nor_moved(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        first = draw(kind)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(123)
        assert torch.equal(draw(kind), first)


@pytest.mark.parametrize("kind", OMEGA_DRAWS)
def test_the_omega_of_a_head_does_not_depend_on_how_many_follow(kind):
    assert torch.equal(draw(kind, heads=5)[:2], draw(kind, heads=2))


@pytest.mark.parametrize("kind", OMEGA_DRAWS)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.device("meta")])
def test_defaults_of_torch_do_not_matter(kind, default):
    # `from_pretrained` builds models under another default dtype, and on the meta device.
    expected = draw(kind)
    dtype = torch.get_default_dtype()
    try:
        if isinstance(default, torch.device):
            with default:
                got = draw(kind)
        else:
            torch.set_default_dtype(default)
            got = draw(kind)
    finally:
        torch.set_default_dtype(dtype)
    assert (got.dtype, got.device.type) == (torch.float32, "cpu")
    assert torch.equal(got, expected)


# --- the distribution: thousands of heads are as many independent draws --------------------------------------------

DRAWS, DIM = 4000, 6


@pytest.fixture(scope="module", params=["orthogonal", "gaussian"])
def many(request) -> torch.Tensor:
    """(DRAWS, 9, DIM) in float64: a whole orthogonal block of 6 rows and half of another."""
    return draw_omega(DRAWS, 9, DIM, kind=request.param, seed=5, layer=0, draw=0).double()


def assert_mean_within_4_errors(samples: torch.Tensor, expected: float) -> None:
    """samples (n, ...) independent over n: the mean of each entry is `expected`."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert bool(((samples.mean(0) - expected).abs() <= 4 * error).all())


def test_every_coordinate_has_mean_zero(many):
    # LAPACK's Q without the signs of R's diagonal has first coordinates that are always negative.
    assert_mean_within_4_errors(many, 0.0)


def test_every_row_has_covariance_one(many):
    products = many.unsqueeze(-1) * many.unsqueeze(-2)  # (DRAWS, 9, DIM, DIM)
    off_diagonal = ~torch.eye(DIM, dtype=torch.bool)
    assert_mean_within_4_errors(products[..., off_diagonal], 0.0)
    assert_mean_within_4_errors(products[..., ~off_diagonal], 1.0)


def test_coordinates_have_the_tails_of_a_normal_distribution(many):
    # Rows on the sphere of radius sqrt(D) have mean 0 and covariance I, too, but E x^4 = 3 D / (D + 2).
    assert_mean_within_4_errors(many.pow(4), 3.0)


def test_norms_follow_the_chi_distribution(many):
    norms = many.norm(dim=-1)
    mean = math.sqrt(2) * math.exp(math.lgamma((DIM + 1) / 2) - math.lgamma(DIM / 2))
    assert_mean_within_4_errors(norms, mean)
    assert_mean_within_4_errors(norms.square(), DIM)
    assert_mean_within_4_errors(norms.pow(4), DIM * (DIM + 2))


def test_norms_of_a_block_are_independent(many):
    squares = many.square().sum(-1) - DIM
    assert_mean_within_4_errors(squares[:, 0] * squares[:, 1], 0.0)


@pytest.mark.parametrize("features", [3, 8, 20])
def test_rows_of_a_block_are_orthogonal(features):
    omega = draw("orthogonal", features=features, dim=8).double()
    directions = omega / omega.norm(dim=-1, keepdim=True)
    for block in directions.split(8, dim=1):
        gram = block @ block.mT
        assert_close(gram, torch.eye(block.shape[1]).double().expand_as(gram), rtol=0, atol=1e-6)


def test_blocks_are_independent_of_each_other():
    omega = draw("orthogonal", features=16, dim=8).double()
    directions = omega / omega.norm(dim=-1, keepdim=True)
    gram = directions[:, :8] @ directions[:, 8:].mT
    assert float(gram.abs().max()) > 0.2  # 192 cosines of independent directions in 8 dimensions


def test_rows_of_gaussian_draws_are_not_orthogonal():
    omega = draw("gaussian", features=8, dim=8).double()
    gram = omega @ omega.mT
    assert float(gram.triu(1).abs().max()) > 0.5
