"""The old place of `hf_rfa.runtime.adapter`, for scripts that were written before there were rooms."""

import warnings

from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import named_adapters

__all__ = ["RFAAdapter", "named_adapters"]

warnings.warn("`hf_rfa.adapter` is `hf_rfa.runtime.adapter` now.", FutureWarning, stacklevel=2)
