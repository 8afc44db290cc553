"""Tiny models that have learnt something in a few seconds: to tell the topic of a text from words far back."""

import torch
from families import build

TOPICS, VOCABULARY = 4, 99


def topical(rows: int, length: int, seed: int) -> torch.Tensor:
    """Texts of one topic each: words of its own at one place in three, so that far keys help to tell the topic."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(TOPICS, (rows, 1), generator=generator)
    own = 10 + 20 * topic + torch.randint(20, (rows, length), generator=generator)
    common = 10 + torch.randint(80, (rows, length), generator=generator)
    return torch.where(torch.rand(rows, length, generator=generator) < 0.35, own, common)


def trained(family: str):
    """A tiny model that has learnt to tell topics, by a few seconds of training."""
    model = build(family).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(60):
        ids = topical(8, 100, seed=step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
