"""The kernels that read each token once for its size and log-scale, against the same formula in plain torch."""

import pytest
import torch
from operator_inputs import assert_near

pytest.importorskip("triton")
from test_triton import DEVICE

from hf_rfa.ops.recomputing import recomputing
from hf_rfa.ops.triton import fold_tokens

NAMES = ("x", "center", "other", "transform", "radius", "size", "sign", "constant")
#: More than one tile of tokens, and one that is not full.
LENGTH, DIM, HEADS = fold_tokens.TOKEN_TILE + 9, 24, 3


def given(groups, transform, radius):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = (2, HEADS, groups, LENGTH, DIM) if groups else (2, HEADS, LENGTH, DIM)
    eye = torch.eye(DIM, dtype=torch.float64)
    return {
        "x": draw(*tokens), "center": draw(HEADS, DIM), "other": draw(HEADS, DIM),
        "transform": eye + 0.2 * draw(HEADS, DIM, DIM) if transform else None,
        # About half of the tokens are longer.
        "radius": DIM**0.5 * torch.tensor([1.0, 1.5, 0.0], dtype=torch.float64) if radius else None,
        "size": torch.tensor([0.2, 0.3, 0.1], dtype=torch.float64),
        "sign": torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64),
        "constant": draw(HEADS),
    }  # fmt: skip


@pytest.mark.parametrize("learned", ["x", "x center other size constant", "center", "x transform radius"])
@pytest.mark.parametrize(("groups", "transform", "radius"), [(2, False, False), (0, True, True), (2, True, True)])
def test_numbers_and_gradients_are_those_of_the_formula(groups, transform, radius, learned):
    keys = not groups
    exact = given(groups, transform, radius)
    wanted = [name for name in learned.split() if exact[name] is not None]
    values, gradients = [], []
    for kind, place in ((torch.float64, "cpu"), (torch.float32, DEVICE)):
        tensors = {name: None if x is None else x.to(place, kind, copy=True) for name, x in exact.items()}
        for name in wanted:
            tensors[name].requires_grad_()
        options = {"scaling": DIM**-0.5, "keys": keys}
        if kind == torch.float64:
            found = fold_tokens.token_numbers_in_torch(*(tensors[name] for name in NAMES), **options)
        else:
            found = recomputing(fold_tokens._Recipe(**options), *(tensors[name] for name in NAMES))
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in found]
        total = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
        values.append(found)
        gradients.append(torch.autograd.grad(total, [tensors[name] for name in wanted]))
    for name, got, want in zip(("r", "log_scale"), values[1], values[0], strict=True):
        assert_near(got.cpu(), want, 1e-5, name)
    for name, got, want in zip(wanted, gradients[1], gradients[0], strict=True):
        assert_near(got.cpu(), want, 1e-5, name)
