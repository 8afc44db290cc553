"""Measures of quality, cost and retrieval, and the comparison of a model with its conversions."""

from hf_rfa.evaluation.measures import (
    PositionBin,
    bits_per_byte,
    copy_perplexity,
    far_recovery,
    greedy_agreement,
    greedy_continuations,
    kl_divergence,
    perplexity,
    perplexity_by_position,
    token_nll,
)

__all__ = [
    "PositionBin",
    "bits_per_byte",
    "copy_perplexity",
    "far_recovery",
    "greedy_agreement",
    "greedy_continuations",
    "kl_divergence",
    "perplexity",
    "perplexity_by_position",
    "token_nll",
]
