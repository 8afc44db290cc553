"""`hf-rfa doctor`: what this machine has, what computes layers on it, whether that is right, and how fast it is."""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_rfa.commands.settings import DoctorSettings
from hf_rfa.features.omega import draw_omega
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.dispatch import why_not_triton
from hf_rfa.ops.first_use.check import (
    LIMITS,
    check,
    chunked_form,
    compared,
    output_alone,
    output_and_gradients,
    seconds,
)
from hf_rfa.ops.first_use.kind import Kind, Task
from hf_rfa.ops.first_use.problems import small_problem, timed_problem
from hf_rfa.ops.first_use.verdicts import VerdictFolder
from hf_rfa.ops.reference import reference_attention
from hf_rfa.runtime.devices import chosen_device

PACKAGES = ("torch", "triton", "transformers", "accelerate")
#: Packages that may be missing: what needs them, and what brings them.
EXTRAS = {
    "triton": ("the Triton kernels (on Linux, with a GPU)", "hf_rfa[gpu]"),
    "peft": ("LoRA", "hf_rfa[train]"),
    "datasets": ("datasets of the hub and .parquet files", "hf_rfa[train]"),
    "evaluate": ("metrics of Hugging Face Evaluate", "hf_rfa[eval]"),
    "fastapi": ("hf-rfa serve", "hf_rfa[serve]"),
    "lm_eval": ("lm-evaluation-harness", "hf_rfa[lm-eval]"),
}
TASKS: tuple[Task, ...] = ("causal", "decode")


def examine(settings: DoctorSettings, say: Callable[[str], None]) -> bool:
    """Say what this machine has, and check and time what computes layers on it; returns whether every check passed.

    Args:
        say: Gets each line.
    """
    device = chosen_device(settings.device)
    say("Versions")
    say(f"  Python {platform.python_version()}, hf_rfa {_version('hf_rfa')}")
    say(f"  {', '.join(f'{name} {_version(name)}' for name in PACKAGES)}")
    say("Devices")
    for line in _devices():
        say(f"  {line}")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    calls = [_call(settings, kept, dtype, device) for kept in (0, settings.kept_keys)]
    say(f"Checks on {device}: the largest relative error of outputs and gradients")
    failures = [not _is_right(call, say) for call in calls]
    say(f"Times on {device}, {dtype}, {settings.heads} heads, {settings.length} tokens (forward; with backward)")
    for call in calls:
        say(f"  in chunks{_kept(call)}: {_times(call)}")
    say(f"  softmax (SDPA): {_softmax_times(calls[0])}")
    say("Triton kernels")
    for call in calls:
        failures.append(not _kernels_are_right(call, say))
    missing = [EXTRAS[name] for name in EXTRAS if importlib.util.find_spec(name) is None]
    say("To install" if missing else "Nothing is left to install")
    for what, extra in missing:
        say(f"  for {what}: pip install '{extra}'")
    say("A check has FAILED, see above" if any(failures) else "Every check has passed")
    return not any(failures)


def _is_right(call: OperatorCall, say: Callable[[str], None]) -> bool:
    """Compare the form in chunks with the definition, in float32."""
    kind = Kind.of(call.to(torch.float32), "causal")
    problem = small_problem(kind, call.query.device)
    want = output_and_gradients(lambda whole: reference_attention(whole.to(torch.float64))[0], problem)
    limit = LIMITS["float32"]
    error, failed = compared(output_and_gradients(chunked_form, problem), want, limit)
    outcome = f"FAILED, {failed}" if failed else f"{error:.0e}, at most {limit:.0e}"
    say(f"  in chunks{_kept(call)}, float32, beside the definition: {outcome}")
    return failed is None


def _kernels_are_right(call: OperatorCall, say: Callable[[str], None]) -> bool:
    """Check the kernels for calls of that kind, and remember the verdicts; True if they cannot run here."""
    why_not = why_not_triton(call.far, call.query.device, call.query.dtype, call.value.shape[-1], call.window)
    if why_not is not None:
        say(f"  not used{_kept(call)}: {why_not}")
        return True
    verdicts, folder = [], VerdictFolder()
    for task in TASKS:
        kind = Kind.of(call, task)
        verdict = check(kind, call)
        if verdict.lasting:
            folder.write(kind, verdict)
        verdicts.append(verdict)
        used = "FAILED, " if verdict.failed else "used: " if verdict.passed else "not used, being slower: "
        say(f"  {'decoding' if task == 'decode' else 'prefill and training'}{_kept(call)}: {used}{verdict}")
    return not any(verdict.failed for verdict in verdicts)


def _call(settings: DoctorSettings, kept_keys: int, dtype: torch.dtype, device: torch.device) -> OperatorCall:
    """A call of the layer's shape; nothing but shapes is in its tokens."""
    tokens = torch.zeros((), dtype=dtype, device=device)
    tokens = tokens.expand(1, settings.heads, settings.length, settings.head_dim)
    omega = draw_omega(
        settings.heads, settings.num_features, settings.head_dim, kind="orthogonal", seed=0, layer=0, draw=0
    )  # fmt: skip
    objects = operator_arguments(
        tokens, tokens, tokens, omega=omega.to(device), feature_map="hyperbolic", window=settings.window,
        sink_tokens=min(4, settings.window), kept_keys=kept_keys,
    )  # fmt: skip
    return OperatorCall.of(tokens, tokens, tokens, *objects)


def _times(call: OperatorCall) -> str:
    problem, device = timed_problem(Kind.of(call, "causal"), call), call.query.device
    forward = seconds(lambda: output_alone(chunked_form, problem), device)
    both = seconds(lambda: output_and_gradients(chunked_form, problem), device)
    return f"{forward * 1e3:.1f} ms; {both * 1e3:.1f} ms"


def _softmax_times(call: OperatorCall) -> str:
    query, key, value = tokens = [torch.randn_like(call.key.contiguous()).requires_grad_() for _ in range(3)]

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def alone() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        torch.autograd.grad(forward().sum(), tokens)

    device = call.query.device
    return f"{seconds(alone, device) * 1e3:.1f} ms; {seconds(both, device) * 1e3:.1f} ms"


def _devices() -> list[str]:
    found = [f"CPU: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = properties.total_memory / 2**30
        found.append(
            f"cuda:{number}: {properties.name}, capability {properties.major}.{properties.minor}, {memory:.0f} GiB"
        )
    return found if torch.cuda.is_available() else [*found, "no GPU that torch can use"]


def _kept(call: OperatorCall) -> str:
    return f", {call.kept_keys} kept keys" if call.kept_keys else ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
