"""Memory that all blocks of a pass reuse: fresh pages for each temporary would cost as much as the arithmetic."""

import torch


class Scratch:
    """Buffers by name and shape; asking for a buffer again invalidates its contents."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def __call__(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """The buffer of that name and shape, uninitialised, in the dtype and on the device of `like`."""
        key = (name, shape)
        if key not in self._buffers:
            self._buffers[key] = like.new_empty(shape)
        return self._buffers[key]
