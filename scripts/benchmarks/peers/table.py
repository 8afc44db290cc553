"""The table of what ours.py and kvpress_answers.py wrote: bytes, divergence, and scores with their 95 % intervals.

python scripts/benchmarks/peers/table.py --prompts prompts.json --answers ours.json kvpress.json --model MODEL
    --output results/NAME.md
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ours import task_document
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_rfa.command_line import parse_arguments
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.tasks.measuring import Answered, score_cell, scored, task_score
from hf_rfa.options import Settings, option

#: Of fewer continuations no interval is given.
LEAST_FOR_INTERVAL = 8


@dataclass(frozen=True)
class Options(Settings):
    """The options of the command line, or keys of a YAML file."""

    prompts: Path = option("File that prompts.py wrote.")
    answers: tuple[Path, ...] = option("Files that ours.py and kvpress_answers.py wrote.")
    model: str = option("Folder or hub id, for its tokenizer.")
    output: Path = option("File of the table, Markdown.")


def main(arguments: list[str]) -> None:
    options = parse_arguments(Options, arguments, __doc__)
    prompts = json.loads(options.prompts.read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    columns: dict[str, Any] = {}
    for file in options.answers:
        found = json.loads(file.read_text(encoding="utf-8"))["columns"]
        twice = sorted(set(found) & set(columns))
        if twice:
            raise ConfigError(f"Columns must have different names. Got {twice} twice. Rename them.")
        columns |= found
    text = "\n".join(lines(prompts, columns, tokenizer)) + "\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    print(text)


def lines(prompts: dict[str, Any], columns: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One row per column; a dash where a peer cannot keep so little, or nothing was asked."""
    kinds = list(dict.fromkeys((each["task"], each["length"]) for each in prompts["documents"]))
    lengths = list(dict.fromkeys(each["length"] for each in prompts["continuations"]))
    counts = {kind: sum(len(d["questions"]) for d in of_kind(prompts, kind)) for kind in kinds}
    header = ["", "share of the KV bytes", *(f"KL at {n}, nats/token" for n in lengths)]
    header += [f"{task}, {length} ({counts[task, length]} questions)" for task, length in kinds]
    rows = [header]
    for name, column in columns.items():
        cells = [name, "—" if column["share"] is None else f"{column['share']:.3f}"]
        cells += [
            mean(kl for kl, each in pairs(column["kl"], prompts["continuations"]) if each["length"] == n)
            for n in lengths
        ]
        cells += [task_cell(prompts, column["answers"], kind, tokenizer) for kind in kinds]
        rows.append(cells)
    table = ["| " + " | ".join(row) + " |" for row in rows]
    return [table[0], "|---" + "|---:" * (len(header) - 1) + "|", *table[1:]]


def pairs(values: Sequence[Any], given: Sequence[dict[str, Any]]) -> list[tuple[Any, dict[str, Any]]]:
    return list(zip(values, given, strict=True))


def of_kind(prompts: dict[str, Any], kind: tuple[str, int]) -> list[dict[str, Any]]:
    return [each for each in prompts["documents"] if (each["task"], each["length"]) == kind]


def mean(values: Any) -> str:
    """The mean, with half its 95 % interval (normal) where there are enough values to tell."""
    given = list(values)
    if not given or None in given:
        return "—"
    found = f"{statistics.fmean(given):.4f}"
    if len(given) < LEAST_FOR_INTERVAL:
        return found
    return f"{found} ± {1.96 * statistics.stdev(given) / len(given) ** 0.5:.4f}"


def task_cell(
    prompts: dict[str, Any], answers: Sequence[Any], kind: tuple[str, int], tokenizer: PreTrainedTokenizerBase
) -> str:
    found: list[Answered] = []
    for answer, each in pairs(answers, prompts["documents"]):
        if (each["task"], each["length"]) == kind:
            if answer is None:
                return "—"
            found += scored(task_document(each), answer, tokenizer)
    return score_cell(task_score(*kind, found))


if __name__ == "__main__":
    main(sys.argv[1:])
