"""Inputs and comparisons that the tests of the operator share; everything is drawn from generators of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch.testing import assert_close

from hf_rfa import rfa_attention, rfa_attention_reference
from hf_rfa.features import maps
from hf_rfa.features.omega import draw_omega
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.call import OperatorCall

FEATURE_MAPS = tuple(maps.FEATURE_MAPS)
Tensors = dict[str, torch.Tensor]


def random_inputs(
    length: int,
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    dim: int = 8,
    value_dim: int = 6,
    num_features: int = 16,
    dtype: torch.dtype = torch.float64,
    size: float = 1.0,
    seed: int = 0,
) -> Tensors:
    """query (B, H, N, D), key (B, Hk, N, D), value (B, Hk, N, M), omega (Hk, m, D); q and k have entries of `size`.

    `omega` is the same for every `seed` and length, so that other tokens can continue a sequence.
    """
    generator = torch.Generator().manual_seed(1000 * seed + length)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    omega = draw_omega(key_heads, num_features, dim, kind="orthogonal", seed=0, layer=0, draw=0)
    return {
        "query": (size * draw(batch, heads, length, dim)).to(dtype),
        "key": (size * draw(batch, key_heads, length, dim)).to(dtype),
        "value": draw(batch, key_heads, length, value_dim).to(dtype),
        "omega": omega.to(torch.float64 if dtype == torch.float64 else torch.float32),
    }


def operator_call(inputs: Tensors, **options: Any) -> OperatorCall:
    """The operator's call for the arguments of `rfa_attention`."""
    kernel, settings, layout = operator_arguments(**inputs, **options)
    return OperatorCall.of(inputs["query"], inputs["key"], inputs["value"], kernel, settings, layout)


def tokens(inputs: Tensors, part: slice | torch.Tensor, rows: slice = slice(None)) -> Tensors:
    """The same inputs with some of the tokens (and rows) only; what belongs to heads stays whole."""
    of_tokens = ("query", "key", "value")
    return {name: x[rows][:, :, part] if name in of_tokens else x for name, x in inputs.items()}


def with_gradients(function: Callable[..., Any], inputs: Tensors, **options: Any) -> tuple[torch.Tensor, Tensors]:
    """The output, and the gradient of a fixed random projection of it with respect to each of the inputs."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    output = function(**leaves, **options)
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    gradients = torch.autograd.grad((output * weights).sum(), list(leaves.values()))
    return output.detach(), dict(zip(leaves, gradients, strict=True))


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float, name: str = "output") -> None:
    """Largest difference at most `tolerance` times the largest magnitude of `want` (or 1, if that is larger)."""
    # Relative to the whole tensor: a sum of terms of size 1 that cancel to 1e-6 keeps the rounding of size 1.
    scale = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
    assert_close(
        got.detach().to(want.dtype),
        want.detach(),
        rtol=0,
        atol=tolerance * scale,
        msg=lambda message: f"{name}: {message}",
    )


def assert_equals_the_definition(
    inputs: Tensors,
    tolerance: float = 1e-10,
    gradient_tolerance: float | None = None,
    *,
    function: Callable[..., Any] = rfa_attention,
    **options: Any,
) -> Tensors:
    """Outputs and the gradients of all inputs, which are returned; both tolerances are the same unless told."""
    got, got_gradients = with_gradients(function, inputs, **options)
    want, want_gradients = with_gradients(rfa_attention_reference, inputs, **options)
    assert_near(got, want, tolerance)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name], gradient, gradient_tolerance or tolerance, f"gradient of {name}")
    return got_gradients
