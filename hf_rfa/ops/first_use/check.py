"""The check of the Triton kernels on one kind of calls: do they compile, are their numbers right, are they faster?"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Mapping

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.chunked import chunked_causal
from hf_rfa.ops.first_use.decoding import DecodingProblem
from hf_rfa.ops.first_use.kind import Kind
from hf_rfa.ops.first_use.problems import Problem, small_problem, timed_problem
from hf_rfa.ops.first_use.verdicts import Verdict

#: By dtype, the largest relative error that rounding explains: several times what the kernels have in the interpreter.
LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
#: Of float32 tensors whose products are rounded to TF32.
TF32_LIMIT = 1e-2
#: Decoding steps that are timed at once.
TIMED_STEPS = 8
#: Runs of which the fastest counts, after one that does not.
REPEATS = 3

Form = Callable[[OperatorCall], torch.Tensor]


class DeviceLostError(RuntimeError):
    """A kernel has left the device in a state in which nothing can run any more in this process."""


def check(kind: Kind, call: OperatorCall) -> Verdict:
    """The verdict on the kernels for calls of that kind, with times at the size of `call`; its tensors are not read.

    Runs in a thread of its own, where autograd is on and autocast, inference mode and tracers of the caller are not.

    Raises:
        DeviceLostError: Nothing can run on the device any more.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as apart:
        return apart.submit(_check, kind, call).result()


def _check(kind: Kind, call: OperatorCall) -> Verdict:
    device = call.query.device
    try:
        with torch.cuda.device_of(call.query):
            return (_decoding_verdict if kind.task == "decode" else _causal_verdict)(kind, call, device)
    except torch.OutOfMemoryError as error:
        return Verdict("memory", f"{_cause(error)} A check needs about as much memory as the call itself.")


def _causal_verdict(kind: Kind, call: OperatorCall, device: torch.device) -> Verdict:
    small = small_problem(kind, device)
    want = output_and_gradients(chunked_form, small)
    got = _compiled(lambda: output_and_gradients(triton_form, small), device)
    if isinstance(got, Verdict):
        return got
    error, verdict = compared(got, want, limit_of(kind))
    if verdict is not None:
        return verdict
    timed = timed_problem(kind, call)
    speeds = []
    for passes in (output_alone, output_and_gradients):
        pytorch, kernels = (
            seconds(functools.partial(passes, form, timed), device) for form in (chunked_form, triton_form)
        )  # fmt: skip
        speeds.append(pytorch / kernels)
    return Verdict(error=error, speed=min(speeds))


def _decoding_verdict(kind: Kind, call: OperatorCall, device: torch.device) -> Verdict:
    chunk, (batch, heads) = kind.window, call.query.shape[:2]
    with torch.no_grad():
        small = DecodingProblem.of(kind, device, batch=2, heads=2, steps=chunk + 2)  # a chunk ends among them
        want = small.decoded("chunked")
        got = _compiled(lambda: small.decoded("triton"), device)
        if isinstance(got, Verdict):
            return got
        error, verdict = compared(got, want, limit_of(kind))
        if verdict is not None:
            return verdict
        timed = DecodingProblem.of(kind, device, batch=batch, heads=heads, steps=TIMED_STEPS)
        recurrent, fused = (seconds(timed.stepping(backend), device) for backend in ("chunked", "triton"))
    return Verdict(error=error, speed=recurrent / fused)


def limit_of(kind: Kind) -> float:
    """The largest relative error that is taken for rounding."""
    return TF32_LIMIT if kind.dtype == "float32" and kind.precision != "highest" else LIMITS[kind.dtype]


def compared(
    got: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor], limit: float
) -> tuple[float, Verdict | None]:
    """The largest relative error, and a verdict if one is above the limit, named after the first such tensor."""
    errors = {name: relative_error(got[name], want[name]) for name in want}
    wrong = next((name for name, error in errors.items() if error > limit), None)
    if wrong is None:
        return max(errors.values()), None
    detail = f"relative error {errors[wrong]:.1e}, and rounding explains {limit:.0e}"
    return errors[wrong], Verdict(wrong, detail, error=errors[wrong])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference divided by the largest magnitude of `want`; infinite if `got` has a NaN."""
    wide = want.double()
    error = float((got.double() - wide).abs().max() / wide.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of the fastest of some runs."""
    times = []
    for _ in range(REPEATS + 1):
        _wait(device)
        begun = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _compiled(run: Callable[[], dict[str, torch.Tensor]], device: torch.device) -> dict[str, torch.Tensor] | Verdict:
    """What the kernels return, or why they do not get there."""
    try:
        found = run()
        _wait(device)
        return found
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton, the C compiler that it calls, assemblers and drivers raise what they like
        try:
            torch.zeros(1, device=device).add_(1)
            _wait(device)
        except RuntimeError as dead:
            raise DeviceLostError(
                f"A Triton kernel failed on the device while it was checked ({_cause(error)}), and nothing can run on "
                "it in this process any more. This is remembered: start again, and PyTorch computes these calls."
            ) from dead
        return Verdict("compiling", f"{type(error).__name__}: {_cause(error)}")


def chunked_form(call: OperatorCall) -> torch.Tensor:
    """The output (B, Hk, G, N, M) by PyTorch."""
    return chunked_causal(call)[0]


def triton_form(call: OperatorCall) -> torch.Tensor:
    """The output (B, Hk, G, N, M) by the kernels."""
    from hf_rfa.ops.triton.causal import triton_causal  # not every machine has Triton

    return triton_causal(call)[0]


def output_alone(form: Form, problem: Problem) -> torch.Tensor:
    """The output of a form, without gradients."""
    with torch.no_grad():
        return form(problem.call)


def output_and_gradients(form: Form, problem: Problem) -> dict[str, torch.Tensor]:
    """The output of a form, and the gradients of all leaves for a fixed gradient of the output."""
    output = form(problem.call)
    generator = torch.Generator(output.device).manual_seed(1)
    above = torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.float32)
    found = torch.autograd.grad(
        output, list(problem.leaves.values()), above.to(output.dtype), allow_unused=True, materialize_grads=True
    )
    gradients = {f"gradient of {name}": g for name, g in zip(problem.leaves, found, strict=True)}
    return {"output": output.detach(), **gradients}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cause(error: BaseException) -> str:
    """The last line of a message: where compilers name the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
