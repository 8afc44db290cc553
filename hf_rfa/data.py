"""From text to batches: documents, their tokens, and the sequences used for training, calibration and evaluation.

documents = load_documents("stdlib", "train")
token_lists, num_bytes = tokenize_documents(tokenizer, documents)
batches = training_batches(token_lists, context=2048, batch_size=4, seed=0, repeat_probability=0.5)
input_ids = next(batches)  # LongTensor (4, 2048)
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_rfa.errors import ConfigError
from hf_rfa.stdlib_corpus import stdlib_documents

SPLITS = ("train", "validation")
SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
HELD_OUT_SHARE = 0.1

REPEAT_SPAN = (32, 256)  # tokens, shortest and longest planted repeat
REPEAT_MIN_GAP = 64  # tokens between a span's end and its repeat: beyond the usual exact window
_MIN_REPEAT_CONTEXT = 2 * REPEAT_SPAN[0] + REPEAT_MIN_GAP


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    name: str
    text: str


def load_documents(
    source: str | Path,
    split: str,
    *,
    text_column: str = "text",
    max_documents: int | None = None,
    streaming: bool = True,
) -> list[Document]:
    """Documents of one split of a source. The same call gives the same documents in the same order.

    What `source` may be:

    - `"stdlib"`: the standard library of the running Python, with fixed held-out modules (`hf_rfa.stdlib_corpus`).
    - a `.txt`, `.md` or `.py` file (one document), a `.jsonl` or `.parquet` file (one document a row), or a folder
      of such files, searched recursively and taken in sorted order. Files `validation.*` or below `validation/`
      directly in the folder are the validation split. Without them the last 10 % of the documents (at least one)
      are held out, and of a single document its last 10 %.
    - anything else: a dataset of the Hugging Face Hub, `"owner/name"` or `"owner/name:config"`. Where it has no
      split named "validation", every tenth row of "train" is held out.

    Documents of nothing but white space are left out.

    Args:
        source: see above.
        split: "train" or "validation".
        text_column: column of the text in `.jsonl`, `.parquet` and hub datasets.
        max_documents: take only the first so many documents of the split.
        streaming: read a hub dataset as it arrives instead of downloading all of it first.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without a readable file.
        ConfigError: an unknown split or file type, a missing text column, no text, `max_documents` below 1.
        ConnectionError: the hub could not be reached, or has no such dataset.
        ImportError: a `.parquet` file or hub dataset without the `datasets` package.
    """
    if split not in SPLITS:
        raise ConfigError(f"`split` must be one of {', '.join(SPLITS)}. Got {split!r}.")
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"`max_documents` must be at least 1. Got {max_documents}. Leave it out to take all.")
    if str(source) == "stdlib":
        documents: Iterable[Document] = itertools.starmap(Document, stdlib_documents(split))
    elif Path(source).exists():
        documents = _local_documents(Path(source), split, text_column)
    elif _looks_like_path(source):
        raise FileNotFoundError(
            f"No file or folder at {str(source)!r}. Pass an existing path, 'stdlib', or a dataset id such as "
            "'owner/name'."
        )
    else:
        documents = _hub_documents(str(source), split, text_column, streaming)
    taken = list(itertools.islice(documents, max_documents))
    if not taken:
        raise ConfigError(
            f"The {split} split of {str(source)!r} has no text: every document is empty. Check the source."
        )
    return taken


def _looks_like_path(source: str | Path) -> bool:
    text = str(source)
    return (
        isinstance(source, Path) or text.count("/") > 1 or text.startswith((".", "/", "~")) or text.endswith(SUFFIXES)
    )


def _local_documents(path: Path, split: str, text_column: str) -> list[Document]:
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ConfigError(
                f"Cannot read {str(path)!r} as text. Got {path.suffix!r}, supported: {', '.join(SUFFIXES)}."
            )
        files, root = [path], path.parent
    else:
        files, root = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()), path
        if not files:
            raise FileNotFoundError(f"The folder {str(path)!r} has no file ending in {', '.join(SUFFIXES)}.")
    apart = [file for file in files if Path(file.relative_to(root).parts[0]).stem == "validation"]
    if apart and len(apart) < len(files):
        files = apart if split == "validation" else [file for file in files if file not in apart]
        return _read_files(files, root, text_column)
    return _hold_out(_read_files(files, root, text_column), split)


def _read_files(files: Iterable[Path], root: Path, text_column: str) -> list[Document]:
    documents: list[Document] = []
    for file in files:
        name = file.relative_to(root).as_posix()
        if file.suffix == ".jsonl":
            documents += _rows_to_documents(_jsonl_rows(file), name, text_column)
        elif file.suffix == ".parquet":
            # Streaming leaves no copy in the datasets cache.
            rows = _datasets().load_dataset("parquet", data_files=str(file), split="train", streaming=True)
            documents += _rows_to_documents(rows, name, text_column)
        else:
            documents.append(Document(name, file.read_text("utf-8", "replace")))
    return [document for document in documents if document.text.strip()]


def _datasets():
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Parquet and hub datasets need `datasets`: `pip install 'hf_rfa[train]'`.") from error
    return datasets


def _jsonl_rows(file: Path) -> Iterator[dict]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"{file.name}, line {number} must be one JSON object. It is not: {error}."
                ) from error
            if not isinstance(row, dict):
                raise ConfigError(f"{file.name}, line {number} must be one JSON object. Got {line[:60]!r}.")
            yield row


def _rows_to_documents(rows: Iterable[dict], name: str, text_column: str) -> Iterator[Document]:
    for number, row in enumerate(rows):
        if text_column not in row:
            raise ConfigError(
                f"{name} has no column {text_column!r}. Its columns are {', '.join(map(repr, row))}. "
                "Set `text_column` to one of them."
            )
        if not isinstance(row[text_column], str):
            raise ConfigError(
                f"Column {text_column!r} of {name}, row {number} must be text. Got {type(row[text_column]).__name__}."
            )
        yield Document(f"{name}:{number}", row[text_column])


def _hold_out(documents: list[Document], split: str) -> list[Document]:
    """Last tenth of the documents for validation, or of the text where there is a single one."""
    if len(documents) == 1:
        text = documents[0].text
        cut = len(text) - max(1, round(HELD_OUT_SHARE * len(text)))
        text = text[:cut] if split == "train" else text[cut:]
        return [Document(documents[0].name, text)] if text.strip() else []
    cut = len(documents) - max(1, round(HELD_OUT_SHARE * len(documents)))
    return documents[:cut] if split == "train" else documents[cut:]


def _hub_documents(source: str, split: str, text_column: str, streaming: bool) -> Iterator[Document]:
    name, _, config = source.partition(":")
    try:
        splits = _datasets().load_dataset(name, config or None, streaming=streaming)
    except OSError as error:  # what `datasets` raises for no network, offline mode and an unknown dataset
        raise ConnectionError(
            f"Could not load the dataset {name!r} from the Hugging Face Hub: {error}. Check its name and the network, "
            "or pass a local folder, a .jsonl or .parquet file, or 'stdlib', which need neither."
        ) from error
    if "train" not in splits and split not in splits:
        raise ConfigError(f"The dataset {name!r} has no split {split!r}. Its splits are {', '.join(splits)}.")
    rows = splits[split if split in splits else "train"]
    documents = _rows_to_documents(rows, name, text_column)
    if "validation" not in splits:
        documents = (doc for i, doc in enumerate(documents) if (i % 10 == 9) == (split == "validation"))
    return (document for document in documents if document.text.strip())


def tokenize_documents(tokenizer, documents: Iterable[Document]) -> tuple[list[torch.Tensor], list[int]]:
    """Token ids of each document, and its size for bits per byte.

    Args:
        tokenizer: a tokenizer of Transformers. Where it has a bos token, every document starts with it; no other
            special token is added.

    Returns:
        token_lists: one LongTensor (num_tokens,) per document.
        num_bytes: size of each document in UTF-8 bytes. With a mean loss of `nll` nats/token over all n tokens,
            bits per byte are `nll * n / (ln(2) * num_bytes)`.
    """
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    token_lists, num_bytes = [], []
    for document in documents:
        # `verbose=False`: a document longer than the model's context is the point here, not a mistake.
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        token_lists.append(torch.tensor(prefix + ids, dtype=torch.long))
        num_bytes.append(len(document.text.encode("utf-8", "replace")))
    return token_lists, num_bytes


def evaluation_windows(
    token_lists: Sequence[torch.Tensor], context: int, max_windows: int | None = None
) -> torch.Tensor:
    """Consecutive windows of `context` tokens, each inside one document, so that all of its context is related.

    With `max_windows` the windows are taken evenly spaced from all documents.

    Returns:
        LongTensor (num_windows, context).

    Raises:
        ConfigError: no document reaches `context` tokens.
    """
    windows = [ids[i : i + context] for ids in token_lists for i in range(0, len(ids) - context + 1, context)]
    if not windows:
        longest = max((len(ids) for ids in token_lists), default=0)
        raise ConfigError(
            f"No document reaches the context of {context} tokens: the longest has {longest}. Use a context of at "
            f"most {longest}, or longer documents."
        )
    if max_windows is not None and max_windows < len(windows):
        windows = [windows[i * len(windows) // max_windows] for i in range(max_windows)]
    return torch.stack(windows)


def training_batches(
    token_lists: Sequence[torch.Tensor], context: int, batch_size: int, seed: int, repeat_probability: float = 0.0
) -> Iterator[torch.Tensor]:
    """Endless batches from random positions of the documents, one after the other; the same seed, the same batches.

    With probability `repeat_probability` a sequence gets one to four planted repeats: an earlier span of
    `REPEAT_SPAN` tokens (at most a quarter of the context) is pasted over the text at a random later place, at least
    `REPEAT_MIN_GAP` tokens after its end. Only a model that retrieves from beyond the window predicts these.

    Yields:
        LongTensor (batch_size, context).

    Raises:
        ConfigError: `context` or `batch_size` below 1, fewer than `context` tokens in all documents together, a
            `repeat_probability` outside [0, 1], or a context too short to plant a repeat in.
    """
    if context < 1 or batch_size < 1:
        raise ConfigError(f"`context` and `batch_size` must be at least 1. Got {context} and {batch_size}.")
    if not 0.0 <= repeat_probability <= 1.0:
        raise ConfigError(f"`repeat_probability` must be in [0, 1]. Got {repeat_probability}.")
    if repeat_probability and context < _MIN_REPEAT_CONTEXT:
        raise ConfigError(
            f"A context of {context} tokens has no room for a repeat beyond {REPEAT_MIN_GAP} tokens. Use a context of "
            f"at least {_MIN_REPEAT_CONTEXT}, or set `repeat_probability=0`."
        )
    total = sum(len(ids) for ids in token_lists)
    if total < context:
        raise ConfigError(
            f"The documents hold {total} tokens together, fewer than one sequence of {context}. Use a context of at "
            f"most {total}, or more text."
        )
    # Checks run at the call, not at the first `next`, which is why the generator is a function of its own.
    return _draw_batches(torch.cat(list(token_lists)), context, batch_size, seed, repeat_probability)


def _draw_batches(
    ids: torch.Tensor, context: int, batch_size: int, seed: int, repeat_probability: float
) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def randint(low: int, high: int) -> int:  # both ends included
        return int(torch.randint(low, high + 1, (), generator=generator))

    while True:
        starts = torch.randint(len(ids) - context + 1, (batch_size,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + context] for start in starts])
        planted = torch.rand(batch_size, generator=generator) < repeat_probability
        for sequence in (batch[i] for i in planted.nonzero()[:, 0].tolist()):
            for _ in range(randint(1, 4)):
                longest = min(REPEAT_SPAN[1], max(REPEAT_SPAN[0], context // 4))
                span = randint(REPEAT_SPAN[0], min(longest, (context - REPEAT_MIN_GAP) // 2))
                source = randint(0, context - 2 * span - REPEAT_MIN_GAP)
                target = randint(source + span + REPEAT_MIN_GAP, context - span)
                sequence[target : target + span] = sequence[source : source + span].clone()
        yield batch
