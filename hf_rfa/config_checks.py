"""Values of `RFAConfig`'s fields: checked, and brought into the one form that can be hashed and saved."""

import re
from collections.abc import Mapping
from typing import Any, Literal

from hf_rfa.errors import ConfigError

#: Rules that `layers` may be.
LAYER_RULE = re.compile(r"every (\d+)(?:st|nd|rd|th) stays softmax")

#: What `budget` may be as a string.
TOKENS = re.compile(r"[1-9]\d* tokens")


def is_int(value: Any) -> bool:
    """An integer and no bool, which Python takes for one."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of the choices."""
    if value not in choices:
        raise ConfigError(
            f"`{name}` must be one of {list(choices)}. Got {value!r}. Set RFAConfig({name}={choices[0]!r})."
        )


def check_int(name: str, value: Any, least: int, what: str, advice: str) -> None:
    """Raise `ConfigError` unless `value` is an integer of at least `least`."""
    if not is_int(value) or value < least:
        raise ConfigError(f"`{name}` must be {what}. Got {value!r}. {advice}")


def check_kept(kept_keys: Any, head_kept_keys: Any, window: int) -> None:
    """Raise `ConfigError` unless `kept_keys` is None, 'auto' or a number, with a window if keys are kept."""
    if kept_keys not in (None, "auto"):
        check_int("kept_keys", kept_keys, 0, "'auto' or a non-negative integer", "Set 128, or 0 for none.")
    if (kept_keys or head_kept_keys) and not window:
        raise ConfigError(
            "`kept_keys` needs a window: where nothing is exact no key has a score. Got "
            f"kept_keys={kept_keys}, window=0. Set a window, for example 64, or kept_keys=0."
        )
    if kept_keys == "auto" and head_kept_keys:
        raise ConfigError(
            f"With kept_keys='auto' calibration decides `head_kept_keys`. Got {head_kept_keys!r}. Leave one of them "
            "out."
        )


def check_budget(budget: Any, window: int) -> None:
    """Raise `ConfigError` unless `budget` is None, a share in (0, 1] or 'N tokens', with a window."""
    share = isinstance(budget, float) and 0 < budget <= 1
    tokens = isinstance(budget, str) and TOKENS.fullmatch(budget) is not None
    if budget is not None and not share and not tokens:
        raise ConfigError(
            "`budget` must be None, a share of the original's KV bytes (float in (0, 1]) or a number of tokens per "
            f"key head ('256 tokens'). Got {budget!r}. Set, for example, 0.25."
        )
    if budget is not None and not window:
        raise ConfigError("`budget` is spent on kept keys, which need a window. Got window=0. Set, for example, 64.")


def normalise_heads(heads: Any) -> Literal["auto"] | float | tuple[tuple[int, int], ...] | None:
    """`softmax_heads`, a list of pairs sorted and without repetitions."""
    if heads is None or heads == "auto":
        return heads
    if isinstance(heads, float):
        if not 0 <= heads <= 1:
            raise ConfigError(
                f"`softmax_heads` as a fraction must lie in [0, 1]. Got {heads}. Set, for example, 0.25."
            )
        return heads
    if isinstance(heads, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(is_int(n) and n >= 0 for n in pair)
        for pair in heads
    ):
        return tuple(sorted({(pair[0], pair[1]) for pair in heads}))
    raise ConfigError(
        f"`softmax_heads` must be None, 'auto', a fraction (float) or a list of (layer, key_head). Got {heads!r}. "
        "Set, for example, 0.25 or [(3, 1)]."
    )


def normalise_layers(layers: Any) -> str | tuple[int, ...]:
    """`layers`, a list sorted and without repetitions."""
    if isinstance(layers, str):
        match = LAYER_RULE.fullmatch(layers)
        if layers == "all" or (match and int(match.group(1)) >= 2):
            return layers
    elif isinstance(layers, (list, tuple)) and layers and all(is_int(n) and n >= 0 for n in layers):
        return tuple(sorted(set(layers)))
    raise ConfigError(
        "`layers` must be 'all', a non-empty list of layer indices or a rule such as 'every 4th stays softmax'. Got "
        f"{layers!r}. Set RFAConfig(layers='all')."
    )


def normalise_kept(kept: Any) -> tuple[tuple[tuple[int, int], int], ...] | None:
    """(((layer, key_head), number), ...) sorted; None if no head differs."""
    if not kept:
        return None
    pairs = list(kept.items()) if isinstance(kept, Mapping) else kept
    if isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], (list, tuple)) and len(pair[0]) == 2
        and all(is_int(n) and n >= 0 for n in (*pair[0], pair[1])) for pair in pairs
    ):  # fmt: skip
        return tuple(sorted(((pair[0][0], pair[0][1]), pair[1]) for pair in pairs))
    raise ConfigError(
        f"`head_kept_keys` must be None or {{(layer, key_head): number of keys}}. Got {kept!r}. Set, for example, "
        "{(3, 1): 512}."
    )


def normalise_features(features: Any) -> tuple[tuple[int, int], ...] | None:
    """((layer, number), ...) sorted, so that configs stay hashable; None if no layer differs."""
    if not features:
        return None
    pairs = list(features.items()) if isinstance(features, Mapping) else features
    if isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and is_int(pair[0]) and pair[0] >= 0
        and is_int(pair[1]) and pair[1] >= 1 for pair in pairs
    ):  # fmt: skip
        return tuple(sorted((pair[0], pair[1]) for pair in pairs))
    raise ConfigError(
        f"`layer_features` must be None or {{layer: number of random features}}. Got {features!r}. Set, for example, "
        "{3: 512}."
    )
