"""Scores of answers, and intervals for their means."""

import math
import re
from collections.abc import Sequence

from hf_rfa.errors import ConfigError

#: Standard normal quantile of 0.975.
_Z = 1.959963984540054


def answer_score(text: str, answers: Sequence[str]) -> float:
    """Share of `answers` that stand in the text as whole words or numbers, whatever the case.

    Example:
        >>> answer_score("They are 12345 and 67890.", ["12345", "6789"])
        0.5
    """
    return sum(_holds(text, answer) for answer in answers) / len(answers)


def choice_score(text: str, letter: str) -> float:
    """1 if the first capital letter that stands by itself is the right one."""
    found = re.search(r"(?<!\w)[A-Z](?!\w)", text)
    return float(found is not None and found.group() == letter)


def _holds(text: str, answer: str) -> bool:
    # Scripts without spaces have no word boundaries: a letter or digit beside counts for numbers and Latin words only.
    beside = r"[0-9A-Za-z_]"
    pattern = rf"(?<!{beside}){re.escape(answer)}(?!{beside})"
    return re.search(pattern, text, re.IGNORECASE) is not None


def wilson_interval(mean: float, samples: int) -> tuple[float, float]:
    """95 % interval for a share, (low, high); Wilson 1927.

        (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),   z = 1.96

    For scores between 0 and 1 that are not only 0 or 1 it is too wide rather than too narrow: their variance is below
    p (1 - p).

    Raises:
        ConfigError: no samples, or a mean outside of [0, 1].

    Example:
        >>> [round(bound, 4) for bound in wilson_interval(0.5, 10)]
        [0.2366, 0.7634]
    """
    if samples < 1 or not 0 <= mean <= 1:
        raise ConfigError(f"Needs a mean in [0, 1] of at least 1 sample. Got {mean} of {samples}. Correct them.")
    square = _Z**2 / samples
    half = _Z * math.sqrt(mean * (1 - mean) / samples + square / (4 * samples))
    low, high = (mean + square / 2 - half) / (1 + square), (mean + square / 2 + half) / (1 + square)
    return max(0.0, low), min(1.0, high)
