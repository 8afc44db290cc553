"""One request in the engine: its tokens, its cache, and what becomes of it."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Literal

from transformers.cache_utils import Cache

from hf_rfa.serving.sampling import Sampler, Sampling
from hf_rfa.serving.text import TextStream

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Text:
    """A piece of the answer, never empty."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of the answer."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """The request could not be answered to its end."""

    error: Exception


Event = Text | Finished | Failed


@dataclass(frozen=True)
class Order:
    """What a request asks of the engine.

    Attributes:
        prompt: Token ids.
        max_tokens: The most that are generated.
        stop: Strings that end the answer.
        ends: Tokens that end it.
    """

    prompt: Tokens[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Tokens[str] = ()
    ends: frozenset[int] = frozenset()


class Sequence:
    """A request, from its submission to its end. All but `cancelled` belongs to the engine's thread.

    Attributes:
        tokens: The prompt and all that followed.
        seen: How many of them are in the cache.
        cache: None before the first and in a batch, which has a cache of its own.
        retried: Whether it was in a batch whose step failed, and has not survived one since.
        cancelled: Set from any thread; the engine drops the sequence before its next step.
    """

    def __init__(self, order: Order, text: TextStream, emit: Callable[[Event], None]) -> None:
        """`emit` is called in the engine's thread, and must not wait."""
        self.order, self.sampler = order, Sampler(order.sampling)
        self.tokens, self.seen = list(order.prompt), 0
        self.cache: Cache | None = None
        self.retried = self.cancelled = False
        self.submitted = time.monotonic()
        self.last_token: float | None = None  # when it came
        self._text, self._emit = text, emit

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - len(self.order.prompt)

    def accept(self, token: int) -> FinishReason | None:
        """Take one more token; the reason if it is the last."""
        self.tokens.append(token)
        ends = token in self.order.ends
        text = "" if ends else self._text.push(token)
        last = ends or self._text.stopped or self.new_tokens >= self.order.max_tokens
        if last:
            text += self._text.finish()
        if text:
            self._emit(Text(text))
        if not last:
            return None
        return "stop" if ends or self._text.stopped else "length"

    def finish(self, reason: FinishReason) -> None:
        """Tell the request that its answer is complete, or that it was cancelled."""
        self._emit(Finished(reason, len(self.order.prompt), self.new_tokens))

    def fail(self, error: Exception) -> None:
        """Tell the request that it cannot be answered."""
        self._emit(Failed(error))
