"""A tiny model whose every token is a word, and servers of it: in this process, or in one of their own."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import torch
import uvicorn
from conversions import converted
from families import llama
from openai import OpenAI
from paths import ROOT
from tokenizers_of_tests import word_tokenizer

from hf_rfa import RFAConfig
from hf_rfa.serving.server import app_for
from hf_rfa.serving.settings import ServeSettings

WORDS, POSITIONS, NAME = 128, 512, "tiny"
CONVERSION = RFAConfig(window=8, num_features=16, sink_tokens=2, kept_keys=4, softmax_heads=[(1, 0)])
#: A chat is the words of its messages between two of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('No tools here.') }}{% endif %}"
    "w9 {{ message.content }} {% endfor %}{% if add_generation_prompt %}w10{% endif %}"
)


#: Bodies that are answered; tests change them.
COMPLETION = {"model": NAME, "prompt": "w3", "max_tokens": 2}
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "w3"}], "max_tokens": 2}


def tiny_model(*, original=False):
    model = llama(vocab_size=WORDS, max_position_embeddings=POSITIONS)
    with torch.no_grad():
        model.lm_head.weight[0] = 0  # never the best token: w0 is the unknown word, which answers leave out
    return model if original else converted(model, CONVERSION)


def tokenizer():
    found = word_tokenizer(WORDS)
    found.chat_template = CHAT_TEMPLATE
    return found


def prompt_of(length, seed=0):
    """Words, of which the tokenizer makes as many tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return " ".join(f"w{i}" for i in torch.randint(1, WORDS, (length,), generator=generator))


def generated(model, text, count, **options):
    """The tokens that `model.generate` continues a text with, greedily."""
    return continued(model, tokenizer()(text).input_ids, count, **options)


def continued(model, tokens, count, **options):
    """The same for a text of tokens, each of which counts: `generate` takes the padding token for padding."""
    ids = torch.tensor([tokens])
    options = {"max_new_tokens": count, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    return model.generate(ids, **options)[0, ids.shape[1] :].tolist()


def complete(client, text, count, **options):
    """Ask a client for a greedy completion."""
    return client.completions.create(
        **{"model": NAME, "prompt": text, "max_tokens": count, "temperature": 0, **options}
    )


def words(text):
    """The tokens of an answer."""
    return tokenizer()(text).input_ids


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Running:
    """A server's address, and clients of it."""

    def __init__(self, port, app=None):
        self.port, self.app = port, app
        self.url = f"http://127.0.0.1:{port}"

    def openai(self):
        """A client that does not try again by itself."""
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)

    def http(self):
        return httpx.Client(base_url=self.url, timeout=600)

    def metrics(self):
        """{name and labels: value}"""
        with self.http() as client:
            lines = client.get("/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def until(self, condition, seconds=600):
        """Waits until the server's metrics meet a condition."""
        end = time.monotonic() + seconds
        while not condition(found := self.metrics()):
            assert time.monotonic() < end, found
            time.sleep(0.02)
        return found


@contextmanager
def serving(model, own_tokenizer=None, **settings) -> Iterator[Running]:
    """A server of a loaded model in a thread of this process."""
    app = app_for(model, own_tokenizer or tokenizer(), ServeSettings(folder=NAME, **settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=100))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Running(listener.getsockname()[1], app)
        finally:
            server.should_exit = True
            thread.join()


def start_process(folder: Path, port: int, *options: str) -> subprocess.Popen:
    """`hf-rfa serve` in a process of its own, which may not be ready yet; its output is in `server.log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    arguments = ["-m", "hf_rfa", "serve", str(folder), "--port", str(port), "--threads", "1", *options]
    with (folder / "server.log").open("ab") as log:
        return subprocess.Popen([sys.executable, *arguments], env=environment, stdout=log, stderr=log)


def wait_until_healthy(running: Running, process: subprocess.Popen, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while True:
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() < end, "the server did not start"
        try:
            if httpx.get(f"{running.url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
