"""Sums, and the greatest, over the processes that calibrate one model, each on texts of its own."""

from collections.abc import Callable
from typing import Any

import torch

Reduce = Callable[[torch.Tensor], torch.Tensor]


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all processes; the tensor itself in a single one."""
    return _reduced(tensor, "SUM")


def greatest_over_processes(number: int) -> int:
    """The greatest of a number that each process has; the number itself in a single one."""
    return int(_reduced(torch.tensor(number), "MAX"))


def _reduced(tensor: torch.Tensor, operation: str) -> torch.Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    on_gpu = torch.distributed.get_backend() == "nccl"
    reduced = tensor.cuda() if on_gpu else tensor.clone()
    kinds: Any = torch.distributed.ReduceOp
    torch.distributed.all_reduce(reduced, getattr(kinds, operation))
    return reduced.to(tensor.device)
