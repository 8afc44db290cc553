"""Differentiable functions with a hand-written backward pass that recomputes everything.

They work with autograd and with the transforms of `torch.func` (grad, vjp, functional_call, vmap and the like): both
passes are `autograd.Function`s with a `setup_context`, so that their code only sees plain tensors, which it may write
to, read values from, and pass to kernels. Second derivatives and forward mode are not supported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from hf_rfa.errors import ConfigError

Tensors = Sequence[torch.Tensor | None]
#: Per tensor, whether autograd tracks it, i.e. may ask for its gradient, at this level of transforms or further out.
Flags = tuple[bool, ...]


class Recipe(Protocol):
    """Both passes of a function of tensors; everything else it depends on is an attribute of the recipe."""

    @property
    def outputs(self) -> int:
        """The number of outputs."""

    @property
    def constant(self) -> tuple[int, ...]:
        """Indices of the outputs that have no gradient."""

    @property
    def forward_only(self) -> tuple[int, ...]:
        """Indices of the tensors that the backward pass does not need; it gets None for them."""

    def forward(self, tensors: Tensors, followed: Flags) -> tuple[torch.Tensor, ...]:
        """The outputs and, if any tensor is `followed`, new tensors with what else the backward pass needs."""

    def backward(
        self, tensors: Tensors, outputs: Tensors, kept: Tensors, above: Tensors, followed: Flags
    ) -> Sequence[torch.Tensor | None]:
        """Gradients of the followed tensors, given those of the outputs, `above` (None stands for zero)."""


def recomputing(recipe: Recipe, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Apply a recipe to these tensors and return its outputs."""
    followed = follows(tensors)
    if not any(followed) and not any(t is not None and transformed(t) for t in tensors):
        return recipe.forward(tensors, followed)[: recipe.outputs]  # what autograd does around it takes as long
    return _Forward.apply(recipe, followed, *tensors)[: recipe.outputs]


def follows(tensors: Tensors) -> Flags:
    """Which of the tensors autograd tracks."""
    enabled = torch.is_grad_enabled()
    return tuple(enabled and t is not None and t.requires_grad for t in tensors)


def transformed(tensor: torch.Tensor) -> bool:
    """Whether a transform of `torch.func` wraps the tensor; cannot be called while tracing."""
    return not torch.compiler.is_compiling() and torch.func.debug_unwrap(tensor, recurse=False) is not tensor


def made_again(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    """`function(*tensors)`, recomputed in the backward pass: a checkpoint that works under transforms."""
    device = tensors[0].device.type
    context = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return recomputing(_Again(function, device, *context), *tensors)[0]


@dataclass(frozen=True)
class _Again:
    function: Callable[..., torch.Tensor]
    device: str
    autocast: bool
    autocast_dtype: torch.dtype
    outputs: int = 1
    constant: tuple[int, ...] = ()
    forward_only: tuple[int, ...] = ()

    def forward(self, tensors: Tensors, followed: Flags) -> tuple[torch.Tensor, ...]:
        return (self.function(*tensors),)

    def backward(
        self, tensors: Tensors, outputs: Tensors, kept: Tensors, above: Tensors, followed: Flags
    ) -> Sequence[torch.Tensor | None]:
        with torch.autocast(self.device, self.autocast_dtype, self.autocast):
            pull_back = torch.func.vjp(self.function, *tensors)[1]
        return pull_back(above[0])


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor that describes a layout, also in a transform; `ConfigError` if vmap maps over it."""
    tensor = tensor.cpu()
    plain = torch.func.debug_unwrap(tensor)
    if plain is tensor:  # no transform is active
        return tensor.numpy()
    if plain.shape != tensor.shape:
        raise ConfigError(
            "Where padding and documents lie must be the same for everything that `torch.func.vmap` maps over. Got "
            f"a `token_mask` or `segment_ids` of shape {tuple(tensor.shape)} that is mapped over. Give it "
            "in_dims=None, or map over rows that are neither padded nor packed."
        )
    return np.array(tensor.tolist())  # `numpy()` does not work on the wrapper


_FIRST_ORDER = (
    "Random-feature attention has no derivative of the second order: its backward pass is written out. Got a "
    "derivative of its gradient (torch.func.grad of a torch.func.grad, hessian, create_graph=True). Use "
    "`hf_rfa.rfa_attention_reference`, which is plain operations."
)


class FirstOrder(torch.autograd.Function):
    """Passes gradients through, without second derivatives: `apply(count, *gradients, *sources)`."""

    @staticmethod
    def forward(count: int, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor | None) -> Any:
        raise NotImplementedError(_FIRST_ORDER)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(recipe: Recipe, followed: Flags, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        return recipe.forward(tensors, followed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        recipe, followed, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(output[i] for i in recipe.constant), *output[recipe.outputs :])
        if any(followed):
            ctx.recipe, ctx.followed = recipe, followed
            left_out = set(recipe.forward_only)
            tensors = [None if i in left_out else tensor for i, tensor in enumerate(tensors)]
            ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        recipe, followed = ctx.recipe, ctx.followed
        found = _Backward.apply(recipe, followed, *above[: recipe.outputs], *ctx.saved_tensors)
        return None, None, *(x if need else None for x, need in zip(found, ctx.needs_input_grad[2:], strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], recipe: Recipe, followed: Flags, *tensors: Any) -> Any:
        def one(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            # Inside vmap, a tensor hides whether an outer transform tracks it.
            both = tuple(here or out for here, out in zip(followed, follows(tensors), strict=True))
            whole = _Forward.apply(recipe, both, *tensors)
            return whole if any(followed) else whole[: recipe.outputs]

        return _each(one, info.batch_size, in_dims[2:], tensors)


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(recipe: Recipe, followed: Flags, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        count = len(followed)
        above, saved = tensors[: recipe.outputs], tensors[recipe.outputs :]
        inputs, outputs, kept = saved[:count], saved[count : count + recipe.outputs], saved[count + recipe.outputs :]
        found = recipe.backward(inputs, outputs, kept, above, followed)
        return tuple(x if follow else None for x, follow in zip(found, followed, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *above: torch.Tensor | None) -> Any:
        raise NotImplementedError(_FIRST_ORDER)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], recipe: Recipe, followed: Flags, *tensors: Any) -> Any:
        def one(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
            return _Backward.apply(recipe, followed, *tensors)

        return _each(one, info.batch_size, in_dims[2:], tensors)


def _each(
    function: Callable[..., tuple[torch.Tensor | None, ...]], count: int, dims: Sequence[int | None], tensors: Tensors
) -> tuple[tuple[torch.Tensor | None, ...], tuple[int | None, ...]]:
    """The vmap rule: apply to one element after the other and stack the results along a first dimension."""

    def chosen(index: int) -> list[torch.Tensor | None]:
        pairs = zip(tensors, dims, strict=True)
        return [t if t is None or dim is None else t.select(dim, index) for t, dim in pairs]

    results = zip(*(function(*chosen(index)) for index in range(count)), strict=True)
    stacked = tuple(None if same[0] is None else torch.stack(same) for same in results)
    return stacked, tuple(None if x is None else 0 for x in stacked)
