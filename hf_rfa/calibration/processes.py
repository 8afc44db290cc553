"""Sums over the processes that calibrate one model, each on texts of its own."""

from collections.abc import Callable

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes; the tensor itself in a single one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    on_gpu = torch.distributed.get_backend() == "nccl"
    summed = tensor.cuda() if on_gpu else tensor.clone()
    torch.distributed.all_reduce(summed)
    return summed.to(tensor.device)
