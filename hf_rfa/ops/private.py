"""Calls of torch beyond its public interface: each is tried once, and has a public way with the same numbers."""

import warnings
from collections.abc import Callable

import torch


def works(what: str, check: Callable[[], bool]) -> bool:
    """Whether this torch has a private call and it does what it is taken to do; warns if not. To be cached."""
    try:
        if check():
            return True
        reason = "its numbers are others"
    except (AttributeError, RuntimeError, TypeError) as error:  # gone, or called in another way
        reason = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"torch {torch.__version__} does not have {what} as hf_rfa knows it ({reason}). Public operations are used "
        "instead: the same numbers in more time. A later hf_rfa may know this torch.",
        stacklevel=2,
    )
    return False
