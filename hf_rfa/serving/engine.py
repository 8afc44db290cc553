"""The engine: one thread that runs the model, for all requests that are there.

A step reads up to `prefill_tokens` tokens of new prompts, lets those whose prompt is complete join the batch, and
computes one token for each sequence in the batch; then those leave that have ended. A long prompt is read in pieces,
so that it holds nobody up for longer than one of them.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Several
from typing import Protocol

import torch

from hf_rfa.serving.batch import Batch
from hf_rfa.serving.errors import RequestError, busy, closing
from hf_rfa.serving.model import ServedModel
from hf_rfa.serving.sampling import choose
from hf_rfa.serving.sequence import FinishReason, Sequence

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Is told what the engine does, in its thread."""

    def token(self, sequence: Sequence, seconds: float) -> None:
        """A token came so long after the one before it, or, the first, after the request."""

    def left(self, sequence: Sequence, reason: str, seconds: float) -> None:
        """A request ended so long after it came: "stop", "length", "cancelled" or "failed"."""

    def stepped(self, running: int, waiting: int, cache_bytes: int) -> None:
        """A step ended."""

    def step_failed(self) -> None:
        """A step of the whole batch failed."""


class Engine:
    """Requests in, events out; see `Sequence` for what a request is told."""

    def __init__(
        self, model: ServedModel, observer: Observer, *, max_batch: int = 32, max_waiting: int = 128,
        prefill_tokens: int = 512,
    ) -> None:  # fmt: skip
        self._model, self._observer = model, observer
        self._max_batch, self._max_waiting, self._prefill_tokens = max_batch, max_waiting, prefill_tokens
        self._batch = Batch(model)
        self._reading: Sequence | None = None  # whose prompt is in the cache in part
        self._waiting: deque[Sequence] = deque()
        self._present = 0  # requests that have not ended
        self._changed = threading.Condition()  # guards `_waiting`, `_present` and `_open`
        self._open = True
        self._thread: threading.Thread | None = None
        self._seconds = 1.0  # a running mean of a request's time, from its submission to its end

    # --- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work."""
        self._thread = threading.Thread(target=self._run, name="hf-rfa engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the current step; requests that are still there fail."""
        with self._changed:
            self._open = False
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._open and self._thread is not None and self._thread.is_alive()

    def submit(self, sequence: Sequence) -> None:
        """Queue a request.

        Raises:
            RequestError: Too many wait (429), or the engine is stopping (503).
        """
        with self._changed:
            if not self._open:
                raise closing()
            waiting = self._present - self._max_batch
            if waiting >= self._max_waiting:
                raise busy(self._max_waiting, self._retry_after())
            self._present += 1
            self._waiting.append(sequence)
            self._changed.notify()

    def cancel(self, sequence: Sequence) -> None:
        """Drop a request before the next step; nothing happens if it has ended."""
        sequence.cancelled = True
        with self._changed:
            self._changed.notify()

    def _retry_after(self) -> int:
        """Seconds until about half of those that wait have had their turn, at most a minute."""
        return max(1, min(60, math.ceil(self._seconds * self._max_waiting / (2 * self._max_batch))))

    # --- in the engine's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._open and not (self._waiting or self._reading or self._batch.rows):
                    self._changed.wait()
                if not self._open:
                    break
            try:
                self.step()
            except Exception as error:  # a defect of the engine's own, so that nobody is left waiting for ever
                _log.exception("The engine failed; the requests that it had are given up.")
                self._give_up(error)
        self._give_up(closing())

    def step(self) -> None:
        """One step of all requests that are there."""
        self._drop_cancelled()
        self._read_prompts()
        self._decode()
        running = len(self._batch.rows)
        self._observer.stepped(running, self._present - running, self._batch.bytes)

    def _drop_cancelled(self) -> None:
        with self._changed:
            gone = [sequence for sequence in self._waiting if sequence.cancelled]
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.cancelled)
        if self._reading is not None and self._reading.cancelled:
            gone.append(self._reading)
            self._reading = None
        running = [sequence for sequence in self._batch.rows if sequence.cancelled]
        self._batch.leave(running)
        for sequence in gone + running:
            self._end(sequence, "cancelled")

    def _read_prompts(self) -> None:
        """Read the next pieces of prompts; the sequences that are ready join the batch."""
        budget, ready = self._prefill_tokens, list[Sequence]()
        while budget > 0:
            sequence = self._reading or self._next(len(ready))
            if sequence is None:
                break
            self._reading = sequence
            piece = sequence.tokens[sequence.seen : sequence.seen + budget]
            budget -= len(piece)
            try:
                if sequence.cache is None:
                    sequence.cache = self._model.new_cache()
                logits = self._model.prefill(sequence.cache, piece, sequence.seen)
            except Exception as error:
                self._reading = None
                self._fail(sequence, error)
                continue
            sequence.seen += len(piece)
            if sequence.seen == len(sequence.tokens):
                self._reading = None
                ready += self._accept([sequence], logits)
        if ready:
            try:
                self._batch.join(ready)
            except Exception as error:
                for sequence in ready:
                    self._fail(sequence, error)

    def _next(self, ready: int) -> Sequence | None:
        """The next sequence that waits, if there is room in the batch beside those that are `ready` to join it."""
        with self._changed:
            if not self._waiting or len(self._batch.rows) + ready >= self._max_batch:
                return None
            return self._waiting.popleft()

    def _decode(self) -> None:
        rows = list(self._batch.rows)
        if not rows:
            return
        try:
            logits = self._batch.step()
        except Exception as error:
            self._rescue(error)
            return
        for sequence in rows:
            sequence.retried = False
        staying = {id(sequence) for sequence in self._accept(rows, logits)}
        self._batch.leave([sequence for sequence in rows if id(sequence) not in staying])

    def _accept(self, sequences: Several[Sequence], logits: torch.Tensor) -> list[Sequence]:
        """Give each sequence its next token, from logits (B, V); returns those that go on."""
        going: list[Sequence] = []
        try:
            tokens = choose(logits, [each.sampler for each in sequences])
        except Exception as error:
            for sequence in sequences:
                self._fail(sequence, error)
            return going
        for sequence, token in zip(sequences, tokens, strict=True):
            try:
                reason = self._take(sequence, token)
            except Exception as error:
                self._fail(sequence, error)
                continue
            if reason is None:
                going.append(sequence)
            else:
                self._end(sequence, reason)
        return going

    def _take(self, sequence: Sequence, token: int | None) -> FinishReason | None:
        if token is None:
            raise FloatingPointError("The model's logits are not finite.")
        now = time.monotonic()
        self._observer.token(sequence, now - (sequence.last_token or sequence.submitted))
        sequence.last_token = now
        return sequence.accept(token)

    def _rescue(self, error: Exception) -> None:
        """After a failed step of the batch, read the text of each sequence again, alone.

        Which of them was at fault is not known, and some layers have seen the token already. The one at fault fails
        again there, by itself. A sequence whose batch fails a second time fails with it.
        """
        _log.error("A step of %d requests failed.", len(self._batch.rows), exc_info=error)
        self._observer.step_failed()
        again = []
        for sequence in self._batch.clear():
            if sequence.retried:
                self._fail(sequence, error)
                continue
            sequence.retried, sequence.seen, sequence.cache = True, 0, None
            again.append(sequence)
        with self._changed:
            self._waiting.extendleft(reversed(again))

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        if reason != "cancelled":
            self._seconds += 0.1 * (time.monotonic() - sequence.submitted - self._seconds)
        self._leave(sequence, reason, lambda: sequence.finish(reason))

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        if not isinstance(error, RequestError):
            _log.error("A request failed.", exc_info=error)
        self._leave(sequence, "failed", lambda: sequence.fail(error))

    def _leave(self, sequence: Sequence, reason: str, tell: Callable[[], None]) -> None:
        sequence.cache = None
        with self._changed:
            self._present -= 1
        self._observer.left(sequence, reason, time.monotonic() - sequence.submitted)
        try:
            tell()
        except Exception:
            _log.exception("A request could not be told that it has ended.")

    def _give_up(self, error: Exception) -> None:
        """Fail all requests that are there."""
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
        reading = [] if self._reading is None else [self._reading]
        self._reading = None
        for sequence in [*self._batch.clear(), *reading, *waiting]:
            self._fail(sequence, error)
