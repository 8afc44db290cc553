"""The psi family against the kernel that it estimates, and against its formulas written out."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch.testing import assert_close

import hf_rfa
from hf_rfa.config import OMEGA_DRAWS, RFAConfig
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.evaluation.results import CompareSettings
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.features.maps import FEATURE_MAPS, feature_map_of_heads, optimal_proposal
from hf_rfa.features.omega import draw_omega
from hf_rfa.ops.dispatch import why_not_triton
from hf_rfa.options import options_of
from hf_rfa.registry import FeatureMap

#: Those whose products estimate the kernel for a random omega; the rows of the clustered map are no draw.
MAPS = tuple(name for name in FEATURE_MAPS if name != "clustered")
POSITIVE_MAPS = ("positive", "hyperbolic", "optimal_positive")
DIM = 16
SCALING = DIM**-0.5


def kernel(feature_map: str, omega: torch.Tensor, *, alpha: float = 1.0, proposal: float | None = None) -> FarKernel:
    """A kernel of omega (heads, m, D) in float64, alike in all heads."""
    heads = len(omega)
    if proposal is None:
        proposal = float(optimal_proposal(torch.tensor(DIM / 2), DIM))
    ones = torch.ones(heads, dtype=torch.float64)
    return far_kernel(feature_map, omega.double(), alpha * ones, ones, proposal * ones)


def far_kernel(feature_map: str, omega: torch.Tensor, *per_head: torch.Tensor) -> FarKernel:
    """A kernel that takes nothing off queries and keys."""
    nothing = torch.zeros(omega.shape[0], omega.shape[2], dtype=omega.dtype)
    return FarKernel((feature_map,) * len(per_head[0]), omega, *per_head, query_center=nothing, key_center=nothing)


def psi(far: FarKernel, x: torch.Tensor) -> torch.Tensor:
    """psi(alpha x') of x (1, heads, N, D), exponential and all."""
    features, log_scale = far.query_features(x, SCALING)
    return features * log_scale.exp().unsqueeze(-1)


def pairs(count: int, seed: int = 0, size: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k (count, D) with entries of standard deviation 0.5: |q'| is about 0.5 D^(1/4) = 1."""
    generator = torch.Generator().manual_seed(seed)
    q, k = size * torch.randn(2, count, DIM, generator=generator, dtype=torch.float64)
    return q, k


def estimates(feature_map: str, kind: str, num_features: int, draws: int, q: torch.Tensor, k: torch.Tensor):
    """psi(q).psi(k) (draws, pairs): each head of one large draw is an independent draw."""
    omega = draw_omega(draws, num_features, DIM, kind=kind, seed=3, layer=0, draw=num_features)
    far = kernel(feature_map, omega)
    shape = (1, draws, *q.shape)
    return (psi(far, q.expand(shape)) * psi(far, k.expand(shape))).sum(-1).squeeze(0)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_the_config_takes_every_map_and_describes_it(name):
    assert RFAConfig(feature_map=name).feature_map == name
    assert f"'{name}' ({FEATURE_MAPS[name].summary})" in options_of(CompareSettings)["feature_map"].help


def test_a_new_map_converts_a_model(monkeypatch):
    """An entry in the table is all that it takes; Triton says that its kernels do not have the map."""

    def plain_sum(square, projection, omega, proposal):
        return torch.ones_like(projection), torch.zeros_like(square)

    monkeypatch.setitem(FEATURE_MAPS, "sum", FeatureMap(plain_sum, 1, "every key alike"))
    config = RFAConfig(feature_map="sum", num_features=8)
    assert RFAConfig.from_dict(config.to_dict()) == config.settled()
    far = kernel("sum", draw_omega(2, 8, DIM, kind="gaussian", seed=0, layer=0, draw=0))
    assert_close(psi(far, torch.randn(1, 2, 3, DIM, dtype=torch.float64)), torch.ones(1, 2, 3, 8, dtype=torch.float64))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    why = why_not_triton(far, torch.device("cpu"), torch.float32, DIM, 64)
    assert why == "the kernels do not have the map 'sum'"


@pytest.fixture
def even(monkeypatch) -> FeatureMap:
    """A map that is registered after hf_rfa was imported, under the name "even"."""
    monkeypatch.setitem(FEATURE_MAPS, "even", FeatureMap(FEATURE_MAPS["positive"].function, 1, "for this test"))
    return FEATURE_MAPS["even"]


def test_a_registered_map_is_saved_and_loaded(even, monkeypatch, tiny_llama, tmp_path):
    model = hf_rfa.convert(tiny_llama, RFAConfig(feature_map="even", window=8), calibrate=False).eval()
    ids = torch.arange(1, 101)[None]
    model.save_pretrained(tmp_path)
    again = hf_rfa.from_pretrained(tmp_path).eval()
    assert again.model.layers[0].self_attn.rfa.feature_maps[0] == "even"
    assert torch.equal(again(ids).logits, model(ids).logits)
    monkeypatch.delitem(FEATURE_MAPS, "even")
    with pytest.raises(CheckpointError, match=r"`feature_map` must be one of .* Got 'even'"):
        hf_rfa.from_pretrained(tmp_path)
    monkeypatch.setitem(FEATURE_MAPS, "other", even)
    monkeypatch.setitem(FEATURE_MAPS, "even", even)
    with pytest.raises(CheckpointError, match=r"saved with 'even' as map number 5 .* Got 'other' there\."):
        hf_rfa.from_pretrained(tmp_path)


def test_the_places_of_the_maps_are_those_of_saved_files():
    places = ("trigonometric", "positive", "hyperbolic", "optimal_positive", "clustered")
    assert tuple(FEATURE_MAPS)[: len(places)] == places


@pytest.mark.parametrize("name", MAPS)
def test_known_maps_pass_the_check(name):
    assert feature_map_of_heads(name, 3) == (name,) * 3


def test_an_unknown_map_is_named():
    with pytest.raises(ConfigError, match=r"`feature_map` must be one of .*'positive'.*Got 'cosine'\."):
        feature_map_of_heads("cosine", 2)


# --- the estimator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_estimates_are_unbiased(feature_map, kind):
    q, k = pairs(8)
    draws = 3000
    got = estimates(feature_map, kind, 24, draws, q, k)  # one and a half orthogonal blocks
    truth = (q * k).sum(-1).mul(SCALING).exp()
    error = got.std(0) / math.sqrt(draws)
    assert bool((error < 0.1 * truth).all())  # or the next line would accept anything
    assert bool(((got.mean(0) - truth).abs() <= 4 * error).all())


@pytest.mark.parametrize("feature_map", MAPS)
def test_error_falls_like_the_root_of_the_number_of_features(feature_map):
    q, k = pairs(16)
    truth = (q * k).sum(-1).mul(SCALING).exp()
    sizes = [16, 32, 64, 128, 256]
    errors = [
        float((estimates(feature_map, "gaussian", size, 300, q, k) / truth - 1).square().mean().sqrt())
        for size in sizes
    ]
    x, y = torch.tensor(sizes).double().log(), torch.tensor(errors).double().log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert -0.6 < slope < -0.4


@pytest.mark.parametrize("feature_map", MAPS)
def test_orthogonal_blocks_have_the_smaller_error(feature_map):
    q, k = pairs(16)
    truth = (q * k).sum(-1).mul(SCALING).exp()
    error = {
        kind: float((estimates(feature_map, kind, DIM, 1000, q, k) / truth - 1).square().mean())
        for kind in OMEGA_DRAWS
    }
    assert error["orthogonal"] < error["gaussian"]


@pytest.mark.parametrize("feature_map", ["trigonometric", "hyperbolic"])
def test_a_block_of_equal_lengths_is_exact_to_second_order(feature_map):
    """cos(w.(q - k)) and cosh(w.(q + k)), summed over an orthogonal block, miss the kernel by fourth powers only."""
    q, k = pairs(32)
    sizes = [0.05, 0.1, 0.2]
    errors = [
        float((estimates(feature_map, "sphere", DIM, 20, size * q, size * k) - truth(size * q, size * k)).abs().max())
        for size in sizes
    ]
    slopes = [math.log2(large / small) for small, large in itertools.pairwise(errors)]
    assert all(3.7 < slope < 4.3 for slope in slopes)


def truth(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q * k).sum(-1).mul(SCALING).exp()


# --- the formulas ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    """x (2, 3, 5, D) and omega (3, 10, D), float64, three heads."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 5, DIM, generator=generator, dtype=torch.float64)
    return x, draw_omega(3, 10, DIM, kind="gaussian", seed=0, layer=0, draw=0).double()


def test_trigonometric_is_the_formula(drawn):
    # As the design writes it: unscaled x, omega_i ~ N(0, I / sigma^2) with sigma^2 = sqrt(D).
    x, omega = drawn
    omega_i = omega / DIM**0.25
    expected = torch.empty(2, 3, 5, 20, dtype=torch.float64)
    for head in range(3):
        for i in range(10):
            angle = x[:, head] @ omega_i[head, i]
            scale = (x[:, head].square().sum(-1) / (2 * math.sqrt(DIM))).exp() * math.sqrt(1 / 10)
            expected[:, head, :, i] = scale * angle.sin()
            expected[:, head, :, 10 + i] = scale * angle.cos()
    assert_close(psi(kernel("trigonometric", omega), x), expected, rtol=1e-12, atol=1e-12)


def test_positive_is_the_formula(drawn):
    x, omega = drawn
    expected = torch.empty(2, 3, 5, 10, dtype=torch.float64)
    for head in range(3):
        scaled = x[:, head] * SCALING**0.5
        for i in range(10):
            expected[:, head, :, i] = math.sqrt(1 / 10) * (scaled @ omega[head, i] - scaled.square().sum(-1) / 2).exp()
    assert_close(psi(kernel("positive", omega), x), expected, rtol=1e-12, atol=1e-12)


def test_hyperbolic_is_the_formula(drawn):
    x, omega = drawn
    scaled = x * SCALING**0.5
    projection = torch.stack([scaled[:, head] @ omega[head].T for head in range(3)], dim=1)
    half = scaled.square().sum(-1, keepdim=True) / 2
    expected = torch.cat([(projection - half).exp(), (-projection - half).exp()], dim=-1) * math.sqrt(1 / 20)
    assert_close(psi(kernel("hyperbolic", omega), x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("proposal", [-2.0, -0.1, 0.0, 0.1])
def test_optimal_positive_is_the_formula(drawn, proposal):
    x, omega = drawn
    scaled = x * SCALING**0.5
    projection = torch.stack([scaled[:, head] @ omega[head].T for head in range(3)], dim=1)
    exponent = (
        proposal * omega.square().sum(-1)[:, None, :]
        + math.sqrt(1 - 4 * proposal) * projection
        - scaled.square().sum(-1, keepdim=True) / 2
    )
    expected = (1 - 4 * proposal) ** (DIM / 4) * math.sqrt(1 / 10) * exponent.exp()
    got = psi(kernel("optimal_positive", omega, proposal=proposal), x)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if proposal == 0:  # then it is the positive map
        assert_close(got, psi(kernel("positive", omega), x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_each_head_has_its_own_parameters(drawn, feature_map):
    x, omega = drawn
    alpha = torch.tensor([0.2, 1.0, 0.7], dtype=torch.float64)
    proposal = torch.tensor([-0.3, 0.05, -1.0], dtype=torch.float64)
    far = far_kernel(feature_map, omega, alpha, torch.ones_like(alpha), proposal)
    whole = psi(far, x)
    assert whole.shape[-1] == far.num_components
    for head in range(3):
        alone = far.select([head])
        assert_close(whole[:, head : head + 1], psi(alone, x[:, head : head + 1]), rtol=1e-12, atol=1e-12)
        single = kernel(feature_map, omega[head : head + 1], proposal=float(proposal[head]))
        assert_close(
            psi(single, x[:, head : head + 1] * alpha[head]), whole[:, head : head + 1], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("feature_map", MAPS)
def test_further_dimensions_between_heads_and_tokens(drawn, feature_map):
    # Queries of a group and chunks of keys come as (B, heads, groups or chunks, N, D).
    x, omega = drawn
    far = kernel(feature_map, omega)
    stacked = torch.stack([x, 2 * x], dim=2)
    assert_close(psi(far, stacked), torch.stack([psi(far, x), psi(far, 2 * x)], dim=2), rtol=1e-12, atol=1e-12)


# --- signs, sizes, limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", POSITIVE_MAPS)
def test_positive_maps_are_never_negative(feature_map):
    q, k = pairs(200, size=3.0)
    far = kernel(feature_map, draw_omega(1, 32, DIM, kind="orthogonal", seed=0, layer=0, draw=0))
    features = [far.query_features(x[None, None], SCALING)[0] for x in (q, k)]
    assert all(bool((f >= 0).all()) for f in features)
    assert bool((features[0] @ features[1].mT > 0).all())


def test_trigonometric_estimates_can_be_negative():
    q, k = pairs(200, size=3.0)
    far = kernel("trigonometric", draw_omega(1, 32, DIM, kind="orthogonal", seed=0, layer=0, draw=0))
    assert bool((psi(far, q[None, None]) @ psi(far, k[None, None]).mT < 0).any())


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("feature_map", MAPS)
def test_features_are_bounded_and_finite_in_float32(feature_map, size):
    # |x| = `size`: exp(|x|^2 / 2) overflows float32 from |x| = 13.3 on, so it may not be taken inside.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 64, DIM, generator=generator)
    x = (size * x / x.norm(dim=-1, keepdim=True)).requires_grad_()
    far = kernel(feature_map, draw_omega(2, 32, DIM, kind="orthogonal", seed=0, layer=0, draw=0)).to(torch.float32)
    features, log_scale = far.query_features(x, 1.0)
    assert features.dtype == log_scale.dtype == torch.float32
    assert features.shape == (1, 2, 64, far.num_components)
    assert float(features.detach().abs().max()) <= 1.0
    assert bool(log_scale.isfinite().all())
    (gradient,) = torch.autograd.grad(features.sum() + log_scale.sum(), x)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("feature_map", MAPS)
def test_alpha_zero_weighs_every_key_alike(feature_map):
    q, k = pairs(50, size=2.0)
    omega = draw_omega(1, 32, DIM, kind="orthogonal", seed=0, layer=0, draw=0)
    far = kernel(feature_map, omega, alpha=0.0)
    weights = psi(far, q[None, None]) @ psi(far, k[None, None]).mT
    assert_close(weights, weights[..., :1, :1].expand_as(weights), rtol=1e-12, atol=0)
    assert float(weights[0, 0, 0, 0]) > 0
    if feature_map != "optimal_positive":  # its features of x' = 0 still depend on omega: right on average only
        assert_close(weights, torch.ones_like(weights), rtol=1e-12, atol=0)


def test_the_query_and_the_key_share_one_function():
    # The kernel is symmetric, estimate by estimate.
    q, k = pairs(20)
    for feature_map in MAPS:
        forth, back = estimates(feature_map, "gaussian", 16, 5, q, k), estimates(feature_map, "gaussian", 16, 5, k, q)
        assert_close(forth, back, rtol=1e-12, atol=0)


# --- optimal positive features --------------------------------------------------------------------------------------


def log_second_moment(proposal: torch.Tensor, nu: float, dim: int) -> torch.Tensor:
    """log E[(psi_i(q) psi_i(k))^2] up to a constant of q and k, for nu = |q'+k'|^2.

    From E exp(a|w|^2 + b.w) = (1 - 2a)^(-D/2) exp(|b|^2 / (2 (1 - 2a))), w ~ N(0, I).
    """
    a, b_square = 4 * proposal, 4 * (1 - 4 * proposal) * nu
    return dim * (1 - 4 * proposal).log() - dim / 2 * (1 - 2 * a).log() + b_square / (2 * (1 - 2 * a))


@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("nu_by_dim", [1e-3, 0.1, 0.5, 1.0, 10.0])
def test_the_proposal_minimises_the_second_moment(dim, nu_by_dim):
    nu = nu_by_dim * dim
    best = optimal_proposal(torch.tensor(nu, dtype=torch.float64), dim)
    grid = torch.linspace(-3.0, 0.124, 20001, dtype=torch.float64)
    assert float(log_second_moment(best, nu, dim)) <= float(log_second_moment(grid, nu, dim).min())
    point = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_second_moment(point, nu, dim), point)
    assert abs(float(slope)) < 1e-8 * dim * (1 + nu_by_dim)


@pytest.mark.parametrize("proposal", [-0.1, -0.03, 0.0])
def test_the_second_moment_is_that_of_the_map(proposal):
    # Ties the closed form above to the code: moments of drawn features, where those converge (small norms, A near 0).
    q, k = pairs(4, size=0.3)
    draws = 200_000
    omega = draw_omega(1, draws, DIM, kind="gaussian", seed=0, layer=0, draw=0)
    far = kernel("optimal_positive", omega, proposal=proposal)
    products = draws * psi(far, q[None, None]) * psi(far, k[None, None])  # (1, 1, 4, draws)
    squares = products.squeeze().square()
    for i in range(4):
        nu = float((q[i] + k[i]).square().sum() * SCALING)
        constant = -float((q[i].square() + k[i].square()).sum() * SCALING)
        expected = (log_second_moment(torch.tensor(proposal).double(), nu, DIM) + constant).exp()
        error = squares[i].std() / math.sqrt(draws)
        assert float(error) < 0.05 * float(expected)
        assert abs(float(squares[i].mean() - expected)) < 4 * float(error)


def test_the_proposal_at_small_and_large_norms():
    values = optimal_proposal(torch.tensor([0.0, 1e-12, 1e-3, 1.0, 1e6], dtype=torch.float64), DIM)
    assert bool(values.isfinite().all())
    assert bool((values <= 1e-9).all())  # never beyond 0, let alone 1/8, where the second moment is infinite
    assert bool((values.diff() <= 0).all())
    assert abs(float(values[0])) < 1e-5  # no norm, no need for another proposal


def test_the_optimal_proposal_beats_the_positive_map():
    q, k = pairs(16, size=0.6)
    truth = (q * k).sum(-1).mul(SCALING).exp()
    nu = (q + k).square().sum(-1).mean() * SCALING
    draws = 4000
    omega = draw_omega(draws, 16, DIM, kind="gaussian", seed=0, layer=0, draw=0)
    error = {}
    for name in ("positive", "optimal_positive"):
        far = kernel(name, omega, proposal=float(optimal_proposal(nu, DIM)))
        shape = (1, draws, *q.shape)
        estimate = (psi(far, q.expand(shape)) * psi(far, k.expand(shape))).sum(-1)
        error[name] = float((estimate / truth - 1).square().mean().sqrt())
    # The closed form promises exp(-0.31) = 0.73 at this nu.
    assert error["optimal_positive"] < 0.85 * error["positive"]


# --- the kernel object ----------------------------------------------------------------------------------------------


def test_log_gamma_and_alive():
    omega = draw_omega(3, 4, DIM, kind="gaussian", seed=0, layer=0, draw=0).double()
    gamma = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    far = far_kernel("positive", omega, torch.ones_like(gamma), gamma, torch.zeros_like(gamma))
    assert far.alive().tolist() == [False, True, True]
    assert_close(far.log_gamma(), torch.tensor([-math.inf, 0.0, math.log(0.5)], dtype=torch.float64))


@pytest.mark.parametrize(("feature_map", "components"), list(zip(MAPS, (14, 7, 14, 7), strict=True)))
def test_number_of_components(feature_map, components):
    omega = draw_omega(1, 7, DIM, kind="gaussian", seed=0, layer=0, draw=0)
    assert kernel(feature_map, omega).num_components == components


def test_to_moves_every_tensor():
    far = kernel("positive", draw_omega(1, 7, DIM, kind="gaussian", seed=0, layer=0, draw=0)).to(torch.float32)
    assert {t.dtype for t in (far.omega, far.alpha, far.gamma, far.proposal)} == {torch.float32}


# --- centring -------------------------------------------------------------------------------------------------------


def centred(far: FarKernel, seed: int = 5) -> FarKernel:
    generator = torch.Generator().manual_seed(seed)
    b, c = 0.2 * torch.randn(2, *far.query_center.shape, generator=generator, dtype=torch.float64)
    return dataclasses.replace(far, query_center=b, key_center=c)


def estimated_kernel(far: FarKernel, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """psi(q).psi(k) of q, k (count, D), each with each."""
    query, query_scale = far.query_features(q[None, None], SCALING)
    key, key_scale = far.key_features(k[None, None], SCALING)
    return ((query @ key.mT) * (query_scale.unsqueeze(-1) + key_scale.unsqueeze(-2)).exp())[0, 0]


@pytest.mark.parametrize("feature_map", MAPS)
def test_centring_is_an_exact_change_of_variable(feature_map):
    """With b and c taken off, the mean over draws is still exp(q.k / sqrt D)."""
    q, k = pairs(6)
    draws = []
    for draw in range(200):
        omega = draw_omega(1, 256, DIM, kind="gaussian", seed=3, layer=0, draw=draw)
        draws.append(estimated_kernel(centred(kernel(feature_map, omega)), q, k))
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / len(draws) ** 0.5
    expected = (q @ k.mT * SCALING).exp()
    assert ((mean - expected).abs() < 4.5 * error + 1e-9).all()
    assert (error / expected).max() < 0.1  # else the line above says nothing


@pytest.mark.parametrize("feature_map", MAPS)
def test_at_alpha_zero_what_the_centres_say_stays_exact(feature_map):
    """exp(s (q.c + b.(k - c))), and not the plain mean: no randomness is left."""
    q, k = pairs(6)
    omega = draw_omega(1, 8, DIM, kind="gaussian", seed=3, layer=0, draw=0)
    # A = 0, or the features of alpha = 0 depend on omega alone.
    far = centred(kernel(feature_map, omega, alpha=0.0, proposal=0.0))
    b, c = far.query_center, far.key_center
    expected = (SCALING * (q @ c.T + ((k - c) @ b.T).T)).exp()
    assert_close(estimated_kernel(far, q, k), expected, rtol=1e-12, atol=0)


def test_centring_lowers_the_error_where_the_mean_is_large():
    q, k = pairs(40)
    q, k = q + 1.5, k + 1.5
    errors = {}
    for name in ("plain", "centred"):
        squares = []
        for draw in range(20):
            far = kernel("positive", draw_omega(1, 64, DIM, kind="gaussian", seed=3, layer=0, draw=draw))
            if name == "centred":
                far = dataclasses.replace(far, query_center=q.mean(0)[None], key_center=k.mean(0)[None])
            squares.append((estimated_kernel(far, q, k) / (q @ k.mT * SCALING).exp() - 1).square().mean())
        errors[name] = torch.stack(squares).mean().sqrt().item()
    assert errors["centred"] < 0.5 * errors["plain"]
