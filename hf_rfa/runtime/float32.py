"""Modules that stay in float32 when the model around them is cast."""

from typing import Any

from torch import nn


class Float32Module(nn.Module):
    """`model.to(bfloat16)` moves its own tensors to the device, but does not round them."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        own = [*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)]
        kept = {name: tensor.detach() for name, tensor in own}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                if isinstance(moved, nn.Parameter):
                    moved.data = tensor.to(moved.device)
                else:
                    setattr(self, name, tensor.to(moved.device))
        return self
