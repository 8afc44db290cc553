"""From the keyword arguments of `rfa_attention` to the objects that `attend` takes: kernel, settings and layout."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_rfa.errors import ConfigError
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.features.maps import feature_map_of_heads, optimal_proposal
from hf_rfa.ops.call import check_tokens
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.state import accumulation_dtype

_SETTINGS = tuple(AttentionSettings.__dataclass_fields__)


def operator_arguments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, token_mask: torch.Tensor | None = None,
    segment_ids: torch.Tensor | None = None, layout: TokenLayout | None = None, **keywords: Any,
) -> tuple[FarKernel, AttentionSettings, TokenLayout]:  # fmt: skip
    """Kernel, settings and layout from `rfa_attention`'s keywords; what is neither layout nor setting is the kernel's.

    Raises:
        ConfigError: The tensors are not queries, keys and values, or the keywords contradict each other. Shapes and
            values are checked by `OperatorCall.of`.
    """
    check_tokens(query, key, value)
    settings = {name: keywords.pop(name) for name in _SETTINGS if name in keywords}
    settings["softmax_heads"] = tuple(settings.get("softmax_heads", ()))
    if not isinstance(settings.get("kept_keys", 0), int):
        settings["kept_keys"] = tuple(settings["kept_keys"])
    if settings.get("scaling") is None:
        settings["scaling"] = query.shape[-1] ** -0.5
    if layout is None:
        layout = TokenLayout(None if token_mask is None else token_mask.bool(), segment_ids)
    elif token_mask is not None or segment_ids is not None:
        raise ConfigError("`layout` already holds `token_mask` and `segment_ids`. Got both. Pass one or the other.")
    return far_kernel(query, key.shape[1], **keywords), AttentionSettings(**settings), layout


def far_kernel(
    like: torch.Tensor, key_heads: int, *, omega: torch.Tensor, feature_map: str | Sequence[str] = "positive",
    **numbers: Any,
) -> FarKernel:  # fmt: skip
    """The far kernel of `key_heads` heads for queries `like` (..., D); a single number applies to all heads.

    Fields of `FarKernel` that are not given have the defaults of `rfa_attention`.
    """
    dim, wide = like.shape[-1], accumulation_dtype(like.dtype)
    maps = feature_map_of_heads(feature_map, key_heads)
    given = {"alpha": 1.0, "gamma": 1.0} | {name: x for name, x in numbers.items() if x is not None}
    if "proposal" not in given:  # the other maps ignore it
        given["proposal"] = optimal_proposal(torch.tensor(dim / 2), dim) if "optimal_positive" in maps else 0.0
    tensors = {name: torch.as_tensor(x, dtype=wide, device=like.device) for name, x in given.items()}
    tensors = {name: x.expand(key_heads) if x.dim() == 0 else x for name, x in tensors.items()}
    for name in ("query_center", "key_center"):
        if name not in tensors:
            tensors[name] = torch.zeros(key_heads, dim, dtype=wide, device=like.device)
    return FarKernel(maps, omega, **tensors)
