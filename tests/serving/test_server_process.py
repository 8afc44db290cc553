"""`hf-rfa serve` as a process: under load for a while, killed and started again, stopped."""

import random
import signal
import threading
import time
from collections import Counter

import httpx
import openai
import pytest
from servers import (
    NAME,
    Running,
    continued,
    free_port,
    prompt_of,
    start_process,
    tiny_model,
    tokenizer,
    wait_until_healthy,
)

import hf_rfa

#: Bytes by which a process may grow without losing any: the allocator's, of the first requests of each kind.
SLACK = 40 * 2**20
QUESTIONS = [
    (prompt_of(length), count) for length, count in ((3, 9), (30, 1), (41, 14), (80, 25), (150, 6), (200, 17))
]


class Process:
    """A server in a process of its own, which may be killed and started again on its port."""

    def __init__(self, folder):
        self.folder, self.running = folder, Running(free_port())
        self.process = None

    def start(self):
        if self.process is None or self.process.poll() is not None:
            self.process = start_process(self.folder, self.running.port, "--name", NAME, "--max-batch", "8")
        wait_until_healthy(self.running, self.process)
        return self.running


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def process(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    hf_rfa.save_pretrained(model, folder)
    tokenizer().save_pretrained(folder)
    found = Process(folder)
    yield found
    if found.process is not None:
        found.process.kill()
        found.process.wait()


@pytest.fixture(scope="module")
def expected(model):
    own = tokenizer()
    tokens = {text: continued(model, own(text).input_ids, count) for text, count in QUESTIONS}
    return {text: own.decode(answer) for text, answer in tokens.items()}


def complete(client, text, count, **options):
    return client.completions.create(
        **{"model": NAME, "prompt": text, "max_tokens": count, "temperature": 0, **options}
    )


class Load:
    """Clients that ask until they are told to stop, go in the middle of an answer, and send nonsense."""

    def __init__(self, running, expected):
        self._running, self._expected = running, expected
        self._end = threading.Event()
        self.done, self.wrong = Counter(), []

    def ask(self, client, chance):
        text, count = chance.choice(QUESTIONS)
        answer = complete(client, text, count)
        if answer.choices[0].text.strip() != self._expected[text] or answer.usage.completion_tokens != count:
            self.wrong.append((text, count, answer))

    def stream(self, client, chance):
        text, count = chance.choice(QUESTIONS)
        pieces = "".join(chunk.choices[0].text for chunk in complete(client, text, count, stream=True))
        if pieces.strip() != self._expected[text]:
            self.wrong.append((text, count, pieces))

    def go(self, client, chance):
        stream = complete(client, prompt_of(60), 400, stream=True)
        for _, _ in zip(range(chance.randrange(1, 9)), stream, strict=False):
            pass
        stream.close()

    def confuse(self, client, chance):
        refusal: type[openai.APIStatusError] = openai.BadRequestError
        text, options = chance.choice(
            [("", {}), ("w3", {"n": 2}), ("w3", {"max_tokens": 10**6}), ("w3", {"model": "x"})]
        )
        if "model" in options:
            refusal = openai.NotFoundError
        with pytest.raises(refusal):
            complete(client, text, **{"count": 2, "max_tokens": 2} | options)

    def _work(self, seed):
        chance = random.Random(seed)
        with self._running.openai() as client:
            while not self._end.is_set():
                kind = chance.choice(["ask", "ask", "stream", "go", "confuse"])
                try:
                    getattr(self, kind)(client, chance)
                    self.done[kind] += 1
                except Exception as error:
                    self.wrong.append((kind, error))

    def __enter__(self):
        self._threads = [threading.Thread(target=self._work, args=(seed,)) for seed in range(6)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("seconds", [20, pytest.param(600, marks=pytest.mark.slow)])
def test_a_soak_loses_no_request_and_grows_no_memory(process, expected, seconds):
    running = process.start()
    with Load(running, expected) as load:
        until(load, seconds / 4)
        memory = running.metrics()["process_resident_memory_bytes"]
        until(load, seconds * 3 / 4)
        later = running.metrics()["process_resident_memory_bytes"]
    assert load.wrong == []
    assert later - memory < SLACK
    idle = running.until(lambda found: found["hf_rfa_requests_running"] == found["hf_rfa_requests_waiting"] == 0)
    assert idle["hf_rfa_cache_bytes"] == 0
    assert idle['hf_rfa_requests_total{reason="failed"}'] == idle["hf_rfa_step_failures_total"] == 0
    assert idle['hf_rfa_requests_total{reason="cancelled"}'] > 0


def until(load, seconds):
    """Waits for so long, and until some requests of each kind have come to their end."""
    end, before = time.monotonic() + seconds, Counter(load.done)
    while time.monotonic() < end or any(
        load.done[kind] < before[kind] + 3 for kind in ("ask", "stream", "go", "confuse")
    ):
        assert load.wrong == []
        assert time.monotonic() < end + 600, load.done
        time.sleep(0.1)


def test_a_server_that_was_killed_is_started_again(process, expected):
    running = process.start()
    body = {"model": NAME, "prompt": prompt_of(60), "max_tokens": 400, "stream": True}
    with running.http() as client, client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        process.process.kill()
        with pytest.raises(httpx.TransportError):
            list(lines)
        process.process.wait()
    text, count = QUESTIONS[3]
    with process.start().openai() as client:
        assert complete(client, text, count).choices[0].text.strip() == expected[text]


def test_a_server_that_is_told_to_stop_lets_requests_end(process):
    running = process.start()
    with running.openai() as client:
        stream = complete(client, prompt_of(60), 400, stream=True)
        next(iter(stream))
        process.process.send_signal(signal.SIGTERM)
        assert len(list(stream)) >= 399
    assert process.process.wait(timeout=600) in (0, -signal.SIGTERM)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.url}/health")
