"""A server under load: the original and the converted model in one run, one after the other for each load.

    python scripts/benchmark_serving.py --model FOLDER                          converts it first, calibrated
    python scripts/benchmark_serving.py --model FOLDER --converted RFA_FOLDER   or takes what is there
    python scripts/benchmark_serving.py --model FOLDER --prompts 2048,8000 --concurrent 1,8,32 --output figures
    python scripts/benchmark_serving.py --clock cpu --prompts 512 --concurrent 1,4 --new-tokens 16    small

A long run can be made of parts: with the same `--output` and settings, each adds its loads to the figures there, which
are written after every row.

Both models run in the engine of `hf-rfa serve`, behind HTTP, in this process; as many clients as `--concurrent` says
each send one prompt at the same moment, of random tokens, and stream the answer, greedily and without an end of the
text before `--new-tokens`. The original has Transformers' `DynamicCache`. Figures of one row:

- seconds: from the first request to the last answer's end, prompts included; the median of `--repeats` runs in turn
- prompt tokens/s, tokens/s: tokens of all prompts, and generated tokens of all requests / seconds
- per token, all together: seconds of a step that gives every request one token, from the last request's first token
  until the first request's end; empty where they never were all in the batch (more `--new-tokens`, or more
  `--prefill-tokens`, which are the tokens of prompts that are read before the others get their next token)
- first token, wall: seconds on the wall until a request's first token, the mean
- KiB a sequence: of the cache after the prompt

On a machine that others use too, `--clock cpu` counts the processor time of the process. Loads whose cache would
take more than `--limit-gib` are left out; a batch is copied when it is joined, so that twice as much is needed.
"""

import concurrent.futures
import copy
import dataclasses
import json
import platform
import shlex
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import torch
import transformers
import uvicorn
from benchmarks.serving_figures import Figures
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.options import Settings, option, part
from hf_rfa.serving.model import ServedModel
from hf_rfa.serving.server import app_for
from hf_rfa.serving.settings import ServeSettings

ORIGINAL, CONVERTED, NAME = "original", "converted", "model"


@dataclass(frozen=True)
class Options(Settings):
    model: str = option("Folder or hub id of the original, with its tokenizer.")
    converted: str | None = option("Folder of its conversion; by default it is converted here.", None)
    conversion: hf_rfa.RFAConfig = part(
        hf_rfa.RFAConfig(softmax_heads=0.25, kept_keys=128),
        only=("feature_map", "num_features", "window", "sink_tokens", "kept_keys", "softmax_heads"),
        group="Conversion",
    )
    calibrate: bool = option("Fit the conversion on a text that the model writes itself; the time is the same.", True)
    prompts: tuple[int, ...] = option("Tokens of the prompts.", (2048, 8000))
    concurrent: tuple[int, ...] = option("Requests at the same time.", (1, 8, 32))
    new_tokens: int = option("Tokens of each answer.", 64, least=2)
    prefill_tokens: int = option("See `hf-rfa serve`.", 512, least=1)
    repeats: int = option("Runs of each load; the median counts.", 1, least=1)
    clock: Literal["wall", "cpu"] = option("'wall', or 'cpu': of this process, all threads together.", "wall")
    limit_gib: float = option("Largest cache of a batch.", 8.0, above=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("Of the weights.", "auto")
    device: str = option("'cpu' or 'cuda'.", "cpu")
    threads: int = option("CPU threads.", 1, least=1)
    output: str | None = option("Folder for serving.json and serving.md.", None)


@dataclass(frozen=True)
class Run:
    """One load, once; seconds."""

    seconds: float
    together: float | None
    first_token: float


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse_arguments(Options, arguments, description=__doc__)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.eos_token = None  # an answer ends at its length
    command = shlex.join(["python", "scripts/benchmark_serving.py", *arguments])
    figures = Figures(None if options.output is None else Path(options.output), measured_with(options), command)
    models = load(options)
    print(figures.head(), flush=True)
    sizes = {name: {n: bytes_after(model, n) for n in options.prompts} for name, model in models.items()}
    with (
        serving(models[ORIGINAL], tokenizer, options) as first,
        serving(models[CONVERTED], tokenizer, options) as second,
    ):
        ports = {ORIGINAL: first, CONVERTED: second}
        for prompt in options.prompts:
            for clients in options.concurrent:
                for row in measure(ports, sizes, prompt, clients, models[ORIGINAL].config.vocab_size, options):
                    figures.add(row)


def measured_with(options: Options) -> dict[str, Any]:
    """What rows must have in common to stand in one table."""
    loads = ("prompts", "concurrent", "output", "limit_gib")
    chosen = {key: value for key, value in options.to_dict().items() if key not in loads}
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__,
               "Transformers": transformers.__version__}  # fmt: skip
    return json.loads(json.dumps(chosen | machine))


