"""Every point that calibration may choose, and tokens that are hard on floating point, through every form.

A layer here has one key head for each point of the grid alpha x gamma x radius, so that one call covers all of it.
Among the tokens are zeros, tokens that equal their centre, and, where they are large, logits beyond 100 on both sides.
"""

import importlib.util
import itertools

import pytest
import torch
from operator_inputs import FEATURE_MAPS, Tensors, assert_near

import hf_rfa
import hf_rfa.ops.attention as operator
from hf_rfa.calibration.candidates import ALPHAS
from hf_rfa.calibration.fitting import GAMMAS
from hf_rfa.features.omega import draw_omega
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.compiled import linear_heads_of_graph
from hf_rfa.ops.decode import Decoder

N, DIM, FEATURES = 27, 8, 6
#: None, tight, tighter than its own square in float32, ordinary, beyond all tokens.
RADII = (0.0, 1e-3, 1e-25, 1.0, 1e4)
#: All alphas, and of the gammas that are only a factor none, the ends and one between.
GRID = tuple(itertools.product(ALPHAS, (0.0, min(GAMMAS), 0.5, max(GAMMAS)), RADII))
FEW = tuple(itertools.product((0.0, 0.3, 1.0), (0.0, 0.5), (0.0, 1e-3, 1.0)))
#: Maps of the key heads, over and over.
MAPS = {name: (name,) for name in FEATURE_MAPS} | {
    "waves and pairs": ("trigonometric", "hyperbolic"),
    "clusters among others": ("clustered", "hyperbolic", "trigonometric"),
    "positive ones": ("positive", "optimal_positive"),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Of the largest output: half a unit in the last place of the type, and of float32 what sums and exponents lose.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
#: In float32 exponents of 100 have lost 7 of 24 bits before they are exponents.
LARGE = 1e-5
#: The same of gradients in float32.
SLOPES = {"ordinary": 2e-5, "large": 1e-4}
WINDOWS = {"window": {"window": 4, "sink_tokens": 2}, "pure": {"window": 0, "sink_tokens": 0}}
#: Entries of queries and keys.
SIZES = {"ordinary": 1.0, "large": 7.0}


def layer(name: str, near: str, *, size: float = 1.0, dtype: torch.dtype = torch.float32, grid=GRID) -> dict:
    """q, k, v of two query heads for each key head, the far kernel and the options of the operator."""
    heads = len(grid)
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    maps = tuple(itertools.islice(itertools.cycle(MAPS[name]), heads))
    rows = FEATURES * (2 if "clustered" in maps else 1)
    alpha, gamma, radius = (torch.tensor(column) for column in zip(*grid, strict=True))
    centers = [(0.3 * draw(heads, DIM)).to(dtype) for _ in range(2)]
    query, key = (size * draw(1, count * heads, N, DIM) for count in (2, 1))
    value = draw(1, heads, N, DIM)
    if "trigonometric" in maps:
        # Sines and cosines of long vectors cancel, and leave nothing but rounding to divide by: their features stay
        # short, and logits become large by what queries and keys have in common, which is exact.
        centers = [(center.float() * (22 if size > 1 else 1)).to(dtype) for center in centers]
        query = 0.4 * query / size + centers[0].float().repeat_interleave(2, 0)[:, None]
        key = 0.4 * key / size + centers[1].float()[:, None]
    query, key, value = (x.to(dtype) for x in (query, key, value))
    if "trigonometric" not in maps or size == 1:  # of large centres, zeros are far
        query[:, :, 3::5], key[:, :, 3::5] = 0.0, 0.0
    query[:, :, 1::5] = centers[0].repeat_interleave(2, 0)[:, None]
    key[:, :, 1::5] = centers[1][:, None]
    return {
        "query": query, "key": key, "value": value,
        "omega": draw_omega(heads, rows, DIM, kind="orthogonal", seed=0, layer=0, draw=0),
        "alpha": alpha, "gamma": gamma, "query_radius": radius, "key_radius": radius.clone(),
        "query_center": centers[0].float(), "key_center": centers[1].float(),
        "query_transform": torch.eye(DIM) + 0.1 * draw(heads, DIM, DIM),
        "key_transform": torch.eye(DIM) + 0.1 * draw(heads, DIM, DIM),
        "feature_map": maps, **WINDOWS[near],
    }  # fmt: skip


def step_by_step(**options) -> torch.Tensor:
    tokens = [options.pop(name) for name in ("query", "key", "value")]
    outputs, state = [], None
    for number in range(N):
        one = (t[:, :, number : number + 1] for t in tokens)
        output, state = hf_rfa.rfa_attention(*one, **options, initial_state=state, output_final_state=True)
        outputs.append(output)
    return torch.cat(outputs, dim=2)


def decoded(**options) -> torch.Tensor:
    tokens = [options.pop(name) for name in ("query", "key", "value")]
    steps = list(zip(*(t.split(1, dim=2) for t in tokens), strict=True))
    kernel, settings, _ = operator_arguments(*tokens, **options)
    decoder = Decoder(*steps[0], kernel, settings, None)
    return torch.cat([decoder.step(*step) for step in steps], dim=2)


def in_a_graph(**options) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "linear_heads", linear_heads_of_graph)
        return hf_rfa.rfa_attention(**options)


