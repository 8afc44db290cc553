"""Losses and counts against a float64 brute force over all triplets, one at a time."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from hf_rfa.embeddings import MetricConfig, count_triplets, make_loss
from hf_rfa.embeddings.losses import squared_distances

pytest.importorskip("sentence_transformers")
MARGIN = 0.2


def drawn(rows=12, size=5, seed=0, spread=0.7):
    """Embeddings (rows, size) of three or more identities, near each other, so that all kinds of triplets occur."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4][:rows])
    centres = torch.randn(5, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    return centres[labels] + spread * noise, labels


def triplets(labels):
    names = labels.tolist()
    for a, p, n in itertools.product(range(len(names)), repeat=3):
        if a != p and names[a] == names[p] and names[a] != names[n]:
            yield a, p, n


def distance(f, i, j):
    return ((f[i] / f[i].norm() - f[j] / f[j].norm()) ** 2).sum()


def semi_hard(f, labels, margin=MARGIN):
    """The mean over pairs (a, p) of max(0, d(a, p) - d(a, n) + margin), see hf_rfa.embeddings.losses."""
    terms = []
    pairs = {(a, p) for a, p, _ in triplets(labels)}
    for a, p in sorted(pairs):
        positive = distance(f, a, p)
        negatives = [distance(f, a, n) for n in range(len(labels)) if labels[n] != labels[a]]
        beyond = [d for d in negatives if d > positive]
        negative = min(beyond) if beyond else max(negatives)
        terms.append((positive - negative + margin).clamp_min(0))
    return torch.stack(terms).mean()


def batch_hard(f, labels, margin=MARGIN):
    terms = []
    for a in range(len(labels)):
        positives = [distance(f, a, p) for p in range(len(labels)) if p != a and labels[p] == labels[a]]
        farthest = max(positives) if positives else torch.zeros((), dtype=f.dtype)
        nearest = min(distance(f, a, n) for n in range(len(labels)) if labels[n] != labels[a])
        terms.append((farthest - nearest + margin).clamp_min(0))
    return torch.stack(terms).mean()


def multiple_negatives(f, labels, margin=MARGIN):
    unit = f / f.norm(dim=-1, keepdim=True)
    terms = []
    for i in range(0, len(f), 2):
        logits = [20 * unit[i] @ unit[j] for j in range(1, len(f), 2)]
        terms.append(torch.stack(logits).logsumexp(0) - logits[i // 2])
    return torch.stack(terms).mean()


def with_gradient(loss, f):
    leaf = f.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("name", "brute"), [("triplet", semi_hard), ("batch_hard", batch_hard), ("multiple_negatives", multiple_negatives)]
)
def test_loss_and_gradient_are_those_of_the_definition(name, brute, seed):
    f, labels = drawn(seed=seed)
    config = MetricConfig(steps=1, loss=name, margin=MARGIN, passages=2)
    value, gradient = with_gradient(lambda x: make_loss(config)(x, labels, None), f)
    want, expected = with_gradient(lambda x: brute(x, labels), f)
    assert want > 0.01
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-10)
    single = make_loss(config)(f.float(), labels, None)
    torch.testing.assert_close(single, want.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_harmonic_triplets_are_those_of_the_union_of_new_and_old(seed):
    new, labels = drawn(seed=seed)
    old = new + 0.5 * torch.randn(new.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    loss = make_loss(MetricConfig(steps=1, loss="harmonic", margin=MARGIN))
    value, gradient = with_gradient(lambda x: loss(x, labels, old.requires_grad_()), new)
    both = torch.cat([labels, labels])
    want, expected = with_gradient(lambda x: semi_hard(torch.cat([x, old.detach()]), both), new)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-10)
    assert old.grad is None


def test_every_mixture_of_new_and_old_has_a_say():
    """The loss changes with each of the three roles: a new anchor, positive or negative beside old ones."""
    new, labels = drawn(rows=9)
    old = new.roll(1, 0)
    roles = {tuple(i >= len(labels) for i in t) for t in triplets(torch.cat([labels, labels]))}
    assert roles == set(itertools.product((False, True), repeat=3))
    counts = count_triplets(torch.cat([new, old]), torch.cat([labels, labels]), MARGIN)
    assert counts.total == sum(1 for _ in triplets(torch.cat([labels, labels])))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("margin", [0.05, 0.2, 1.0])
def test_counts_are_those_of_all_triplets(seed, margin):
    f, labels = drawn(seed=seed)
    counts = count_triplets(f.float(), labels, margin)
    kinds = [0, 0, 0]
    single = f.float().double()
    for a, p, n in triplets(labels):
        positive, negative = distance(single, a, p), distance(single, a, n)
        kinds[0 if negative <= positive else 1 if negative < positive + margin else 2] += 1
    assert [counts.hard, counts.semi_hard, counts.easy] == kinds
    assert min(kinds if margin > 0.1 else kinds[::2]) > 0
    apart = [distance(single, i, j) for i in range(12) for j in range(12) if labels[i] != labels[j]]
    assert counts.spread == pytest.approx(float(torch.stack(apart).mean()), rel=1e-9)
    assert not counts.collapsed


def test_collapse_is_embeddings_that_are_all_alike():
    f, labels = drawn()
    alike = torch.ones_like(f) + 0.02 * f / f.norm(dim=-1, keepdim=True)
    assert count_triplets(alike, labels, MARGIN).collapsed
    assert count_triplets(torch.zeros_like(f), labels, MARGIN).collapsed
    assert math.isnan(count_triplets(f, torch.zeros(12), MARGIN).spread)


def test_distances_are_of_unit_vectors():
    f, _ = drawn()
    want = torch.cdist(F.normalize(f, dim=-1), F.normalize(f, dim=-1)).square()
    torch.testing.assert_close(squared_distances(7 * f), want, rtol=1e-6, atol=1e-12)
