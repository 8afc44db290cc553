"""Running a model to watch, calibrate or measure it: ambient settings do not matter, and nothing stays changed."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from hf_rfa.ops.first_use.decision import pytorch_unless_asked

#: Devices for which autocast may be on.
_AUTOCAST = ("cpu", "cuda", "mps", "xpu")


@contextmanager
def plain_torch() -> Iterator[None]:
    """Torch with its default settings, so that a conversion depends on its arguments alone.

    Gradients are recorded and tensors are ordinary ones (inside `torch.inference_mode` adapters would be tensors that
    can never be trained), autocast is off, and tensors without a dtype or device are float32 on the CPU.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # turns gradients on, too
        stack.enter_context(pytorch_unless_asked())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":  # of `torch.set_default_device` or `with torch.device(...)`
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def training_flags_kept(*models: nn.Module) -> Iterator[None]:
    """Restore the training flag of every module of the models after the block."""
    flags = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """No gradients, and all `models` in evaluation mode until the block ends."""
    with training_flags_kept(*models), torch.no_grad():
        for model in models:
            model.eval()
        yield


@contextmanager
def quiet_eval(model: nn.Module) -> Iterator[None]:
    """`evaluation_mode` under `plain_torch`, with compiled modules run eagerly and the CPU's random state kept.

    A compiled module would trace a dry run and the observers of calibration into its graph; it is compiled again
    afterwards.
    """
    with (
        plain_torch(), torch.compiler.set_stance("force_eager"), evaluation_mode(model),
        torch.random.fork_rng(devices=[]),
    ):  # fmt: skip
        yield
