"""Tokens to text as they come, up to a stop string."""

from collections.abc import Sequence
from typing import Any

#: What a tokenizer writes for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"
#: Tokens of the prompt that the first new ones are decoded with: some tokenizers drop the space in front of a text.
_CONTEXT = 6


class TextStream:
    """The text of one answer, piece by piece.

    Held back is what may still change: bytes of an unfinished character, and an end that may become a stop string.

    Attributes:
        stopped: Whether a stop string was found; the text ends before it.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(prompt[-_CONTEXT:])
        self._context, self._read = 0, len(self._tokens)  # decoded text begins at the one, is new from the other on
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain with one more token."""
        self._tokens.append(token)
        before, text = (
            self._decode(self._tokens[self._context : self._read]),
            self._decode(self._tokens[self._context :]),
        )
        if len(text) <= len(before) or text.endswith(_INCOMPLETE):
            return ""
        self._context, self._read = self._read, len(self._tokens)
        return self._passed(text[len(before) :])

    def finish(self) -> str:
        """All that was held back; no token follows."""
        if self.stopped:
            return ""
        before, text = (
            self._decode(self._tokens[self._context : self._read]),
            self._decode(self._tokens[self._context :]),
        )
        self._context = self._read = len(self._tokens)
        text = self._passed(text[len(before) :])
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _passed(self, new: str) -> str:
        """The part of held and new text that no stop string can begin in."""
        text = self._held + new
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that the stop string begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
