# mypy: disable-error-code="import-untyped,import-not-found"
"""lm-evaluation-harness on a converted folder.

    pip install lm-eval
    python -m hf_rfa.lm_eval my-model-rfa --tasks lambada_openai
    python -m hf_rfa.lm_eval my-model-rfa --tasks my_task --include_path folder-with-the-tasks-yaml --output out.json

The harness's own command line reads a converted folder too (but no conversion without weights, and no LoRA):

    lm_eval --model hf --model_args pretrained=my-model-rfa,trust_remote_code=True --tasks lambada_openai
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_rfa.checkpoint import from_pretrained


def evaluate(
    folder: str,
    tasks: list[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    hub: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Results of the tasks, task -> metric -> value.

    Args:
        folder: a folder or hub id of a model saved by `hf_rfa.save_pretrained`, with its tokenizer.
        include_path: folder with your own task definitions.
        limit: at most this many examples per task.
        hub: `revision`, `subfolder`, `cache_dir`, `token`, ... of the model and its tokenizer.

    Raises:
        ImportError: `lm-eval` is not installed.
        CheckpointError: the folder cannot be read.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("lm-evaluation-harness is not installed: `pip install lm-eval`.") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hub = dict(hub or {})
    model = from_pretrained(folder, **hub).to(device)
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder, **hub), batch_size=batch_size)
    manager = TaskManager(include_path=include_path)
    found = simple_evaluate(model=harness, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    return found["results"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a converted folder")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--include_path")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    for name in ("revision", "subfolder", "cache_dir"):
        parser.add_argument(f"--{name}", help="of the model and its tokenizer, as in `from_pretrained`")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that lies beside the weights")
    given = parser.parse_args()
    places = {name: getattr(given, name) for name in ("revision", "subfolder", "cache_dir", "trust_remote_code")}
    results = evaluate(
        given.folder, given.tasks, include_path=given.include_path, limit=given.limit, batch_size=given.batch_size,
        hub={name: value for name, value in places.items() if value},
    )  # fmt: skip
    text = json.dumps(results, indent=1, default=str)
    print(text)
    if given.output:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
