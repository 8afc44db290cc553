"""Answer the prompts of prompts.py by an original and its conversions.

    python scripts/benchmarks/peers/ours.py --prompts prompts.json --original MODEL --output ours.json
        [--models "ours at 25 %=FOLDER" "ours at 10 %=FOLDER"] [--original_answers false] [--device cuda]

Each column has the bytes of its cache after each document, the divergence of its continuations from the original, and
its greedy answers. The original itself is the first column, unless `--original_answers false` leaves it out:
kvpress_answers.py has the same one, as *full cache*.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import hf_rfa
from hf_rfa.checkpoint import load_any
from hf_rfa.command_line import parse_arguments
from hf_rfa.evaluation.continuation import divergence, logits_behind
from hf_rfa.evaluation.tasks.asking import greedy_answers
from hf_rfa.evaluation.tasks.prompts import Question, TaskDocument
from hf_rfa.options import Settings, option
from hf_rfa.runtime.devices import DEVICE_HELP, chosen_device


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    prompts: Path = option("File that prompts.py wrote.")
    original: str = option("Folder or hub id of the original.")
    output: Path = option("File of the answers, JSON.")
    models: tuple[str, ...] = option("Converted models, each NAME=FOLDER.", ())
    original_answers: bool = option("Whether the original answers the tasks, too.", True)
    device: str = option(DEVICE_HELP, "auto")
    backend: str = option("Form of the linear heads: auto, triton or chunked.", "auto")


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
    device = str(chosen_device(options.device))
    original = load_any(options.original, dtype=torch.float32).to(device)
    behind = [read(original, each) for each in prompts["continuations"]]
    columns = {"original": answered(original, prompts, behind)} if options.original_answers else {}
    for text in options.models:
        name, _, folder = text.partition("=")
        model = load_any(folder, dtype=torch.float32).to(device)
        hf_rfa.set_backend(model, options.backend)
        columns[name] = answered(model, prompts, behind)
    environment = {"torch": torch.__version__, "transformers": transformers.__version__, "device": device}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "columns": columns}), encoding="utf-8")


def read(model: PreTrainedModel, given: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Logits of a continuation, and the bytes of the cache after its document."""
    return logits_behind(model, torch.tensor(given["ids"]), torch.tensor(given["continuation"]))


def answered(
    model: PreTrainedModel, prompts: dict[str, Any], original: list[tuple[torch.Tensor, int]]
) -> dict[str, Any]:
    """One column; `share` is that of the original's bytes after the documents of the continuations."""
    started = time.process_time()
    shares, divergences = [], []
    for given, (logits, size) in zip(prompts["continuations"], original, strict=True):
        own_logits, own_size = read(model, given)
        shares.append(own_size / size)
        divergences.append(divergence(logits, own_logits))
    answers = [greedy_answers(model, task_document(each)) for each in prompts["documents"]]
    return {
        "share": sum(shares) / len(shares) if shares else None,
        "kl": divergences,
        "answers": answers,
        "cpu_seconds": time.process_time() - started,
    }


def task_document(given: dict[str, Any]) -> TaskDocument:
    """A document as prompts.py wrote it."""
    questions = (
        Question(
            each["task"], tuple(each["ids"]), tuple(each["answers"]), each["new_tokens"], each["depth"],
            tuple(map(tuple, each["spans"])),
        )
        for each in given["questions"]
    )  # fmt: skip
    return TaskDocument(given["length"], tuple(given["ids"]), tuple(questions))


if __name__ == "__main__":
    main(sys.argv[1:])
