"""Answer the prompts of prompts.py by an original and its conversions.

    python scripts/benchmarks/peers/ours.py --prompts prompts.json --original MODEL --output ours.json
        [--models "ours at 25 %=FOLDER" "ours at 10 %=FOLDER"]

Each column has the bytes of its cache after each document, the divergence of its continuations from the original, and
its greedy answers. The original itself is the first column.
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

from hf_rfa.checkpoint import load_any
from hf_rfa.command_line import parse_arguments
from hf_rfa.evaluation.continuation import continuation_kl
from hf_rfa.evaluation.equal_bytes import bytes_after
from hf_rfa.evaluation.tasks.asking import greedy_answers
from hf_rfa.evaluation.tasks.prompts import Question, TaskDocument
from hf_rfa.options import Settings, option


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    prompts: Path = option("File that prompts.py wrote.")
    original: str = option("Folder or hub id of the original.")
    output: Path = option("File of the answers, JSON.")
    models: tuple[str, ...] = option("Converted models, each NAME=FOLDER.", ())


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
    original = load_any(options.original, dtype=torch.float32)
    full = [full_bytes(original, each) for each in prompts["continuations"]]
    columns = {}
    for text in (f"original={options.original}", *options.models):
        name, _, folder = text.partition("=")
        model = original if name == "original" else load_any(folder, dtype=torch.float32)
        columns[name] = answered(original, model, prompts, full)
    environment = {"torch": torch.__version__, "transformers": transformers.__version__}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"environment": environment, "columns": columns}), encoding="utf-8")


def full_bytes(original: PreTrainedModel, given: dict[str, Any]) -> int:
    return bytes_after(original, torch.tensor(given["ids"]))


def answered(
    original: PreTrainedModel, model: PreTrainedModel, prompts: dict[str, Any], full: list[int]
) -> dict[str, Any]:
    """One column; `shares` are those of the original's bytes after the documents of the continuations."""
    started = time.process_time()
    shares, divergences = [], []
    for given, size in zip(prompts["continuations"], full, strict=True):
        document, continuation = torch.tensor(given["ids"]), torch.tensor(given["continuation"])
        shares.append(bytes_after(model, document) / size)
        same = model is original
        divergences.append(0.0 if same else continuation_kl(original, model, document, continuation))
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
