"""A soak of `hf-rfa serve`: clients that ask, stream, go in the middle of an answer and send nonsense, for a while.

    python scripts/serving_soak.py FOLDER --minutes 10
    python scripts/serving_soak.py FOLDER --minutes 10 --clients 16 --max-batch 8

FOLDER is a causal LM with its tokenizer, converted or not. The server runs in a process of its own. First each
question is asked alone; under load every answer must be the same again, greedily. Printed at the end:

- served: whole and streamed answers that were right; lost: those that failed, or were others than alone
- cancelled: answers whose client has gone; refused: malformed requests that got the status that they should
- memory: of the server's process (resident), before the first request, after the warm-up (a quarter of the time, the
  questions alone included), and at the end
- held: requests in the batch, waiting requests and bytes of the batch's cache once all clients have gone

The exit status is 1 if a request was lost, something is held at the end, or memory grew by more than `--slack-mib`
after the warm-up.
"""

import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from benchmarks.soak_requests import GOING, Malformed, Question, malformed, questions
from transformers import AutoTokenizer

from hf_rfa.command_line import parse_arguments
from hf_rfa.options import Settings, option

MIB = 2**20
#: What clients do, and how often.
KINDS = {"ask": 4, "stream": 3, "go": 2, "go_whole": 1, "confuse": 2}


@dataclass(frozen=True)
class Options(Settings):
    folder: str = option("Folder of the model and its tokenizer.")
    minutes: float = option("Time under load; longer if it takes longer until each kind of request has ended.", 10.0)
    clients: int = option("Clients at the same time.", 8, least=1)
    max_batch: int = option("See `hf-rfa serve`.", 6, least=1)
    slack_mib: float = option("What an allocator may take after the warm-up without any loss.", 40.0, least=0)
    seed: int = option("Of the questions, and of what clients do.", 0)


