"""Weights or optimiser state sharded over processes: FSDP2 and DeepSpeed.

FSDP2 gathers a layer's weights when the layer is called. Weights outside the layers (embeddings, head) are gathered
when the outermost module is called, which in training is the loss. Every process has to call these functions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_rfa.errors import ConfigError


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights are sharded over the processes, so that `save_pretrained` would save a part of them."""
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


def tell_deepspeed(accelerator: Accelerator, max_grad_norm: float) -> None:
    """Set DeepSpeed's gradient clipping and batch sizes, before `accelerator.prepare`; there is no DataLoader to ask.

    Raises:
        ConfigError: ZeRO-3, under which no process has a whole model to evaluate or to save.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    if plugin.zero_stage > 2:
        raise ConfigError(
            f"DeepSpeed must keep the weights whole. Got ZeRO stage {plugin.zero_stage}. Set zero_stage: 2, or use "
            "FSDP2 (scripts/accelerate/fsdp2.yaml)."
        )
    own = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": max_grad_norm}
    plugin.deepspeed_config.update(own)
