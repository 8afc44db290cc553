"""`hf-rfa serve` as a process: killed and started again, stopped. (Under load: tests/scripts/test_serving_soak.py.)"""

import signal
import socket

import httpx
import pytest
from servers import (
    NAME,
    Running,
    complete,
    continued,
    free_port,
    prompt_of,
    start_process,
    tiny_model,
    tokenizer,
    wait_until_healthy,
)

import hf_rfa
from hf_rfa.errors import ConfigError
from hf_rfa.serving.server import serve
from hf_rfa.serving.settings import ServeSettings

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


@pytest.mark.parametrize(("host", "message"), [("127.0.0.1", "Address already in use"), ("nowhere.invalid", "Name")])
def test_an_address_that_is_not_to_be_had_is_refused_before_the_model_is_loaded(host, message, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        settings = ServeSettings(folder=str(tmp_path / "no model at all"), host=host, port=listener.getsockname()[1])
        with pytest.raises(ConfigError, match=f"cannot listen on '{host}'.*Got: {message}"):
            serve(settings)


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
