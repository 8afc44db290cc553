"""Choice of the form that computes the linear heads of a call: made here, and nowhere else.

| a call with            | runs                                                                             |
|------------------------|----------------------------------------------------------------------------------|
| one token, causal      | `recurrent`: one read of the state; in a `Decoder` `triton`, all heads at once   |
| both sides (encoders)  | `bidirectional`, always                                                          |
| more tokens, causal    | `triton` or `chunked`: the one requested, or the choice of `auto`                |

One token by itself is always `recurrent`; so is decoding without a window, whatever is requested.

`auto` is `triton` on GPUs where the kernels can run the call, agree with `chunked` and are faster, which is checked at
first use, see `ops.first_use`; else `chunked`. In every form, documents short enough to need no running sums are
computed separately, see `ops.linear`. If the requested backend cannot run, that is an error with the reason; no other
backend takes its place.
"""

import importlib.util
import os

import torch

from hf_rfa.errors import ConfigError
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.chunks import PURE_CHUNK
from hf_rfa.ops.first_use import decision
from hf_rfa.ops.triton.fold import FORMS

#: Largest head dim, chunk, and size of the far sums (features x value dim, both powers of two) per program.
LARGEST_DIM, LARGEST_CHUNK, LARGEST_SUMS = 256, 128, 128 * 128
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def form_of_call(call: OperatorCall) -> str:
    """'recurrent', 'bidirectional' or 'causal'; raises `ConfigError` if the requested backend cannot run the call."""
    if call.causal and call.query.shape[3] == 1 and call.layout.segment_ids is None:
        return "recurrent"
    if not call.causal:
        if call.backend == "triton":
            raise _cannot("the layer sees both sides, and the kernels are causal")
        return "bidirectional"
    if call.backend == "triton":
        require_triton(*_asked(call))
    return "causal"


def causal_form(call: OperatorCall) -> str:
    """'triton' or 'chunked' for a causal call of more than one token; the first one of its kind may be checked."""
    if call.backend != "auto":
        return call.backend
    can = why_not_triton(*_asked(call)) is None
    return "triton" if can and decision.KERNELS.serve(call) else "chunked"


def decoding_form(call: OperatorCall) -> str:
    """'triton' or 'recurrent' for a decoder of such calls; the first one of its kind may be checked."""
    can = call.causal and bool(call.window) and why_not_triton(*_asked(call)) is None
    if call.backend == "chunked" or not can:
        return "recurrent"
    return "triton" if call.backend == "triton" or decision.KERNELS.serve(call, "decode") else "recurrent"


def require_triton(far: FarKernel, device: torch.device, dtype: torch.dtype, value_dim: int, window: int) -> None:
    """Raise `ConfigError` with the reason if the kernels cannot compute such calls."""
    reason = why_not_triton(far, device, dtype, value_dim, window)
    if reason is not None:
        raise _cannot(reason)


def why_not_triton(
    far: FarKernel, device: torch.device, dtype: torch.dtype, value_dim: int, window: int
) -> str | None:
    """The reason why the kernels cannot compute such calls; None if they can."""
    rows, dim = far.omega.shape[1:]
    chunk = window or PURE_CHUNK
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (`pip install triton`)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on the device {device.type!r}, and the kernels run on GPUs"
    if dtype not in TRITON_DTYPES:
        return f"the tensors are {dtype}, and the kernels take float32, bfloat16 and float16"
    if far.gate_weight is not None:
        return "the layer has a forget gate"
    unknown = sorted(set(far.feature_maps) - set(FORMS))
    if unknown:
        return f"the kernels do not have the map {unknown[0]!r}"
    if len(set(far.feature_maps)) > 1 and "clustered" in far.feature_maps:
        return "the clustered map stands beside another one in a layer"
    if max(dim, value_dim) > LARGEST_DIM:
        return f"the head dims are {dim} and {value_dim}, and the kernels go up to {LARGEST_DIM}"
    if chunk > LARGEST_CHUNK:
        return f"the window is {chunk}, and the kernels go up to {LARGEST_CHUNK}"
    if _power(rows) * _power(value_dim) > LARGEST_SUMS:
        return f"{rows} rows of omega x value dim {value_dim} are more than a program of the kernels can hold"
    return None


def _asked(call: OperatorCall) -> tuple[FarKernel, torch.device, torch.dtype, int, int]:
    """The arguments of `why_not_triton`."""
    return call.far, call.query.device, call.query.dtype, call.value.shape[-1], call.window


def _power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _cannot(reason: str) -> ConfigError:
    return ConfigError(
        f"The Triton kernels cannot run this call: {reason}. Got backend='triton'. Use 'auto' or 'chunked'."
    )
