"""The text in which the tasks hide what they ask for: sentences of any language, as token ids."""

import bisect
import collections
import itertools
import random
import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hf_rfa.errors import ConfigError

# Sentences end before white space, or right behind the marks of scripts without it; paragraphs end anywhere.
_ENDS = re.compile(
    "(?<=[.!?\u2026][\"'\u201d\u2019)])(?=\\s)|(?<=[.!?\u2026])(?=\\s)"
    "|(?<=[\u3002\uff01\uff1f\u0964])(?=[^\u300d\u300f\u201d])|(?=\\n\\s*\\n)"
)
#: Where no sentence ends for this many characters (code, verse), lines are taken instead.
LONGEST_SENTENCE = 400


class Filler:
    """Sentences of a text, in order.

    Args:
        text: Of any language, long enough for the longest document.
        max_characters: The text is cut to this length, which saves the time to tokenize the rest.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, max_characters: int = 1_000_000) -> None:
        self.sentences = sentences(text[:max_characters])
        ids = tokenizer(self.sentences, add_special_tokens=False).input_ids if self.sentences else []
        self._ids: list[list[int]] = [list(each) for each in ids]
        self._ends = [0, *itertools.accumulate(map(len, self._ids))]

    def __len__(self) -> int:
        """Number of tokens."""
        return self._ends[-1]

    def take(self, tokens: int, generator: random.Random) -> list[list[int]]:
        """Consecutive sentences from a random place, together at most `tokens`, and no further sentence would fit.

        Raises:
            ConfigError: the text is shorter.
        """
        last = bisect.bisect_right(self._ends, self._ends[-1] - tokens) - 1
        if last < 0:
            raise ConfigError(
                f"A document needs {tokens} tokens of filler text. Got {len(self)}. Pass more text or shorter lengths."
            )
        first = generator.randint(0, last)
        end = bisect.bisect_right(self._ends, self._ends[first] + tokens) - 1
        return self._ids[first:end]

    def words(self, shortest: int = 5, longest: int = 10) -> list[str]:
        """The different words of the text in lower case, the most frequent first, without those of other lengths."""
        found = re.findall(r"[^\W\d_]+", " ".join(self.sentences))
        ordinary = (word for word in found if shortest <= len(word) <= longest and word[1:] == word[1:].lower())
        return [word for word, _ in collections.Counter(word.lower() for word in ordinary).most_common()]


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the white space before it; joined they are the text.

    Example:
        >>> sentences("One. Two!\\n\\nThree")
        ['One.', ' Two!', '\\n\\nThree']
    """
    found: list[str] = []
    for piece in _ENDS.split(text):
        found += re.split(r"(?=\n)", piece) if len(piece) > LONGEST_SENTENCE else [piece]
    return [piece for piece in found if piece]


def place_of(depth: float, pieces: Sequence[Sequence[int]]) -> int:
    """Number of the pieces that stand before a depth, 0 (the beginning) to 1 (the end) of all their tokens."""
    ends = [0, *itertools.accumulate(map(len, pieces))]
    target = depth * ends[-1]
    return min(range(len(ends)), key=lambda number: abs(ends[number] - target))
