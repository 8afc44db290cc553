"""Head patterns: which heads of a model are exact and how many far keys the others keep, as a small file to share.

A pattern is found by calibration on one machine and applied on another, where no head has to be ranked:
`hf_rfa.convert(model, pattern="pattern.json")` fits the far kernels alone.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from hf_rfa.config import RFAConfig
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.record import base_model, conversion_config, original_class

#: Version of the file.
PATTERN_VERSION = 1


def save_pattern(model: nn.Module, path: str | Path) -> None:
    """Write which key heads of a converted model are exact and how many far keys each of the others keeps.

    The file also says of which model it is: its class, and the number of key heads of each converted layer.

    Raises:
        UnsupportedModelError: The model is not converted.
        ConfigError: Its heads are not decided yet ('auto', a fraction or a budget, without calibration).

    Example:
        >>> import tempfile, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), calibrate=False)
        >>> hf_rfa.set_softmax_heads(model, [(1, 0)])
        >>> path = tempfile.mkdtemp() + "/pattern.json"
        >>> hf_rfa.save_pattern(model, path)
        >>> other = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), pattern=path, calibrate=False)
        >>> other.model.layers[1].self_attn.rfa.softmax_heads
        (0,)
    """
    config, base = conversion_config(model), base_model(model)
    heads: Any = config.softmax_heads or ()
    numbers: Any = config.head_kept_keys or ()
    if not isinstance(heads, tuple) or config.kept_keys == "auto":
        raise ConfigError(
            f"The heads of this model are not decided yet. Got softmax_heads={heads!r}, kept_keys="
            f"{config.kept_keys!r}. Calibrate it first: `hf_rfa.calibrate(model, batches)`."
        )
    values = {
        "pattern_version": PATTERN_VERSION,
        "model": original_class(base).__name__,
        "key_heads": _key_heads(base),
        "softmax_heads": [list(head) for head in heads],
        "kept_keys": config.usual_kept_keys,
        "head_kept_keys": [[list(head), number] for head, number in numbers],
    }
    Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def with_pattern(config: RFAConfig, path: str | Path) -> RFAConfig:
    """The config with the heads of a pattern, which takes the place of any choice of heads and of a budget.

    Raises:
        CheckpointError: The file cannot be read, or is no pattern that this version reads.
    """
    values = _read(path)
    return dataclasses.replace(
        config, softmax_heads=values["softmax_heads"], kept_keys=values["kept_keys"],
        head_kept_keys=values["head_kept_keys"], budget=None,
    )  # fmt: skip


def check_pattern(model: nn.Module, path: str | Path) -> None:
    """Raise `ConfigError` unless the pattern is of a model with the converted model's class and heads."""
    values, base = _read(path), base_model(model)
    here = original_class(base).__name__, _key_heads(base)
    of = values["model"], values["key_heads"]
    if here != of:
        raise ConfigError(
            f"The pattern {str(path)!r} is of another model: {of[0]} with key heads {of[1]}. Got {here[0]} with "
            f"{here[1]}. Calibrate this model, or pass its own pattern."
        )


def _key_heads(base: nn.Module) -> dict[str, int]:
    """The number of key heads of each converted layer."""
    return {str(adapter.layer): adapter.key_heads for adapter in require_adapters(base) if adapter.converted}


def _read(path: str | Path) -> dict[str, Any]:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot read the pattern {str(path)!r}: {error}. Save it with `save_pattern`."
        ) from error
    wanted = {"pattern_version", "model", "key_heads", "softmax_heads", "kept_keys", "head_kept_keys"}
    if not isinstance(values, dict) or set(values) != wanted or values["pattern_version"] != PATTERN_VERSION:
        raise CheckpointError(
            f"{str(path)!r} is no pattern of version {PATTERN_VERSION}, with the fields {sorted(wanted)}. Save it "
            "with `save_pattern`, or upgrade hf_rfa."
        )
    return values
