"""Long documents from local files, the standard library or the Hugging Face Hub, and their tokens.

documents = load_documents("stdlib", "train")                       # a list, in memory
token_lists, num_bytes = tokenize_documents(tokenizer, documents)
stream = TokenStream(tokenizer, "emozilla/pg19", "train")           # read again for each pass, one document at a time

Datasets of the hub that load without scripts: "emozilla/pg19" (books), "ccdv/govreport-summarization" with
`text_column="report"`, "ccdv/arxiv-summarization:document" with `text_column="article"`,
"EleutherAI/wikitext_document_level:wikitext-103-raw-v1" with `text_column="page"` and
"common-pile/project_gutenberg_filtered".
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_rfa.data.rows import ROW_SUFFIXES, Row, datasets_library, rows_of
from hf_rfa.data.stdlib_corpus import stdlib_documents
from hf_rfa.errors import ConfigError
from hf_rfa.text_files import read_text

SPLITS = ("train", "validation")
SUFFIXES = (".txt", ".md", ".py", *ROW_SUFFIXES)
HELD_OUT_SHARE = 0.1

#: The help text of every option that names a source.
SOURCE_HELP = (
    "Long documents: 'stdlib' (the Python standard library, no download), a folder or file of .txt, .md, .py, .jsonl "
    "or .parquet, or the hub id of a dataset. A part is held out for measuring."
)


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

    Sources:

    - `"stdlib"`: the standard library of the running Python, with fixed held-out modules (`stdlib_corpus`).
    - a `.txt`, `.md` or `.py` file (one document), a `.jsonl` or `.parquet` file (one document per row), or a folder
      of such files, searched recursively and taken in sorted order. Files `validation.*` or in a folder
      `validation/`, directly in the folder, are the validation split. Without them the last 10 % of the documents (at
      least one) are held out; of a single document, its last 10 %.
    - anything else: a dataset of the Hugging Face Hub, `"owner/name"` or `"owner/name:config"`. If it has no
      split named "validation", every tenth row of "train" is held out.

    Text files and `.jsonl` are UTF-8, with or without a byte order mark. Documents that are only white space are left
    out.

    Args:
        source: see above.
        split: "train" or "validation".
        text_column: column of the text in `.jsonl`, `.parquet` and hub datasets.
        max_documents: take at most this many documents of the split, the first ones.
        streaming: read a hub dataset as it arrives instead of downloading all of it first.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without a readable file.
        ConfigError: an unknown split or file type, a file that is not UTF-8 or damaged, a missing text column, no
            text, `max_documents` below 1.
        ConnectionError: the hub could not be reached, or has no such dataset.
        ImportError: a `.parquet` file or hub dataset without the `datasets` package.
    """
    _check_split(split, max_documents)
    taken = list(itertools.islice(stream_documents(source, split, text_column, streaming=streaming), max_documents))
    if not taken:
        raise ConfigError(
            f"The {split} split of {str(source)!r} has no text: every document is empty. Check the source."
        )
    return taken


def stream_documents(
    source: str | Path, split: str, text_column: str = "text", *, streaming: bool = True
) -> Iterable[Document]:
    """The documents of `load_documents`, one after the other; only a hub dataset is never held as a whole."""
    _check_split(split, None)
    if str(source) == "stdlib":
        return itertools.starmap(Document, stdlib_documents(split))
    if Path(source).exists():
        return _local_documents(Path(source), split, text_column)
    if _looks_like_path(source):
        raise FileNotFoundError(
            f"No file or folder at {str(source)!r}. Pass an existing path, 'stdlib', or a dataset id such as "
            "'owner/name'."
        )
    return _hub_documents(str(source), split, text_column, streaming)


def _check_split(split: str, max_documents: int | None) -> None:
    if split not in SPLITS:
        raise ConfigError(f"`split` must be one of {', '.join(SPLITS)}. Got {split!r}.")
    if max_documents is not None and max_documents < 1:
        raise ConfigError(f"`max_documents` must be at least 1. Got {max_documents}. Leave it out to take all.")


def _looks_like_path(source: str | Path) -> bool:
    text = str(source)
    return (
        isinstance(source, Path) or text.count("/") > 1 or text.startswith((".", "/", "~")) or text.endswith(SUFFIXES)
    )


def _local_documents(path: Path, split: str, text_column: str) -> list[Document]:
    files, root, apart = local_files(path, split)
    documents = _read_files(files, root, text_column)
    return documents if apart else _hold_out(documents, split)


