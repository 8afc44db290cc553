"""`hf-rfa chat`: a conversation in the terminal, whose memory does not grow with it."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import TextStreamer

from hf_rfa.checkpoint import load_any, load_tokenizer
from hf_rfa.commands.settings import ChatSettings
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.arguments import cache_argument, cache_of
from hf_rfa.runtime.cache import cache_bytes
from hf_rfa.runtime.devices import chosen_device

COMMANDS = "/reset forgets the conversation, /exit leaves"


class Conversation:
    """A conversation with a model: each turn reads only what is new, the cache holds the rest.

    A template that writes earlier turns anew (one that takes thoughts out of them, for example) makes the model read
    the conversation from the start in each turn: right, but slower.
    """

    messages: list[dict[str, str]]
    _ids: torch.Tensor | None  # all tokens, the last of which the cache may lack
    _cache: Any
    _read: tuple[str, str]  # the last prompt, and the answer

    def __init__(self, model: Any, tokenizer: Any, *, system: str | None = None, **options: Any) -> None:
        """`options`: of `model.generate`, for every answer.

        Raises:
            ConfigError: The tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                "The tokenizer has no chat template, so the model was not trained for conversations. Got "
                f"chat_template={tokenizer.chat_template!r}. Choose an instruct model, or set the template and save "
                "the tokenizer again."
            )
        self._model, self._tokenizer, self._options = model, tokenizer, options
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self.messages = list(self._start)
        self._forget()

    @property
    def tokens(self) -> int:
        """Tokens of the conversation so far."""
        return 0 if self._ids is None else self._ids.shape[1]

    @property
    def cache_bytes(self) -> int:
        """Size of the model's memory of it."""
        return 0 if self._cache is None else cache_bytes(self._cache)

    def answer(self, text: str, streamer: Any = None) -> str:
        """The model's answer to the next message. If it is interrupted, the message counts as never sent."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = self._answer(streamer)
        except BaseException:
            self.messages.pop()
            self._forget()  # the cache has read some of it
            raise
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def _answer(self, streamer: Any) -> str:
        prompt = self._tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        new = self._not_read(prompt)
        if new is None:
            self._forget()
            new = prompt
        ids = self._tokenizer(new, return_tensors="pt", add_special_tokens=False).input_ids.to(self._model.device)
        ids = ids if self._ids is None else torch.cat([self._ids, ids], dim=1)
        cache = {} if self._cache is None else {cache_argument(self._model): self._cache}
        output = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, streamer=streamer,
            pad_token_id=self._padding(), **cache, **self._options,
        )  # fmt: skip
        sequence, self._cache = output.sequences, cache_of(output)
        said = sequence[0, ids.shape[1] :]
        answer = self._tokenizer.decode(said, skip_special_tokens=True)
        ended = said[-1].item() in self._ends()  # the cache lacks this token: the template writes it, if it does
        self._ids = sequence[:, :-1] if ended else sequence
        self._read = (prompt, answer)
        return answer

    def _not_read(self, prompt: str) -> str | None:
        """The end of the prompt after what the model has read and said; None if it does not go on from there."""
        if self._cache is None:
            return None
        before, answer = self._read
        rest = prompt.removeprefix(before)
        for said in (answer, answer.strip()):  # some templates strip
            if rest != prompt and rest.startswith(said):
                return rest.removeprefix(said)
        return None

    def _forget(self) -> None:
        self._ids = self._cache = None
        self._read = ("", "")

    def _ends(self) -> list[int]:
        ends = self._model.generation_config.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    def _padding(self) -> int | None:
        found = self._model.generation_config.pad_token_id
        return next(iter(self._ends()), None) if found is None else found


def chat(settings: ChatSettings, say: Callable[[str], None]) -> None:
    """Hold a conversation: with the terminal, or with the lines of standard input to its end if that is none.

    Args:
        say: Gets a line about the conversation; the answers themselves go to standard output as they come.

    Raises:
        ConfigError, OSError: The model cannot be loaded, or is not for conversations.
    """
    code, device = {"trust_remote_code": settings.trust_remote_code}, chosen_device(settings.device)
    model = load_any(settings.folder, dtype=settings.dtype, **code).eval().to(device)
    tokenizer = load_tokenizer(settings.folder, **code)
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens}
    if settings.greedy:
        options |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    conversation = Conversation(model, tokenizer, system=settings.system, **options)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    say(f"{type(model).__name__} from {settings.folder}: {COMMANDS}.")
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            say("Forgotten.")
        elif line.startswith("/"):
            say(f"There is no command {line!r}: {COMMANDS}.")
        elif line:
            try:
                conversation.answer(line, streamer)
            except KeyboardInterrupt:
                say("\nInterrupted; the message counts as never sent.")
                continue
            say(f"[{conversation.tokens} tokens, cache {conversation.cache_bytes:,} bytes]")


def _lines() -> Iterator[str]:
    """The user's lines, without the white space around them."""
    if not sys.stdin.isatty():
        try:
            for line in sys.stdin:
                print(f"> {line.strip()}")
                yield line.strip()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"Standard input must be {error.encoding} text. Got the byte {error.object[error.start]:#04x}. "
                "Convert it, for example by `iconv`."
            ) from error
        return
    while True:
        try:
            yield input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
