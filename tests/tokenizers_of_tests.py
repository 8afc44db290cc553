"""Tokenizers that need no files, and texts in their words."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, after two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special)


def word_tokenizer(words: int = 128) -> PreTrainedTokenizerFast:
    """A token for each of the words w0, w1, ...; w0 stands for all others."""
    tokenizer = Tokenizer(models.WordLevel(vocab={f"w{i}": i for i in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


def write_words(file: Path, lengths: Iterable[int], generator: torch.Generator, words: int = 128) -> None:
    """A .jsonl file with one text of `word_tokenizer`'s words for each length."""
    texts = [" ".join(f"w{i}" for i in torch.randint(words, (n,), generator=generator)) for n in lengths]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
