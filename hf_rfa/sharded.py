"""FSDP2: the model inside, whose weights are spread over the processes, called by itself and gathered again.

FSDP2 gathers a layer's weights when the layer is called. What belongs to no layer (embeddings, the head) is gathered
when the outermost module is called, which in training is the loss. Both functions are for all processes at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are spread over the processes, so that `save_pretrained` would save a part of them."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def callable_inside(prepared: nn.Module) -> Iterator[None]:
    """Within the block a model inside `prepared` can be called without it, for evaluation; no gradients there."""
    if not isinstance(prepared, FSDPModule):
        yield
        return
    prepared.unshard()
    try:
        yield
    finally:
        prepared.reshard()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The whole `state_dict` on the CPU of the main process, {} in the others.

    `fresh.load_state_dict(full_state_dict(model))` makes an ordinary model of one that was trained under FSDP2.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2)
        >>> torch.equal(full_state_dict(layer)["weight"], layer.weight)
        True
    """
    return dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)))
