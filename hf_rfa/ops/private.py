"""Private calls of torch: each is tried once, and has a public substitute that gives the same numbers."""

import warnings
from collections.abc import Callable

import torch


def works(what: str, check: Callable[[], bool]) -> bool:
    """Whether this torch has a private call that passes `check`; warns if not. Callers should cache the answer."""
    try:
        if check():
            return True
        reason = "its numbers are others"
    except (AttributeError, RuntimeError, TypeError) as error:  # removed, or its signature changed
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"torch {torch.__version__} does not have {what} as hf_rfa knows it ({reason}). Public operations are used "
        "instead: the same numbers in more time. A later hf_rfa may know this torch.",
        stacklevel=2,
    )
    return False
