"""`LinearPart`: linear key heads of a layer that have the same kind of state, and what decoding prepares once."""

from dataclasses import dataclass
from functools import cached_property

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.prepared import PreparedQueries
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.vllm.pages import PageLayout


@dataclass(frozen=True)
class LinearPart:
    """Linear key heads of a layer that keep the same number of keys.

    Attributes:
        heads: Their numbers among the layer's heads on this rank.
        kernel: The far kernel of these heads, float32.
        settings: How they attend.
        layout: Of their pages.
    """

    heads: list[int]
    kernel: FarKernel
    settings: AttentionSettings
    layout: PageLayout

    @cached_property
    def index(self) -> torch.Tensor:
        """The numbers of the heads, for selecting them."""
        return torch.tensor(self.heads, device=self.kernel.omega.device)

    @cached_property
    def features(self) -> PreparedQueries:
        """psi of queries."""
        return PreparedQueries(self.kernel, self.settings.scaling)

    @cached_property
    def log_gamma(self) -> torch.Tensor:
        """(Hk,) logarithm of the weight of the far part."""
        return self.kernel.log_gamma()

    @cached_property
    def log_limit(self) -> torch.Tensor | None:
        """(Hk, 1) logarithm of the kernel's `far_limit`, or None."""
        limit = self.kernel.log_limit()
        return None if limit is None else limit.unsqueeze(-1)

    def to(self, device: torch.device) -> "LinearPart":
        """The part with its kernel on `device`."""
        return LinearPart(self.heads, self.kernel.to(torch.float32, device), self.settings, self.layout)
