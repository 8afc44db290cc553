"""Rows of tokens from random places of documents: those of the whole text, and only as much tokenised as they need."""

import pytest
import torch
from tokenizers_of_tests import byte_tokenizer

from hf_rfa.data import Document, sampled_rows
from hf_rfa.data.documents import token_ids
from hf_rfa.errors import ConfigError

WORDS = [Document("a", " ".join(f"a{n}" for n in range(300))), Document("b", " ".join(f"b{n}" for n in range(100)))]


class Counting:
    """A tokenizer that counts the characters that it reads."""

    def __init__(self, bos=None):
        self.bos_token_id, self.characters = bos, 0

    def __call__(self, text, **_):
        self.characters += len(text)
        return type("Read", (), {"input_ids": [ord(letter) for letter in text]})


def text_of(row, bos=None):
    return "".join(chr(token) for token in row.tolist() if token != bos)


def test_rows_are_pieces_of_the_text_that_begin_with_a_word():
    whole = WORDS[0].text + WORDS[1].text
    rows = [text_of(row) for row in sampled_rows(Counting(), WORDS, 200, 40, seed=0)]
    assert all(row in whole + whole for row in rows)
    assert all(whole.startswith(row) or f" {row}" in whole + whole or row.startswith("b0") for row in rows)
    assert len({row[:20] for row in rows}) > 30
    # Characters are equally likely: a has three quarters of them.
    starts = [row[0] for row in rows]
    assert 20 <= starts.count("a") <= 38


def test_rows_are_a_function_of_the_seed_and_more_of_them_leave_the_first_ones():
    first, again = (sampled_rows(Counting(), WORDS, 50, 4, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(sampled_rows(Counting(), WORDS, 50, 9, seed=3)[:4], first)
    assert not torch.equal(sampled_rows(Counting(), WORDS, 50, 4, seed=4), first)


def test_where_a_document_ends_the_next_one_begins_with_its_bos_token():
    row = sampled_rows(Counting(bos=7), WORDS, 1500, 1, seed=1)[0]
    assert row[0] == 7
    assert (row == 7).sum() in (2, 3)  # its own, the other document's, and perhaps the first one's again
    length = sum(len(document.text) for document in WORDS)
    assert len(text_of(row, bos=7)) <= length


def test_a_text_of_just_so_many_tokens_is_enough_wherever_the_row_begins():
    """What is passed over up to the next word comes at the end."""
    document = Document("one", " ".join(letter * 40 for letter in "abcdef"))
    length = len(document.text)
    rows = sampled_rows(Counting(), [document], length, 20, seed=0)
    assert all(sorted(text_of(row)) == sorted(document.text) for row in rows)
    with pytest.raises(ConfigError, match=f"at most {length},"):
        sampled_rows(Counting(), [document], length + 1, 1, seed=0)


def test_a_document_of_which_nothing_is_left_leaves_no_bos_token():
    """Rows that begin behind the last white space of a document, and those that come back to its first character."""
    rows = sampled_rows(Counting(bos=7), [Document("a", "a\n"), Document("b", "b\n")], 5, 20, seed=0)
    for row in rows.tolist():
        assert row[0] == 7
        assert [7, 7] not in [row[place : place + 2] for place in range(4)]
    (row,) = sampled_rows(Counting(bos=7), [Document("a", "a\n")], 3, 1, seed=0).tolist()
    assert row == [7, ord("a"), ord("\n")]
    with pytest.raises(ConfigError, match="at most 3,"):
        sampled_rows(Counting(bos=7), [Document("a", "a\n")], 4, 1, seed=0)


def test_a_large_collection_is_not_read_as_a_whole():
    documents = [Document(str(n), f"{n} words and more " * 20_000) for n in range(5)]
    tokenizer = Counting()
    assert sampled_rows(tokenizer, documents, 100, 3, seed=0).shape == (3, 100)
    assert tokenizer.characters < 3 * 1000 < len(documents[0].text)


def test_tokens_of_a_piece_are_those_of_the_whole_text():
    tokenizer = byte_tokenizer()
    whole = token_ids(tokenizer, WORDS[0]).tolist()
    (row,) = sampled_rows(tokenizer, WORDS[:1], 64, 1, seed=2).tolist()
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = row[len(bos) :]
    assert row[: len(bos)] == bos
    assert any(whole[place : place + len(body)] == body for place in range(len(whole)))


@pytest.mark.parametrize("documents", [[], [Document("empty", "")]])
def test_no_text_is_refused(documents):
    with pytest.raises(ConfigError, match="no text"):
        sampled_rows(Counting(), documents, 8, 1, seed=0)


def test_too_little_text_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"fewer than one sequence of 100 tokens.*behind one place \d+"):
        sampled_rows(Counting(), [Document("short", "five words are not enough")], 100, 1, seed=0)
