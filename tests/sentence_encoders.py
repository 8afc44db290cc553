"""A tiny SentenceTransformer in a folder, and texts in its words."""

from pathlib import Path
from typing import Any

import torch
from families import build
from tokenizers_of_tests import word_tokenizer

WORDS = 90
DIMENSION = 32


def save_encoder(folder: Path) -> Path:
    """A folder with a tiny BERT that is drawn at random, which SentenceTransformer loads with mean pooling."""
    build("bert").bert.save_pretrained(folder)
    tokenizer = word_tokenizer(WORDS)
    tokenizer.pad_token = "w0"
    tokenizer.save_pretrained(folder)
    return folder


def load_encoder(folder: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


def words(length: int, seed: int, *, of: int = WORDS) -> str:
    """A text of `length` words, from the first `of` words or a seed's own choice of a few."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{1 + i}" for i in torch.randint(of - 1, (length,), generator=generator).tolist())


def identity_texts(identities: int, passages: int, length: int = 24) -> list[tuple[str, str]]:
    """(label, text) of texts in which each identity prefers eight words of its own."""
    rows = []
    for identity in range(identities):
        generator = torch.Generator().manual_seed(100 + identity)
        own = 1 + torch.randint(WORDS - 1, (8,), generator=generator)
        for _ in range(passages):
            picked = own[torch.randint(8, (length,), generator=generator)]
            noise = 1 + torch.randint(WORDS - 1, (length,), generator=generator)
            mixed = torch.where(torch.rand(length, generator=generator) < 0.5, picked, noise)
            rows.append((f"identity {identity}", " ".join(f"w{i}" for i in mixed.tolist())))
    return rows
