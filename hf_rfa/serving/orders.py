"""From the body of a request to what the engine is asked: prompts to tokens, limits, defaults."""

import copy
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from jinja2 import TemplateError

from hf_rfa.serving.errors import RequestError, invalid
from hf_rfa.serving.requests import AnyRequest, ChatRequest, CompletionRequest
from hf_rfa.serving.sampling import Sampling
from hf_rfa.serving.sequence import Event, Order, Sequence
from hf_rfa.serving.text import TextStream

#: OpenAI's default of `max_tokens` for completions; chats may fill the context.
_COMPLETION_TOKENS = 16
_Tokens = TypeVar("_Tokens", list[int], frozenset[int])


class Orders:
    """Makes sequences of requests, and refuses those that the model cannot answer."""

    def __init__(self, tokenizer: Any, *, name: str, max_length: int, vocabulary: int, ends: frozenset[int]) -> None:
        """`ends`: the tokens that end an answer; the tokenizer's own if there are none."""
        self.name, self.max_length, self._vocabulary = name, max_length, vocabulary
        own = tokenizer.eos_token_id
        self._ends = ends or frozenset(() if own is None else (own,))
        # One copy reads prompts, in several threads one after the other; one writes text, in the engine's thread.
        self._tokenizer, self._writer = tokenizer, copy.deepcopy(tokenizer)
        self._lock = threading.Lock()

    def check_name(self, name: str) -> None:
        """Raise `RequestError` (404) if that is not the model's name."""
        if name != self.name:
            raise RequestError(
                404, f"There is no model {name!r} here. Ask for {self.name!r}.", param="model", code="model_not_found"
            )

    def sequence(self, request: AnyRequest, emit: Callable[[Event], None]) -> Sequence:
        """The request as a sequence.

        Raises:
            RequestError: Another model, an empty prompt, one that is too long, or one that no template fits.
        """
        self.check_name(request.model)
        prompt = self._prompt(request)
        order = Order(
            prompt, self._limit(request, len(prompt)),
            Sampling(
                1.0 if request.temperature is None else request.temperature,
                1.0 if request.top_p is None else request.top_p, request.top_k or None, request.seed,
            ),
            tuple(request.stops), self._ends if request.ends is None else self._known(request.ends, "eos_token_id"),
        )  # fmt: skip
        return Sequence(order, TextStream(self._writer, prompt, order.stop), emit)

    def _prompt(self, request: AnyRequest) -> list[int]:
        field = "messages" if isinstance(request, ChatRequest) else "prompt"
        with self._lock:
            tokens = self._chat(request) if isinstance(request, ChatRequest) else self._completion(request)
        if not tokens:
            raise invalid(f"`{field}` is empty. Got no token. Send some text.", field)
        return self._known(tokens, field)

    def _known(self, tokens: _Tokens, field: str) -> _Tokens:
        """The tokens themselves, none of which may be above those of the model."""
        wrong = max(tokens, default=0)
        if wrong >= self._vocabulary:
            raise invalid(f"`{field}` has the token {wrong}. The model knows 0 to {self._vocabulary - 1}.", field)
        return tokens

    def _chat(self, request: ChatRequest) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise invalid(
                f"{self.name!r} has no chat template, so that it knows no conversations. Use /v1/completions."
            )
        messages = [message.for_template() for message in request.messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise invalid(f"The model's chat template refuses these messages: {error}", "messages") from error
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return tokens

    def _completion(self, request: AnyRequest) -> list[int]:
        assert isinstance(request, CompletionRequest)
        prompt: Any = request.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise invalid(
                    f"`prompt` may be one text. Got {len(prompt)}. Send a request for each; they are answered "
                    "together.", "prompt"
                )  # fmt: skip
            prompt = prompt[0]
        if isinstance(prompt, list):
            return prompt
        tokens: list[int] = self._tokenizer(prompt).input_ids if prompt else []
        return tokens

    def _limit(self, request: AnyRequest, length: int) -> int:
        """The most tokens that may be generated after a prompt of `length` tokens."""
        room = self.max_length - length
        asked = request.max_tokens
        if asked is None:
            asked = room if isinstance(request, ChatRequest) else min(_COMPLETION_TOKENS, room)
        if room < 1 or asked > room:
            wanted = "" if request.max_tokens is None else f" and {request.max_tokens} to generate"
            raise invalid(
                f"The model's context is {self.max_length} tokens. Got {length} in the prompt{wanted}. Shorten the "
                "prompt, or generate less.", "messages" if isinstance(request, ChatRequest) else "prompt",
                "context_length_exceeded",
            )  # fmt: skip
        return asked