def local_files(path: Path, split: str, suffixes: Sequence[str] = SUFFIXES) -> tuple[list[Path], Path, bool]:
    """The files of a file or folder, the folder that they are named from, and whether they are of that split alone."""
    if path.is_file():
        if path.suffix not in suffixes:
            raise ConfigError(
                f"Cannot read {str(path)!r} as text. Got {path.suffix!r}, supported: {', '.join(suffixes)}."
            )
        files, root = [path], path.parent
    else:
        files, root = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file()), path
        if not files:
            raise FileNotFoundError(f"The folder {str(path)!r} has no file ending in {', '.join(suffixes)}.")
    apart = [file for file in files if Path(file.relative_to(root).parts[0]).stem == "validation"]
    if apart and len(apart) < len(files):
        return (apart if split == "validation" else [file for file in files if file not in apart]), root, True
    return files, root, False


def _read_files(files: Iterable[Path], root: Path, text_column: str) -> list[Document]:
    documents: list[Document] = []
    for file in files:
        name = file.relative_to(root).as_posix()
        if file.suffix in ROW_SUFFIXES:
            documents += _row_documents(rows_of(file), name, text_column)
        else:
            documents.append(Document(name, read_text(file)))
    return [document for document in documents if document.text.strip()]


def _row_documents(rows: Iterable[Row], name: str, text_column: str) -> Iterator[Document]:
    return (Document(f"{name}:{number}", row.text(text_column)) for number, row in enumerate(rows))


def _hold_out(documents: list[Document], split: str) -> list[Document]:
    """Last tenth of the documents for validation; of a single document, the last tenth of its text."""
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
        splits = datasets_library().load_dataset(name, config or None, streaming=streaming)
    except OSError as error:  # `datasets` raises it without a network, offline and for an unknown dataset
        raise ConnectionError(
            f"Could not load the dataset {name!r} from the Hugging Face Hub: {error}. Check its name and the network, "
            "or pass a local folder, a .jsonl or .parquet file, or 'stdlib', which need neither."
        ) from error
    except (ValueError, RuntimeError) as error:  # no or a wrong configuration; a loading script
        raise ConfigError(
            f"The dataset {name!r} cannot be loaded: {error} Name a configuration as '{name}:CONFIGURATION'. Datasets "
            "with a loading script are gone from `datasets`: use one made of parquet files."
        ) from error
    if "train" not in splits and split not in splits:
        raise ConfigError(f"The dataset {name!r} has no split {split!r}. Its splits are {', '.join(splits)}.")
    rows = splits[split if split in splits else "train"]
    numbered = (Row(f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))
    documents = _row_documents(numbered, name, text_column)
    if "validation" not in splits:
        documents = (doc for i, doc in enumerate(documents) if (i % 10 == 9) == (split == "validation"))
    return (document for document in documents if document.text.strip())


def tokenize_documents(tokenizer, documents: Iterable[Document]) -> tuple[list[torch.Tensor], list[int]]:
    """Token ids of each document, and its size for bits per byte.

    Args:
        tokenizer: a tokenizer of Transformers. If it has a bos token, every document starts with it; no other special
            token is added.

    Returns:
        token_lists: one LongTensor (num_tokens,) per document.
        num_bytes: size of each document in UTF-8 bytes. With a mean loss of `nll` nats/token over all n tokens,
            bits per byte are `nll * n / (ln(2) * num_bytes)`.
    """
    token_lists, num_bytes = [], []
    for document in documents:
        token_lists.append(token_ids(tokenizer, document))
        num_bytes.append(len(document.text.encode("utf-8", "replace")))
    return token_lists, num_bytes


def token_ids(tokenizer, document: Document) -> torch.Tensor:
    """LongTensor (num_tokens,) of one document, after the bos token if the tokenizer has one."""
    prefix = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # `verbose=False`: documents longer than the model's context are wanted here.
    ids = tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(prefix + ids, dtype=torch.long)


class TokenStream:
    """Token ids of each document of a source, tokenised while reading; every iteration starts from the first again.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from hf_rfa.evaluation.compare import default_model
        >>> stream = TokenStream(AutoTokenizer.from_pretrained(default_model()), "stdlib", "validation")
        >>> next(iter(stream)).shape == next(iter(stream)).shape
        True
    """

    def __init__(self, tokenizer, source: str | Path, split: str, text_column: str = "text") -> None:
        self._tokenizer, self._source, self._split, self._column = tokenizer, source, split, text_column

    def __iter__(self) -> Iterator[torch.Tensor]:
        for document in stream_documents(self._source, self._split, self._column):
            yield token_ids(self._tokenizer, document)


def check_tokenizer(tokenizer, model) -> None:
    """Check that the model has an embedding for every id of the tokenizer.

    Raises:
        ConfigError: It does not.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ConfigError(
            f"The tokenizer has {len(tokenizer)} tokens, the model embeddings for {rows}. They do not belong "
            "together: pass the tokenizer of the model, or resize the embeddings."
        )
