"""`KERNELS.serve(call)`: whether the Triton kernels may compute a call unasked.

The first call of a kind has them checked; its verdict is remembered in this process and on disk. So a verdict costs a
check once on a machine, and is the same for every later run there.

- While a CUDA graph is captured or a graph is traced nothing can be checked, nor compiled: what this process has
  already used is used, else PyTorch. A first call before the capture, which warming up is, settles it.
- With `torch.use_deterministic_algorithms(True)` kept keys are PyTorch's: the kernels add their gradients atomically.
- Each process of a distributed run decides for itself, without a word to the others, who may be at another layer or
  find a verdict on disk: a collective would hang there. The forms differ by rounding, the states that processes hand
  on have the same meaning in both, and gradients are summed over all of them, so that the weights stay equal.
"""

import contextlib
import contextvars
import logging
import threading
import warnings
from collections.abc import Iterator

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.first_use.check import DeviceLostError, check
from hf_rfa.ops.first_use.kind import Kind, Task
from hf_rfa.ops.first_use.verdicts import Verdict, VerdictFolder

logger = logging.getLogger(__name__)

#: Set in `pytorch_unless_asked`, for the thread (and task) that it is entered in.
_NOT_ASKED = contextvars.ContextVar("hf_rfa_kernels_not_asked", default=False)


@contextlib.contextmanager
def pytorch_unless_asked() -> Iterator[None]:
    """Within the block `auto` means PyTorch: for work that uses each of many shapes for a moment, as calibration does,
    which takes less time than to compile and check kernels for them."""
    before = _NOT_ASKED.set(True)
    try:
        yield
    finally:
        _NOT_ASKED.reset(before)


class FirstUse:
    """Verdicts of this process on the Triton kernels, by kind of calls."""

    def __init__(self, folder: VerdictFolder | None = None, devices: tuple[str, ...] = ("cuda",)) -> None:
        """`devices`: types of devices on which kernels may be used unasked; where Triton's interpreter stands in for a
        GPU, "cpu" is one, too."""
        self._folder, self._devices = folder or VerdictFolder(), devices
        self._known: dict[Kind, Verdict] = {}
        self._one_at_a_time = threading.RLock()

    def serve(self, call: OperatorCall, task: Task = "causal") -> bool:
        """Whether the kernels, which can run this call, are right and faster; checks them if that is not known."""
        if _NOT_ASKED.get() or not self._may_ask(call):
            return False
        kind = Kind.of(call, task)
        known = self._known.get(kind)
        if known is None and _is_recording(call.query.device):
            return False
        return (known or self.verdict(kind, call)).passed

    def verdict(self, kind: Kind, call: OperatorCall) -> Verdict:
        """The verdict on calls of that kind: of this process, else from disk, else of a check, which is then kept."""
        with self._one_at_a_time:
            if kind not in self._known:
                found = self._folder.read(kind)
                if found is None:
                    try:
                        found = check(kind, call)
                    except DeviceLostError as error:
                        self._folder.write(kind, Verdict("running", str(error)))
                        raise
                    if found.lasting:
                        self._folder.write(kind, found)
                self._known[kind] = found
                _tell(kind, found)
            return self._known[kind]

    def _may_ask(self, call: OperatorCall) -> bool:
        """Whether calls on this device, of these tensors, may be the kernels' unasked."""
        if call.query.device.type not in self._devices:
            return False
        if type(call.query) not in (torch.Tensor, torch.nn.Parameter):  # a tracer's, or another library's
            return False
        return not (any(call.kept_of_heads) and torch.are_deterministic_algorithms_enabled())


def _is_recording(device: torch.device) -> bool:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return capturing or torch.compiler.is_compiling()


def _tell(kind: Kind, verdict: Verdict) -> None:
    if verdict.failed:
        warnings.warn(
            f"The Triton kernels are not used, and PyTorch computes these calls ({kind}). Their check failed: "
            f"{verdict}. `hf-rfa doctor` repeats it; `hf_rfa.set_backend(model, 'chunked')` does without it.",
            stacklevel=3,
        )
    else:
        used = "" if verdict.passed else "; PyTorch is used"
        logger.info("triton: %s (%s)%s", verdict, kind, used)


#: The verdicts that `ops.dispatch` asks for.
KERNELS = FirstUse()
