"""hf_rfa: convert a pretrained Transformers model from softmax to random-feature attention with one call."""

from hf_rfa.auto_classes import teach_transformers
from hf_rfa.calibration.calibrate import calibrate
from hf_rfa.calibration.head_costs import HeadOption, head_costs
from hf_rfa.checkpoint import from_pretrained, save_pretrained
from hf_rfa.config import RFAConfig
from hf_rfa.conversion.attach import revert
from hf_rfa.conversion.conversion import convert
from hf_rfa.distillation.config import DistillConfig
from hf_rfa.distillation.distill import distill
from hf_rfa.errors import CheckpointError, ConfigError, RFAError, StaleStateError, UnsupportedModelError
from hf_rfa.ops.attention import rfa_attention, rfa_attention_reference
from hf_rfa.report import CalibrationReport
from hf_rfa.runtime.attention import register
from hf_rfa.runtime.backends import backend, set_backend
from hf_rfa.runtime.cache import cache_bytes
from hf_rfa.runtime.far_statistics import far_statistics
from hf_rfa.runtime.kept_tokens import KeptTokens, kept_tokens
from hf_rfa.runtime.record import calibration_report
from hf_rfa.runtime.resampling import ResampleCallback, resample
from hf_rfa.runtime.set_kept_keys import set_kept_keys
from hf_rfa.runtime.softmax_heads import set_softmax_heads
from hf_rfa.saving.patterns import save_pattern

register()
teach_transformers()

__all__ = [
    "CalibrationReport",
    "CheckpointError",
    "ConfigError",
    "DistillConfig",
    "HeadOption",
    "KeptTokens",
    "RFAConfig",
    "RFAError",
    "ResampleCallback",
    "StaleStateError",
    "UnsupportedModelError",
    "backend",
    "cache_bytes",
    "calibrate",
    "calibration_report",
    "convert",
    "distill",
    "far_statistics",
    "from_pretrained",
    "head_costs",
    "kept_tokens",
    "resample",
    "revert",
    "rfa_attention",
    "rfa_attention_reference",
    "save_pattern",
    "save_pretrained",
    "set_backend",
    "set_kept_keys",
    "set_softmax_heads",
]
