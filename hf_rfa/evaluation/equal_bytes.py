"""What else the bytes of a converted model's cache could hold: columns of the same size to compare it with.

    window of the same bytes               no exact heads, no far part: a window and sinks
    exact heads, window of the same bytes  the same exact heads; the others see a window and sinks, as in DuoAttention
    kept keys, no features                 the same, but more kept keys in place of the features' sums

Source of the split: Xiao et al. 2024, DuoAttention. The windows are this package's: a state of 2C tokens, of which a
query sees C to 2C.
"""

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from hf_rfa.config import HeadIndex, RFAConfig
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.results import SAME_BYTES, SAME_KEPT, SAME_SPLIT
from hf_rfa.evaluation.speed import prefill
from hf_rfa.runtime.cache import cache_bytes
from hf_rfa.runtime.quiet import evaluation_mode
from hf_rfa.runtime.record import conversion_config

#: Makes a converted model, not calibrated, of a config; it may be called several times.
Convert = Callable[[RFAConfig], PreTrainedModel]


def bytes_after(model: PreTrainedModel, ids: Tensor) -> int:
    """Bytes of the model's cache after the tokens `ids` (n,), batch size 1."""
    with evaluation_mode(model):
        return cache_bytes(prefill(model, ids)[0])


def equal_bytes_columns(
    convert: Convert,
    converted: PreTrainedModel,
    ids: Tensor,
    names: Sequence[str] = SAME_BYTES,
) -> dict[str, PreTrainedModel]:
    """The named columns, whose caches after `ids` have the bytes of `converted`'s, to half a unit per linear head.

    A unit is two tokens for a window, whose state holds 2C, and one for kept keys.

    Args:
        convert: Converts a copy of the original, without calibration: none of the columns has a far part.
        converted: The model to compare with.
        ids: Token ids (n,), n the context at which the bytes are to be the same.

    Raises:
        ConfigError: the cache of `converted` is too small for the sinks and a window.
    """
    target = bytes_after(converted, ids)
    columns = {}
    for name in names:
        config = conversion_config(converted)
        # A window holds the sinks; the first kept key brings the masses of the window's keys with it.
        least = 1 if name == SAME_KEPT else max(1, config.sink_tokens)
        columns[name] = _of_bytes(convert, _family(name, config), least, target, ids, name)
    return columns


def _family(name: str, config: RFAConfig) -> Callable[[int], RFAConfig]:
    """Configs of one column by how much they hold: tokens of the window, or kept keys beyond those of `config`."""
    # One component that is never used; the state has no form without any.
    bare = dataclasses.replace(
        config, gamma=0.0, feature_map="positive", omega="sphere", num_features=1, layer_features=None
    )
    if name == SAME_KEPT:
        own: dict[HeadIndex, int] = dict(config.head_kept_keys or ())
        return lambda more: dataclasses.replace(
            bare,
            kept_keys=config.usual_kept_keys + more,
            head_kept_keys={head: number + more for head, number in own.items()} or None,
        )
    heads = config.softmax_heads if name == SAME_SPLIT else None
    bare = dataclasses.replace(bare, softmax_heads=heads, kept_keys=0, head_kept_keys=None)
    return lambda window: dataclasses.replace(bare, window=window)


def _of_bytes(
    convert: Convert, family: Callable[[int], RFAConfig], least: int, target: int, ids: Tensor, name: str
) -> PreTrainedModel:
    """The member of a family whose cache comes nearest to `target` bytes; their number is affine in what it holds."""
    model, next_model = convert(family(least)), convert(family(least + 1))
    # A state has its full size from the first token on.
    unit = bytes_after(next_model, ids[:1]) - bytes_after(model, ids[:1])
    more = round((target - bytes_after(model, ids)) / unit)
    if more < 0:
        raise ConfigError(
            f"The column {name!r} needs at least {bytes_after(model, ids):,} bytes of cache after {len(ids)} tokens. "
            f"Got a conversion of {target:,} bytes. Leave the column out, or lower `sink_tokens`."
        )
    return convert(family(least + more)) if more else model
