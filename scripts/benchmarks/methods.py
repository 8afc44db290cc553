"""The methods that are compared, each as a function of no arguments on tensors that are made before it is timed.

Each peer states what it needs; a method that cannot run here says why, in one sentence with what to do.
"""

import contextlib
import dataclasses
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hf_rfa
from benchmarks.setting import Setting

Call = Callable[[], Tensor]

#: Name in the tables -> how the setting differs, of RFA without training or calibration.
RFA_VARIANTS: dict[str, dict[str, Any]] = {
    "rfa": {},
    "rfa-pure": {"window": 0},
    "rfa-pure-unbiased": {"window": 0, "alpha": 1.0},
}
BACKENDS = ("chunked", "triton")
PEERS = ("eager", "performer", "fla-linear", "fla-gla")
METHODS = ("softmax", *RFA_VARIANTS, *(f"rfa-{name}" for name in BACKENDS), *PEERS)


def why_not(name: str, setting: Setting) -> str | None:
    """Why a method cannot run with this setting; None if it can."""
    if name == "performer":
        if importlib.util.find_spec("performer_pytorch") is None:
            return "performer-pytorch is not installed (`pip install performer-pytorch==1.1.4`)"
        if setting.key_heads != setting.heads:
            return "performer-pytorch has no grouped-query attention (use as many --key-heads as --heads)"
        if setting.dtype != "float32" and setting.device == "cpu":
            return "performer-pytorch computes in float32 on CPUs (use --dtype float32)"
    if name.startswith("fla-"):
        if setting.device != "cuda":
            return "fla's kernels run on GPUs alone (use --device cuda on a machine that has one)"
        if importlib.util.find_spec("fla") is None:
            return 'flash-linear-attention is not installed (`pip install "fla-core[cuda]"`)'
        if setting.key_heads != setting.heads:
            return "fla's kernels get one key head a query head here (use as many --key-heads as --heads)"
    return None


def method_call(name: str, setting: Setting, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Call, list[Tensor]]:
    """The forward of a method on q, k, v, and the tensors that its gradients are taken of."""
    query, key, value = tensors
    if name == "softmax":
        return _softmax(setting, *tensors), [*tensors]
    if name == "eager":
        return _eager(setting, *tensors), [*tensors]
    if name == "performer":
        return _performer(setting, *tensors), [*tensors]
    if name.startswith("fla-"):
        return _fla(name, setting, query, key, value)
    if name.removeprefix("rfa-") in BACKENDS:
        return _rfa(setting, tensors, name.removeprefix("rfa-")), [*tensors]
    return _rfa(dataclasses.replace(setting, **RFA_VARIANTS[name]), tensors, "auto"), [*tensors]


def pass_call(which: str, name: str, setting: Setting, tensors: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    """A whole pass of a method: 'forward', or 'forward+backward' with the gradients of all its inputs."""
    forward, inputs = method_call(name, setting, tensors)
    if which == "forward":
        return forward
    gradient = torch.ones_like(tensors[0])  # the value dim is the head dim here
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def _rfa(setting: Setting, tensors: tuple[Tensor, Tensor, Tensor], backend: str) -> Call:
    options = setting.rfa_options()
    return lambda: hf_rfa.rfa_attention(*tensors, backend=backend, **options)  # type: ignore[return-value]


def _softmax(setting: Setting, query: Tensor, key: Tensor, value: Tensor) -> Call:
    """torch's scaled_dot_product_attention; FlashAttention on a GPU, where the dtype allows it."""
    grouped = setting.key_heads != setting.heads

    def run() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    if setting.device != "cuda":
        return run
    kernel = SDPBackend.EFFICIENT_ATTENTION if setting.dtype == "float32" else SDPBackend.FLASH_ATTENTION

    def run_kernel() -> Tensor:
        with sdpa_kernel(kernel):
            return run()

    return run_kernel


def _eager(setting: Setting, query: Tensor, key: Tensor, value: Tensor) -> Call:
    """Scores as an N x N matrix, as Transformers' `eager_attention_forward` computes them."""
    groups, scaling = setting.heads // setting.key_heads, setting.head_dim**-0.5
    length = query.shape[2]
    hidden = torch.full((length, length), -torch.inf, dtype=query.dtype, device=query.device).triu(1)

    def run() -> Tensor:
        keys, values = (t.repeat_interleave(groups, dim=1) if groups > 1 else t for t in (key, value))
        scores = query @ keys.mT * scaling + hidden
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ values

    return run


def _performer(setting: Setting, query: Tensor, key: Tensor, value: Tensor) -> Call:
    """performer-pytorch's causal FastAttention with as many features; on a CPU its form without a CUDA extension."""
    from performer_pytorch import FastAttention

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints that there is no CUDA extension
            attention = FastAttention(setting.head_dim, nb_features=setting.components, causal=True)
    attention = attention.to(query.device)
    return lambda: attention(query, key, value)


def _fla(name: str, setting: Setting, query: Tensor, key: Tensor, value: Tensor) -> tuple[Call, list[Tensor]]:
    """fla's chunk kernels on features that are computed before; (B, N, H, F), as they take them."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        omega = torch.randn(setting.components, setting.head_dim, generator=generator).to(setting.device)
        features = [positive_features(t, omega).to(value.dtype) for t in (query, key)]
    backward = query.requires_grad
    inputs = [t.detach().transpose(1, 2).contiguous().requires_grad_(backward) for t in (*features, value)]

    if name == "fla-linear":
        from fla.ops.linear_attn import chunk_linear_attn

        return lambda: chunk_linear_attn(*inputs, scale=1.0, normalize=True)[0].transpose(1, 2), inputs
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda: chunk_simple_gla(*inputs, scale=1.0)[0].transpose(1, 2), inputs  # sums without a denominator


def positive_features(tensor: Tensor, omega: Tensor) -> Tensor:
    """exp(omega.x' - |x'|^2 / 2) up to one factor of all, x' = x D^-1/4 (Choromanski et al. 2021); float32."""
    scaled = tensor.float() * tensor.shape[-1] ** -0.25
    logs = scaled @ omega.mT - scaled.square().sum(-1, keepdim=True) / 2
    return (logs - logs.max()).exp()


def relative_error(name: str, setting: Setting, length: int, logit_std: float) -> float | None:
    """|output - softmax| / |softmax| over all tokens of Gaussian inputs; None for what has no normaliser."""
    if name == "fla-gla":
        return None
    exact_setting = dataclasses.replace(setting, dtype="float32")
    with torch.no_grad():
        tensors = setting.tensors(length, logit_std=logit_std)
        wide = tuple(t.float() for t in tensors)
        exact = _softmax(exact_setting, *wide)()
        output = method_call(name, setting, tensors)[0]().float()
    return ((output - exact).norm() / exact.norm()).item()
