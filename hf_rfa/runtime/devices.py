"""The device that an option names, and the one on which a module computes: not always that of its weights."""

from typing import Any

import torch
from torch import nn

from hf_rfa.errors import ConfigError

#: The help text of every option that names a device.
DEVICE_HELP = "'auto' (CUDA if there is one), 'cpu', 'cuda' or 'cuda:1'."


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


def chosen_device(name: str) -> torch.device:
    """The device that an option names; 'auto' is CUDA if there is one, else the CPU.

    Raises:
        ConfigError: It is none, or this machine does not have it.

    Example:
        >>> chosen_device("cpu")
        device(type='cpu')
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"`--device` must be 'auto' or a device of PyTorch such as 'cpu', 'cuda' or 'cuda:1'. Got {name!r}. "
            "Correct it."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(
            f"PyTorch {torch.__version__} sees {gpus} CUDA devices here. Got `--device {name}`. Leave it out, or "
            "install PyTorch for CUDA."
        )
    return device
