"""Tensors that adapters have today and did not have in earlier versions of the saved format."""

from collections.abc import Mapping

import torch


def newer_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """What the adapter saved under `prefix` lacks among `tensors`, such that it attends as it did then."""
    limit, gamma = f"{prefix}far_limit", tensors.get(f"{prefix}gamma")
    return {} if gamma is None or limit in tensors else {limit: torch.zeros_like(gamma)}  # 0: no limit
