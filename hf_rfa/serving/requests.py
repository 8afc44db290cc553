"""The bodies of requests, as OpenAI defines them. What would change the answer and is not supported is refused."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from hf_rfa.serving.choice import Choice, Token
from hf_rfa.serving.faults import FieldError
from hf_rfa.serving.generation_config import fields_of
from hf_rfa.serving.unsupported import refuse_unless_neutral

#: Fields that this server does not have, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,), "tools": ([],), "functions": ([],),
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
#: Fields that have no say in the answer.
_IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip


def _of_characters(text: str) -> str:
    """JSON may hold halves of characters (`\\ud800`), which are no text and which no tokenizer takes."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("A text holds half of a character (a lone surrogate, \\ud800 to \\udfff). Leave it out.")
    return text


String = Annotated[str, AfterValidator(_of_characters)]
Tokens = list[Token]
#: Fields of a message that say nothing where they are empty.
_EMPTY = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool = False  # this server sends none

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.include_obfuscation:
            raise ValueError("`include_obfuscation` is not supported. Got true. Leave it out.")
        return self


class AnyRequest(Choice):
    """What both kinds of requests have."""

    model: String
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name in _NEUTRAL.keys() & values.keys():
            refuse_unless_neutral(name, values[name], _NEUTRAL[name], _advice(name))
        return {name: value for name, value in values.items() if name not in _IGNORED and name not in _NEUTRAL}

    @model_validator(mode="before")
    @classmethod
    def _read_generation_config(cls, values: Any) -> Any:
        """Fields that a request names itself come before those of its generation config."""
        if not isinstance(values, dict) or "generation_config" not in values:
            return values
        own = {name: value for name, value in values.items() if name != "generation_config" and value is not None}
        named = {} if values["generation_config"] is None else fields_of(values["generation_config"])
        if "max_completion_tokens" in own:
            named.pop("max_tokens", None)
        return named | own

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise FieldError(
                "stream_options",
                "`stream_options` belongs to streamed answers. Set `stream` to true, or leave it out.",
            )
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(AnyRequest):
    """The body of POST /v1/completions; one prompt, as text or as token ids."""

    prompt: String | Tokens | list[String] | list[Tokens]


class TextPart(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: String


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: String | list[TextPart] | None = None
    name: String | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, values: Any) -> Any:
        """What answers of this and other servers carry and is empty, so that they can be sent back as they came."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in _EMPTY or value not in (None, [])}

    def for_template(self) -> dict[str, str]:
        """As chat templates read it; they know no developers, whose word is that of the system."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": content or "", **named}


class LoadRequest(BaseModel):
    """The body of POST /load_model, by which `transformers chat` asks for a model before it sends messages."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: String


class ChatRequest(AnyRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise FieldError(
                "max_tokens",
                "`max_tokens` is the old name of `max_completion_tokens`. Got both, with different values. Set one.",
            )
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self


def _advice(name: str) -> str:
    return "Send one request for each answer." if name in ("n", "best_of") else "Leave it out."
