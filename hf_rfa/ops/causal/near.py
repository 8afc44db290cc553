"""Exact attention of chunks over their near keys, and its gradient, without keeping the weights.

The near keys of chunk i are one row of tokens, `[sinks, chunk i - 1, (sinks,) chunk i]`: overlapping views of a buffer
with the sinks before every chunk, so that no key is copied twice. The second group of sinks is masked.
"""

import functools
import math

import torch

from hf_rfa.ops.causal.scratch import Scratch
from hf_rfa.ops.private import works


def windows(chunks: torch.Tensor, sinks: torch.Tensor, scratch: Scratch, name: str) -> torch.Tensor:
    """A view (A, n, 2 (s + C), D) of chunks (A, n + 1, C, D) with the sinks (A, n, s, D) that chunks 1.. see."""
    size = sinks.shape[2]
    rows = scratch(name, chunks, *chunks.shape[:2], size + chunks.shape[2], chunks.shape[3])
    rows[:, :, size:] = chunks
    rows[:, :-1, :size], rows[:, -1, :size] = sinks, sinks[:, -1]
    count, width, dim = rows.shape[1:]
    strides = (count * width * dim, width * dim, dim, 1)
    return rows.as_strided((len(rows), count - 1, 2 * width, dim), strides)


def split_windows(
    gradient: torch.Tensor, sinks: int, scratch: Scratch, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the `chunks` and `sinks` of `windows`."""
    width = gradient.shape[2] // 2
    shape = (len(gradient), gradient.shape[1] + 1, width - sinks, gradient.shape[3])
    chunks = scratch(f"gradient of {name}", gradient, *shape)
    chunks[:, :-1] = gradient[:, :, sinks:width]
    chunks[:, -1] = 0.0
    chunks[:, 1:] += gradient[:, :, width + sinks :]
    return chunks, gradient[:, :, :sinks]


def near_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention (A, n, R, M) of q (A, n, R, D) over k (A, n, W, D), and its log-normaliser (A, n, R).

    mask: 0 or -inf, added to the scores and broadcast to their shape; every row must see a key.
    """
    mask = mask.expand(*query.shape[:3], key.shape[2])
    attend = _kernel_attention if _fused(query, value) else _plain_attention
    return attend(query, key, value, mask, scaling)


def _kernel_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=mask, scale=scaling
    )


def _plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (query @ key.mT) * scaling + mask
    normaliser = scores.logsumexp(-1)
    return (scores - normaliser.unsqueeze(-1)).exp() @ value, normaliser


def near_gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    normaliser: torch.Tensor, mask: torch.Tensor, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v if the near keys share their normaliser with others.

    With p_ij = exp(s_ij - L_i), L the log of the *whole* denominator and o the *whole* output:
    dv_j = sum_i p_ij do_i,     ds_ij = p_ij (do_i.v_j - do_i.o_i)

    output (A, n, R, M) is o, normaliser (A, n, R) is L.
    """
    mask = mask.expand(*query.shape[:3], key.shape[2])
    find = _kernel_gradients if _fused(query, value) else _plain_gradients
    return find(gradient, query, key, value, output, normaliser, mask, scaling)


def _kernel_gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    normaliser: torch.Tensor, mask: torch.Tensor, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, output, normaliser, 0.0, False, attn_mask=mask, scale=scaling
    )


def _plain_gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor,
    normaliser: torch.Tensor, mask: torch.Tensor, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    weights = ((query @ key.mT) * scaling + mask - normaliser.unsqueeze(-1)).exp()
    inner = (gradient * output).sum(-1, keepdim=True)
    scores = weights * (gradient @ value.mT - inner) * scaling
    return scores @ key, scores.mT @ query, weights.mT @ gradient


def _fused(query: torch.Tensor, value: torch.Tensor) -> bool:
    # torch's CPU kernel returns the normaliser, which the public function hides; it needs equal head dims.
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1] and kernel_works()


@functools.cache
def kernel_works() -> bool:
    """Whether torch has this private kernel and it computes what this module expects."""
    return works("the CPU kernel of attention that hands out its normaliser", _kernel_is_right)


def _kernel_is_right() -> bool:
    numbers = torch.arange(64, dtype=torch.float32, device="cpu")
    query, key, value = ((numbers * step).sin().view(1, 2, 4, 8) for step in (1, 2, 3))
    mask = torch.full((4, 4), -torch.inf, dtype=torch.float32, device="cpu").triu(1).expand(1, 2, 4, 4)
    plain = _plain_attention(query, key, value, mask, 0.3)
    # As if other keys, with value 0, had two thirds of the weight.
    whole = value, query, key, value, plain[0] / 3, plain[1] + math.log(3), mask, 0.3
    found = *_kernel_attention(query, key, value, mask, 0.3), *_kernel_gradients(*whole)
    wanted = *plain, *_plain_gradients(*whole)
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(found, wanted, strict=True))
