"""From texts to prompts: a document and questions behind it, as plain text or in a chat template, as token ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from hf_rfa.errors import ConfigError

PromptStyle = Literal["plain", "chat"]
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"  # of document and question in the rendered template


@dataclass(frozen=True)
class Question:
    """A question about a document, and what its answer must hold.

    Attributes:
        task: Name of the task.
        ids: Token ids that follow those of the document, up to where the answer begins.
        answers: The strings that the answer must hold; the score is the share that it does.
        new_tokens: Number of tokens that the answer may have.
        depth: Place of the answer in the document, 0 to 1; None if it is spread over all of it.
        spans: (start, end) of the tokens of the sentences in the document that give `answers`, in this order.
    """

    task: str
    ids: tuple[int, ...]
    answers: tuple[str, ...]
    new_tokens: int
    depth: float | None = None
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class TaskDocument:
    """A document and its questions; document, question and answer have at most `length` tokens together."""

    length: int
    ids: tuple[int, ...]
    questions: tuple[Question, ...]


class Prompts:
    """Makes token ids of documents and questions.

    Args:
        style: "plain", a text that goes on with the answer, or "chat", the tokenizer's template with document and
            question in one message and the beginning of the answer in the next.

    Raises:
        ConfigError: "chat" and a tokenizer without a template that shows the message as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: PromptStyle = "plain") -> None:
        self.tokenizer = tokenizer
        self._head, self._between = "", "\n"
        # What the tokenizer puts before every text; it may put something behind it too.
        start = list(tokenizer("").input_ids)
        self._start = start[:1] if start and start[0] == tokenizer.bos_token_id else []
        if style == "chat":
            self._start = []  # the template has it
            self._head, self._between = self._template()

    def _template(self) -> tuple[str, str]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError("The tokenizer has no chat template. Got the prompt style 'chat'. Choose 'plain'.")
        message = [{"role": "user", "content": _PLACE}]
        text = str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        parts = text.split(_PLACE)
        if len(parts) != 2:
            raise ConfigError(
                f"The chat template must show a message once and as it is. Got it {len(parts) - 1} times. Choose the "
                "prompt style 'plain'."
            )
        return parts[0], parts[1]

    def encode(self, text: str) -> list[int]:
        """Token ids of a part of a text, without special tokens of its own."""
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def opening(self, text: str) -> list[int]:
        """The tokens before a document."""
        return self._start + self.encode(self._head + text)

    def question(self, text: str, answer: str) -> tuple[int, ...]:
        """The tokens behind a document: the question and how its answer begins."""
        return tuple(self.encode(f"\n\n{text}{self._between}{answer}"))

    def answer_tokens(self, answers: Sequence[str]) -> int:
        """Number of tokens that an answer of these strings may have: half as many again, and some words."""
        return -(-3 * len(self.encode(" " + ", ".join(answers))) // 2) + 8
