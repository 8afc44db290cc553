"""The exceptions of hf_rfa. Each message says what was wrong, what was got and what to do."""


class RFAError(Exception):
    """Base class of hf_rfa's own errors. Each is a built-in kind too; missing files raise the built-in alone."""


class ConfigError(RFAError, ValueError):
    """A value of `RFAConfig`, or an argument of a public function, is out of its range."""


class UnsupportedModelError(RFAError, NotImplementedError):
    """The model (or the way it was called) cannot run random-feature attention correctly; nothing was changed."""


class CheckpointError(RFAError, OSError):
    """A saved conversion cannot be read: missing, truncated, not matching the model, or written by a newer version."""


class StaleStateError(RFAError, RuntimeError):
    """A cache or state was filled with one draw of omega and continued with another."""
