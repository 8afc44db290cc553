"""A few rows of tokens from a large collection of documents, of which no more is tokenised than they need."""

import bisect
import itertools
from collections.abc import Sequence

import torch

from hf_rfa.data.documents import Document, token_ids
from hf_rfa.errors import ConfigError

#: Characters that are tokenised at once, for each token that is still missing: more than most texts have per token.
CHARACTERS_PER_TOKEN = 6
#: A row begins behind the next white space, if there is one so near: with a whole word.
LONGEST_WORD = 100
#: The last tokens of a piece may not be those of the whole text.
UNSURE_TOKENS = 16


def sampled_rows(tokenizer, documents: Sequence[Document], context: int, rows: int, seed: int) -> torch.Tensor:
    """Rows that begin at random places of the documents, determined by `seed`: a character is as likely as any other.

    Where a document ends the next one goes on, behind the last one the first. Every document, and every row, begins
    with the tokenizer's bos token, if it has one, as the contexts of the model's users do.

    Returns:
        LongTensor (rows, context).

    Raises:
        ConfigError: The documents hold fewer than `context` tokens together.

    Example:
        >>> from transformers import AutoTokenizer
        >>> from hf_rfa.data import Document
        >>> from hf_rfa.evaluation.compare import default_model
        >>> tokenizer = AutoTokenizer.from_pretrained(default_model())
        >>> sampled_rows(tokenizer, [Document("a", "import re\\n" * 50)], context=20, rows=3, seed=0).shape
        torch.Size([3, 20])
    """
    documents = [document for document in documents if document.text]
    if not documents:
        raise ConfigError("The documents hold no text. Pass some.")
    ends = list(itertools.accumulate(len(document.text) for document in documents))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(rows):
        place = int(torch.randint(ends[-1], (), generator=generator))
        number = bisect.bisect_right(ends, place)
        offset = place - (ends[number - 1] if number else 0)
        found.append(_row(tokenizer, documents, number, offset, context))
    return torch.stack(found)


def _row(tokenizer, documents: Sequence[Document], number: int, offset: int, context: int) -> torch.Tensor:
    """The first `context` tokens behind a place of a document."""
    row = torch.empty(0, dtype=torch.long)
    begin = offset + _to_next_word(documents[number].text[offset : offset + LONGEST_WORD]) if offset else 0
    for step in range(len(documents) + 1):
        document = documents[(number + step) % len(documents)]
        # What was passed over at the beginning is the end of what the last document has left.
        text = document.text[:begin] if step == len(documents) else document.text[begin if step == 0 else 0 :]
        if not text:  # nothing of the document is there, nor its bos token
            continue
        row = torch.cat([row, _first_tokens(tokenizer, Document(document.name, text), context - len(row))])
        if len(row) >= context:
            return row
    raise ConfigError(
        f"The documents hold fewer than one sequence of {context} tokens together (behind one place {len(row)}). Use "
        f"a context of at most {max(1, len(row))}, or more text."
    )


def _first_tokens(tokenizer, document: Document, wanted: int) -> torch.Tensor:
    """At most `wanted` tokens; a longer piece of the text is tokenised until there are enough."""
    characters = CHARACTERS_PER_TOKEN * (wanted + UNSURE_TOKENS)
    while True:
        ids = token_ids(tokenizer, Document(document.name, document.text[:characters]))
        if len(ids) >= wanted + UNSURE_TOKENS or characters >= len(document.text):
            return ids[:wanted]
        characters *= 2


def _to_next_word(text: str) -> int:
    """How many characters there are up to the first white space, it included; 0 without any."""
    return next((place + 1 for place, letter in enumerate(text) if letter.isspace()), 0)
