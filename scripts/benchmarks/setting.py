"""The calls that are benchmarked: their shape, their tensors, and the options of RFA."""

from dataclasses import dataclass
from typing import Any

import torch

from hf_rfa.features.omega import draw_omega

PASSES = ("forward", "forward+backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """One attention call, but for its length. Plain values, so that it travels to other processes as JSON.

    Attributes:
        num_features: Rows of omega, m; the maps of two components make 2m numbers of each query and key.
        window, sinks: 0 = pure RFA, without an exact part.
        kept_keys: Far keys per key head that stay exact.
        alpha: Tempering of the far kernel; 1 is the unbiased estimate.
    """

    heads: int = 8
    key_heads: int = 8
    head_dim: int = 64
    num_features: int = 64
    window: int = 64
    sinks: int = 4
    kept_keys: int = 0
    alpha: float = 0.25
    feature_map: str = "hyperbolic"
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def components(self) -> int:
        """Numbers that a query or key becomes."""
        return 2 * self.num_features

    def tensors(
        self, length: int, *, batch: int = 1, backward: bool = False, logit_std: float = 1.0, query_length: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gaussian q (B, H, N or query_length, D), k, v (B, Hk, N, D); the logits q.k / sqrt D have that deviation."""
        generator = torch.Generator().manual_seed(0)
        shapes = [(self.heads, query_length or length), (self.key_heads, length), (self.key_heads, length)]
        scales = (logit_std**0.5, logit_std**0.5, 1.0)
        query, key, value = (
            (torch.randn(batch, *shape, self.head_dim, generator=generator) * scale)
            .to(self.device, DTYPES[self.dtype])
            .requires_grad_(backward)
            for shape, scale in zip(shapes, scales, strict=True)
        )
        return query, key, value

    def rfa_options(self) -> dict[str, Any]:
        """Arguments of `hf_rfa.rfa_attention` beside the tensors."""
        omega = draw_omega(self.key_heads, self.num_features, self.head_dim, kind="sphere", seed=0, layer=0, draw=0)
        return {
            "omega": omega.to(self.device),
            "feature_map": self.feature_map,
            "window": self.window,
            "sink_tokens": self.sinks if self.window else 0,
            "kept_keys": self.kept_keys if self.window else 0,
            "alpha": self.alpha,
        }
