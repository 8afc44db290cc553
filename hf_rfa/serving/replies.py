"""The bodies of answers, whole and streamed, as OpenAI defines them."""

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from hf_rfa.serving.errors import RequestError
from hf_rfa.serving.sequence import Finished

#: The last line of a stream.
DONE = "data: [DONE]\n\n"


def sent(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Reply:
    """The answer to one request: of the chat, or a completion."""

    def __init__(self, model: str, *, chat: bool, usage: bool) -> None:
        """`usage`: whether a stream ends with the numbers of tokens."""
        self._chat, self._usage = chat, usage
        kind = "chat.completion" if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def whole(self, text: str, end: Finished) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        said: dict[str, Any] = {"text": text}
        if self._chat:
            said = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": end.reason}
        return {**self._head, "choices": [choice], "usage": usage_of(end)}

    def first(self) -> Iterator[str]:
        """What a stream begins with."""
        if self._chat:
            yield self._chunk({"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, text: str) -> str:
        """A piece of the text."""
        return self._chunk({"delta": {"content": text}} if self._chat else {"text": text}, None)

    def last(self, end: Finished) -> Iterator[str]:
        """What a stream ends with."""
        yield self._chunk({"delta": {}} if self._chat else {"text": ""}, end.reason)
        if self._usage:
            yield sent({**self._stream_head(), "choices": [], "usage": usage_of(end)})
        yield DONE

    def failed(self, error: RequestError) -> str:
        """What a stream ends with if it cannot go on."""
        return sent(error.body())

    def _stream_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"} if self._chat else self._head

    def _chunk(self, said: dict[str, Any], reason: str | None) -> str:
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": reason}
        body = {**self._stream_head(), "choices": [choice]}
        return sent({**body, "usage": None} if self._usage else body)


def usage_of(end: Finished) -> dict[str, int]:
    """The numbers of tokens."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }
