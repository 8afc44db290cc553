"""hf_rfa: convert a pretrained Transformers model from softmax to random-feature attention with one call."""

from hf_rfa.config import RFAConfig
from hf_rfa.errors import CheckpointError, ConfigError, RFAError, StaleStateError, UnsupportedModelError
from hf_rfa.ops.operator import rfa_attention, rfa_attention_reference

__all__ = [
    "CheckpointError",
    "ConfigError",
    "RFAConfig",
    "RFAError",
    "StaleStateError",
    "UnsupportedModelError",
    "rfa_attention",
    "rfa_attention_reference",
]