FORMS = {"chunked": hf_rfa.rfa_attention, "recurrent": step_by_step, "decoder": decoded, "graph": in_a_graph}


def as_the_definition(options: dict, **more) -> tuple[torch.Tensor, Tensors]:
    """Output and gradients of the definition in float64."""
    wide = {name: o.double() if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    return with_gradients(hf_rfa.rfa_attention_reference, wide | more)


def with_gradients(function, options: dict) -> tuple[torch.Tensor, Tensors]:
    """The output, and the gradients of a projection of it for all tensors but gamma, a switch at 0."""
    leaves = {
        name: o.clone().requires_grad_() for name, o in options.items()
        if isinstance(o, torch.Tensor) and name != "gamma"
    }  # fmt: skip
    output = function(**(options | leaves))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output.dtype)
    gradients = torch.autograd.grad((output * weights).sum(), list(leaves.values()), allow_unused=True)
    # Some maps do not read all of them.
    found = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return output.detach(), found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("near", WINDOWS)
@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_outputs_of_every_form(name, near, size, dtype):
    options = layer(name, near, size=SIZES[size], dtype=dtype)
    logits = options["query"].double().unflatten(1, (-1, 2)) @ options["key"].double().unsqueeze(2).mT / DIM**0.5
    if size == "large":
        assert logits.max() > 100
        assert logits.min() < -100
    tolerance = max(TOLERANCE[dtype], LARGE if size == "large" else 0.0)
    for causal in (True, False):
        want = hf_rfa.rfa_attention_reference(**options, causal=causal)
        assert bool(want.isfinite().all())
        forms = FORMS if causal else {"bidirectional": hf_rfa.rfa_attention}
        for form, function in forms.items():
            assert_near(function(**options, causal=causal), want, tolerance, form)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("near", WINDOWS)
@pytest.mark.parametrize("name", MAPS)
def test_gradients_of_every_form(name, near, size):
    options = layer(name, near, size=SIZES[size], grid=FEW)
    for causal in (True, False):
        want, wanted = as_the_definition(options, causal=causal)
        assert all(bool(gradient.isfinite().all()) for gradient in wanted.values())
        forms = {name: FORMS[name] for name in ("chunked", "recurrent", "graph")}
        for form, function in (forms if causal else {"bidirectional": hf_rfa.rfa_attention}).items():
            got, found = with_gradients(function, options | {"causal": causal})
            assert_near(got, want, LARGE, form)
            for tensor, gradient in wanted.items():
                assert_near(found[tensor], gradient, SLOPES[size], f"{form}: {tensor}")


#: For Triton's interpreter, which takes seconds a head: alpha = 0 within a bound, a tight bound, gamma = 0.
FEWEST = ((0.0, 0.5, 1.0), (1.0, 0.5, 1e-3), (0.3, 0.0, 0.0))
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("trigonometric", torch.float32, LARGE),
        ("hyperbolic", torch.float32, LARGE),
        ("optimal_positive", torch.float32, LARGE),
        ("clustered", torch.float32, LARGE),
        ("hyperbolic", torch.float16, 2e-3),  # the operands of the far exponents are rounded, too
    ],
)
@torch.no_grad()
def test_outputs_of_the_triton_kernels(name, dtype, tolerance):
    options = layer(name, "window", size=SIZES["large"], dtype=dtype, grid=FEWEST) | {"window": 8}
    want = hf_rfa.rfa_attention_reference(**options)
    assert_near(hf_rfa.rfa_attention(**options, backend="triton"), want, tolerance)


@NEEDS_TRITON
@pytest.mark.parametrize("name", ["trigonometric", "hyperbolic", "optimal_positive", "clustered"])
def test_gradients_of_the_triton_kernels(name):
    options = layer(name, "pure", grid=FEWEST)
    want, wanted = as_the_definition(options)
    got, found = with_gradients(hf_rfa.rfa_attention, options | {"backend": "triton"})
    assert_near(got, want, TOLERANCE[torch.float32])
    for tensor, gradient in wanted.items():
        assert_near(found[tensor], gradient, SLOPES["ordinary"], tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_heads_beside_linear_ones_with_large_logits(dtype):
    options = layer("hyperbolic", "window", size=SIZES["large"], dtype=dtype, grid=FEW)
    query, key, value = (options[name].double() for name in ("query", "key", "value"))
    scores = query[:, :2] @ key[:, :1].mT / DIM**0.5
    scores = scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf)
    for function in (hf_rfa.rfa_attention, step_by_step, decoded):
        got = function(**options, softmax_heads=(0,))[:, :2]
        assert_near(got, scores.softmax(-1) @ value[:, :1], TOLERANCE[dtype])
