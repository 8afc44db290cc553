"""The device on which a module computes, which is not always that of its weights."""

from typing import Any

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device:
    """The device on which `module` computes: where Accelerate brings its offloaded weights to, else its weights' own.

    A module without weights is taken to compute on the CPU.
    """
    for part in module.modules():
        hook: Any = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):  # one hook may hold several
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
