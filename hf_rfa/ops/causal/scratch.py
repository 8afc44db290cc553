"""Memory that every block of a pass uses again: fresh pages for each temporary cost as much as the arithmetic."""

import torch


class Scratch:
    """Buffers by name and shape; what one holds is gone when the same buffer is asked for again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def __call__(self, name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
        """The buffer of that name and shape, with any content, in the dtype and on the device of `like`."""
        key = (name, shape)
        if key not in self._buffers:
            self._buffers[key] = like.new_empty(shape)
        return self._buffers[key]
