"""What the clients of a soak send: questions with an answer that is known, and requests that must be refused."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

#: A long answer that nobody waits for.
GOING: dict[str, Any] = {"model": "model", "prompt": [5, 6, 7] * 20, "max_tokens": 300, "temperature": 0}
_TEXTS = ("def add(a, b):\n    return", "Grüße, 世界 🙂🙂 e\u0301", "import os\n\n\nclass ")


@dataclass
class Question:
    """A greedy request; `answer` is what it got when it was asked alone."""

    path: str
    body: dict[str, Any]
    answer: str | None = None

    def ask_alone(self, client: httpx.Client) -> None:
        """Ask while nobody else does; later answers are held to this one."""
        self.answer = self.text(client.post(self.path, json=self.body))

    def text(self, response: httpx.Response) -> str:
        """The answer in a whole response."""
        _expect(response, 200)
        [choice] = response.json()["choices"]
        found: str = choice["text"] if "text" in choice else choice["message"]["content"]
        return found

    def streamed(self, response: httpx.Response) -> str:
        """The answer in a stream that came to its end."""
        if response.status_code != 200:
            response.read()
        _expect(response, 200)
        pieces, ended = [], False
        for line in response.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                pieces.append(choice["text"] if "text" in choice else choice["delta"].get("content", ""))
        if not ended:
            raise AssertionError("The stream broke off.")
        return "".join(pieces)

    def check(self, text: str) -> None:
        """Raise if that is another answer than alone."""
        if text != self.answer:
            raise AssertionError(f"Alone the answer was {self.answer!r}. Got {text!r}.")


@dataclass(frozen=True)
class Malformed:
    """A request that must be refused with this status."""

    content: bytes
    status: int = 400
    path: str = "/v1/completions"

    def send(self, client: httpx.Client) -> None:
        """Send it and check what comes back."""
        response = client.post(self.path, content=self.content, headers={"Content-Type": "application/json"})
        _expect(response, self.status)
        if "message" not in response.json()["error"]:
            raise AssertionError(f"An error has no message. Got {response.text}.")


def questions(tokenizer: Any, limit: int, chance: random.Random) -> list[Question]:
    """Prompts of different lengths as text and as tokens, and a chat where the model knows chats."""
    found = []
    words = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    for length, new in ((1, 9), (3, 14), (30, 1), (64, 25), (150, 6), (300, 17)):
        if length + new <= limit:
            found.append(_completion(chance.choices(words, k=length), new))
    found += [_completion(text, 12) for text in _TEXTS]
    found.append(Question(found[0].path, {**found[0].body, "stop": ["e", "w1"], "max_tokens": 20}))
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 1, "max_new_tokens": 8, "eos_token_id": []}
    drawn = {"model": "model", "prompt": _TEXTS[0], "generation_config": json.dumps(settings)}
    found.append(Question("/v1/completions", drawn))
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": _TEXTS[1]}]
        body = {"model": "model", "messages": messages, "max_tokens": 15, "temperature": 0}
        found.append(Question("/v1/chat/completions", body))
    return found


def malformed(limit: int) -> Sequence[Malformed]:
    """Bodies that are no requests, or ask for what cannot be had."""
    good: dict[str, Any] = {"model": "model", "prompt": [5], "max_tokens": 2}
    wrong = [
        {"prompt": ""}, {"prompt": []}, {"prompt": None}, {"prompt": [[]]}, {"prompt": [10**9]}, {"prompt": {"a": 1}},
        {"max_tokens": 0}, {"max_tokens": -3}, {"max_tokens": 1.5}, {"max_tokens": "2"}, {"max_tokens": 10**12},
        {"prompt": [5] * (limit + 1)}, {"n": 2}, {"temperature": "hot"}, {"temperature": -1}, {"top_p": 2},
        {"stop": ""}, {"stop": 3}, {"seed": 1e99}, {"logprobs": 3}, {"stream": "yes"}, {"nonsense": 1},
        {"prompt": "\ud800"}, {"top_k": -1}, {"top_k": 1.5}, {"eos_token_id": "x"}, {"eos_token_id": 10**9},
        {"generation_config": {}}, {"generation_config": '{"num_beams": 4}'}, {"generation_config": '{"\\ud800": 1}'},
        {"generation_config": 5000 * "["}, {"generation_config": '{"temperature": NaN}'},
    ]  # fmt: skip
    bodies = [Malformed(json.dumps({**good, **each}).encode()) for each in wrong]
    broken = [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'{"model": "model"',
        b"\xff\xfe{}",
        b'{"model": "model", "prompt": NaN}',
    ]
    bodies += [Malformed(each) for each in broken]
    bodies.append(Malformed(json.dumps({**good, "model": "another"}).encode(), 404))
    bodies.append(Malformed(b'{"model": "model", "messages": []}', path="/v1/chat/completions"))
    bodies.append(Malformed(b"{}", path="/load_model"))
    return bodies


def _completion(prompt: str | list[int], new: int) -> Question:
    return Question("/v1/completions", {"model": "model", "prompt": prompt, "max_tokens": new, "temperature": 0})


def _expect(response: httpx.Response, status: int) -> None:
    if response.status_code != status:
        raise AssertionError(f"Status {status} was due. Got {response.status_code}: {response.text[:300]}")