def load(options: Options) -> dict[str, Any]:
    """The original and the converted model; neither ends a text by itself."""
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype).eval()
    if options.converted is not None:
        converted = hf_rfa.from_pretrained(options.converted, dtype=options.dtype).eval()
    else:
        converted = copy.deepcopy(original)
        hf_rfa.convert(converted, options.conversion, calibrate=options.calibrate)
    models = {ORIGINAL: original, CONVERTED: converted}
    for model in models.values():
        model.to(options.device)
        model.generation_config.eos_token_id = None
    return models


@torch.inference_mode()
def bytes_after(model: Any, length: int) -> int:
    """Bytes of the cache of one sequence after a prompt of so many tokens."""
    served = ServedModel(model)
    cache = served.new_cache()
    for start in range(0, length, 512):
        served.prefill(cache, [5] * min(512, length - start), start)
    return hf_rfa.cache_bytes(cache)


@contextmanager
def serving(model: Any, tokenizer: Any, options: Options) -> Iterator[int]:
    """A server of the model in a thread; its port."""
    settings = ServeSettings(
        folder=NAME, max_batch=max(options.concurrent), max_waiting=0, prefill_tokens=options.prefill_tokens
    )
    server = uvicorn.Server(uvicorn.Config(app_for(model, tokenizer, settings), log_level="warning"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.05)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def measure(
    ports: Mapping[str, int], sizes: Mapping[str, Mapping[int, int]], prompt: int, clients: int, vocabulary: int,
    options: Options,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row for each model."""
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    generator = torch.Generator().manual_seed(prompt + clients)
    prompts = torch.randint(10, vocabulary, (clients, prompt), generator=generator).tolist()
    fits = {name: sizes[name][prompt] * clients <= options.limit_gib * 2**30 for name in ports}
    runs: dict[str, list[Run]] = {name: [] for name in ports}
    for _ in range(options.repeats):
        for name, port in ports.items():
            if fits[name]:
                runs[name].append(run(port, prompts, options.new_tokens, clock))
    for name in ports:
        row: dict[str, Any] = {"prompt": prompt, "requests": clients, "model": name, "bytes": sizes[name][prompt]}
        if fits[name]:
            row |= dataclasses.asdict(sorted(runs[name], key=lambda each: each.seconds)[(len(runs[name]) - 1) // 2])
            row["prompt_tokens_per_second"] = clients * prompt / row["seconds"]
            row["tokens_per_second"] = clients * options.new_tokens / row["seconds"]
        yield row


def run(port: int, prompts: Sequence[Sequence[int]], new_tokens: int, clock: Callable[[], float]) -> Run:
    """All prompts at once."""
    barrier = threading.Barrier(len(prompts) + 1)

    def client(prompt: Sequence[int]) -> tuple[float, list[float]]:
        """Seconds on the wall until the first token, and the clock's time at each."""
        body = {"model": NAME, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
        barrier.wait()
        began, first, times, end = time.perf_counter(), 0.0, [], None
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=None) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    first = first or time.perf_counter() - began
                    times.append(clock())
                    end = json.loads(line.removeprefix("data: "))["choices"][0]["finish_reason"]
        assert end == "length", end
        return first, times

    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        futures = [pool.submit(client, prompt) for prompt in prompts]
        began = clock()
        barrier.wait()
        found = [future.result() for future in futures]
        seconds = clock() - began
    return Run(seconds, together([times for _, times in found]), statistics.mean(first for first, _ in found))


def together(times: Sequence[Sequence[float]]) -> float | None:
    """Seconds of a step while all requests were in the batch; `times` at which the pieces of each answer came.

    A piece is a token or, where its bytes are no whole character yet, several: so the pieces of all are counted.
    """
    first, last = max(own[0] for own in times), min(own[-1] for own in times)
    steps = max(sum(first < each <= last for each in own) for own in times)
    return (last - first) / steps if steps >= 2 else None


if __name__ == "__main__":
    main()
