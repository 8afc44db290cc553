"""The feature maps by name.

The table is empty here and needs no torch, so that `RFAConfig` can check a name and the options can describe the maps
without importing them; `features/maps.py` fills it in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: (|x'|^2, w.x', omega, proposal) -> (features, log_scale); shapes are in `features/maps.py`.
MapFunction = Callable[
    ["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]
]


@dataclass(frozen=True)
class FeatureMap:
    """One feature map.

    Attributes:
        function: Makes the features of queries, and of keys unless `key_function` does.
        components: Components of psi per random feature.
        summary: A few words about it, for help texts.
        signed: Whether its estimates can be negative.
        rows: Rows of omega per random feature.
        key_function: The function of keys, where it differs from that of queries.
    """

    function: MapFunction
    components: int
    summary: str
    signed: bool = False
    rows: int = 1
    key_function: MapFunction | None = None


#: The names are listed in `features/maps.py` and nowhere else.
FEATURE_MAPS: dict[str, FeatureMap] = {}
