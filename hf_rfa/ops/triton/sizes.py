"""Tile sizes, precision and device of kernel launches."""

from typing import Any

import torch


def tile_size(size: int) -> int:
    """The tile size for `size`: tensor cores need powers of two, at least 16."""
    return max(16, 1 << max(0, size - 1).bit_length())


def precision(kind: torch.dtype) -> str:
    """How products of tensors of that dtype are computed."""
    return "ieee" if kind == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def token_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` with a contiguous last dimension, as the kernels need it."""
    return x if x.stride(-1) == 1 or (x.shape[-1] == 1 and x.is_contiguous()) else x.contiguous()


def on_device(x: torch.Tensor) -> Any:
    """Make the device of `x` current, since kernels run on the current device."""
    return torch.cuda.device_of(x)