@dataclass
class Outcome:
    """What a soak found; memory in bytes."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: dict[str, float] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        """Bytes since the warm-up."""
        return self.memory["at the end"] - self.memory["after the warm-up"]

    def report(self) -> str:
        """The figures, a line for each kind."""
        counts = self.counts
        lines = [
            f"served {counts['ask'] + counts['stream']} ({counts['ask']} whole, {counts['stream']} streamed), "
            f"lost {len(self.faults)}",
            f"cancelled {counts['go'] + counts['go_whole']} ({counts['go']} streams), refused {counts['confuse']}",
            "memory, MiB: " + ", ".join(f"{size / MIB:.1f} {when}" for when, size in self.memory.items()),
            "held: " + ", ".join(f"{value:.0f} {name}" for name, value in self.held.items()),
        ]
        return "\n".join([*lines, *self.faults[:20]])


class Server:
    """`hf-rfa serve` in a process of its own."""

    def __init__(self, folder: str, max_batch: int, log: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "hf_rfa", "serve", folder, "--port", str(port), "--name", "model",
                   "--max-batch", str(max_batch), "--threads", "1"]  # fmt: skip
        with log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ)

    def wait(self, seconds: float = 600) -> None:
        """Until it answers."""
        end = time.monotonic() + seconds
        while True:
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"The server did not start:\n{self._log.read_text()[-3000:]}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)

    def figures(self) -> dict[str, float]:
        """{name and labels: value} of /metrics."""
        lines = httpx.get(f"{self.url}/metrics", timeout=600).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def memory(self) -> float:
        """Bytes of its process."""
        return self.figures()["process_resident_memory_bytes"]

    def held(self, seconds: float = 120) -> dict[str, float]:
        """What it holds of requests, once nothing is left or some time is over."""
        names = {"running": "hf_rfa_requests_running", "waiting": "hf_rfa_requests_waiting",
                 "bytes of cache": "hf_rfa_cache_bytes"}  # fmt: skip
        end = time.monotonic() + seconds
        while True:
            figures = self.figures()
            found = {name: figures[metric] for name, metric in names.items()}
            if not any(found.values()) or time.monotonic() > end:
                return found
            time.sleep(0.1)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Client:
    """One client after another request."""

    def __init__(self, url: str, asked: Sequence[Question], wrong: Sequence[Malformed], outcome: Outcome) -> None:
        self.http = httpx.Client(base_url=url, timeout=600)
        self._questions, self._wrong, self._outcome = asked, wrong, outcome

    def work(self, end: threading.Event, chance: random.Random) -> None:
        """Until `end` is set; a fault is noted, and the next request follows."""
        with self.http:
            while not end.is_set():
                kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
                try:
                    getattr(self, kind)(chance)
                    self._outcome.counts[kind] += 1
                except Exception as error:
                    self._outcome.faults.append(f"lost: {kind}: {type(error).__name__}: {error}"[:500])

    def ask(self, chance: random.Random) -> None:
        question = chance.choice(self._questions)
        question.check(question.text(self.http.post(question.path, json=question.body)))

    def stream(self, chance: random.Random) -> None:
        question = chance.choice(self._questions)
        with self.http.stream("POST", question.path, json={**question.body, "stream": True}) as answer:
            question.check(question.streamed(answer))

    def go(self, chance: random.Random) -> None:
        with self.http.stream("POST", "/v1/completions", json={**GOING, "stream": True}) as answer:
            for _ in zip(range(chance.randrange(6)), answer.iter_lines(), strict=False):
                pass

    def go_whole(self, chance: random.Random) -> None:
        try:
            self.http.post("/v1/completions", json=GOING, timeout=chance.uniform(0.01, 0.3))
        except httpx.TimeoutException:
            return

    def confuse(self, chance: random.Random) -> None:
        chance.choice(self._wrong).send(self.http)


def soak(options: Options) -> Outcome:
    """Run a server, put it under load, and say what came of it."""
    outcome = Outcome()
    with _server(options) as server:
        outcome.memory["at the start"] = server.memory()
        began = time.monotonic()
        with httpx.Client(base_url=server.url, timeout=600) as client:
            limit = client.get("/v1/models/model").json()["max_model_len"]
            tokenizer = AutoTokenizer.from_pretrained(options.folder)
            asked = questions(tokenizer, limit, random.Random(options.seed))
            for question in asked:
                question.ask_alone(client)
        with _load(server.url, asked, malformed(limit), outcome, options):
            _until(began + 15 * options.minutes, outcome)
            outcome.memory["after the warm-up"] = server.memory()
            _until(began + 60 * options.minutes, outcome)
        outcome.held = server.held()
        outcome.memory["at the end"] = server.memory()
    return outcome


@contextmanager
def _server(options: Options) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.folder, options.max_batch, Path(folder) / "server.log")
        try:
            server.wait()
            yield server
        finally:
            server.stop()


@contextmanager
def _load(url: str, asked: Sequence[Question], wrong: Sequence[Malformed], outcome: Outcome, options: Options) -> Any:
    end = threading.Event()
    threads = []
    for number in range(options.clients):
        client, chance = Client(url, asked, wrong, outcome), random.Random(options.seed + 1 + number)
        threads.append(threading.Thread(target=client.work, args=(end, chance)))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        end.set()
        for thread in threads:
            thread.join()


def _until(end: float, outcome: Outcome) -> None:
    """Wait until then, and until a request of each kind has ended since; not for ever, if all of a kind are lost."""
    before, last = Counter(outcome.counts), end + 600
    while time.monotonic() < end or any(outcome.counts[kind] == before[kind] for kind in KINDS):
        if time.monotonic() > last:
            outcome.faults.append(f"No request of some kind ended for ten minutes. Got {dict(outcome.counts)}.")
            return
        time.sleep(0.1)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--folder", *arguments]
    options = parse_arguments(Options, arguments, description=__doc__)
    outcome = soak(options)
    sys.stdout.write(f"{outcome.report()}\n")
    if outcome.faults or any(outcome.held.values()) or outcome.growth > options.slack_mib * MIB:
        sys.exit(1)


if __name__ == "__main__":
    main()
