"""Write the prompts that converted models and their peers are asked, as token ids.

    python scripts/benchmarks/peers/prompts.py --model MODEL --data DATA --output prompts.json
        [--tasks needle_single needle_multikey] [--task_lengths 4096 8192] [--task_documents 5]
        [--continuations 4] [--continuation_lengths 4096 8192]

The file holds the documents and questions of the tasks, and held-out documents with their continuations for the
divergence. Texts are the validation split's; `texts`, for peers that look at some first, are of the training split.
"""

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_rfa.command_line import parse_arguments
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.results import source_name
from hf_rfa.evaluation.tasks import TASKS, TaskSettings, make_documents
from hf_rfa.options import Settings, option, part

#: Documents begin this far behind the start of a text, past prefaces and tables of contents.
SKIPPED_TOKENS, SKIPPED_CHARACTERS = 8000, 30_000
#: Characters of each of the texts that a peer may look at first.
TEXT_CHARACTERS = 4000


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    model: str = option("Folder or hub id, for its tokenizer.")
    data: str = option(SOURCE_HELP)
    output: Path = option("File of the prompts, JSON.")
    task_settings: TaskSettings = part(TaskSettings(tasks=tuple(TASKS), task_lengths=(4096, 8192)), group="Tasks")
    continuations: int = option("Held-out documents of each length with a continuation.", 4, least=0)
    continuation_lengths: tuple[int, ...] = option("Lengths of document and continuation together.", (4096, 8192))
    continuation_tokens: int = option("Tokens of the continuation.", 256, least=1)
    texts: int = option("Texts of the training split for peers that look at some first.", 4, least=0)


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    held_out = load_documents(options.data, "validation")
    filler = "\n\n".join(document.text[SKIPPED_CHARACTERS:] for document in held_out)
    documents = make_documents(options.task_settings, tokenizer, filler)
    train = load_documents(options.data, "train", max_documents=max(options.texts, 1))
    written = {
        "settings": options.to_dict() | {name: source_name(getattr(options, name)) for name in ("model", "data")},
        "documents": [
            {"task": task, **dataclasses.asdict(each)} for (task, _), made in documents.items() for each in made
        ],
        "continuations": continuations(tokenize_documents(tokenizer, held_out)[0], options),
        "texts": [document.text[SKIPPED_CHARACTERS : SKIPPED_CHARACTERS + TEXT_CHARACTERS] for document in train][
            : options.texts
        ],
    }
    del written["settings"]["output"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(written), encoding="utf-8")


def continuations(texts: list[torch.Tensor], options: Options) -> list[dict[str, Any]]:
    """Documents with their continuations, from the texts in turn and spread evenly over each."""
    found = []
    for length in options.continuation_lengths:
        for number in range(options.continuations):
            text, turn = texts[number % len(texts)], number // len(texts)
            last, turns = len(text) - length, -(-options.continuations // len(texts))
            if last < 0:
                raise ConfigError(f"A text has {len(text)} tokens. Got a length of {length}. Lower it.")
            first = min(SKIPPED_TOKENS, last)
            place = first + (last - first) * turn // turns
            ids = text[place : place + length].tolist()
            end = length - options.continuation_tokens
            found.append({"length": length, "ids": ids[:end], "continuation": ids[end:]})
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
