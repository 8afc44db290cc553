"""Batches by identity: k texts of each of p identities, as FaceNet's (section 3.2).

sentence-transformers' `GroupByLabelBatchSampler` always draws two of each label, and its state is lost on a resume;
here a batch is a function of its number, so that every process and a resumed run get the same one.
"""

from collections.abc import Sequence

import torch

from hf_rfa.errors import ConfigError


def groups_of(labels: Sequence[int]) -> list[list[int]]:
    """The texts of each identity, by their numbers, in the order of the labels."""
    found: dict[int, list[int]] = {}
    for number, label in enumerate(labels):
        found.setdefault(label, []).append(number)
    return [found[label] for label in sorted(found)]


def usable_groups(groups: Sequence[Sequence[int]], identities: int, passages: int) -> list[Sequence[int]]:
    """The groups with at least `passages` texts; `ConfigError` if there are fewer than `identities`."""
    usable = [group for group in groups if len(group) >= passages]
    if len(usable) < identities:
        raise ConfigError(
            f"A batch needs {identities} identities with {passages} texts each. Got {len(usable)} (of {len(groups)}). "
            "Lower `identities` or `passages`, or pass more texts."
        )
    return usable


def identity_batch(
    groups: Sequence[Sequence[int]], number: int, *, identities: int, passages: int, seed: int = 0
) -> list[int]:
    """Batch `number` as the numbers of its texts: those of each identity one after the other.

    Identities follow each other in random order, and none comes again before all others did (but for the last few of
    such a pass); texts of one identity are drawn without replacement.

    Args:
        groups: See `groups_of`.
        identities, passages: p and k.

    Raises:
        ConfigError: Fewer than p identities have k texts.

    Example:
        >>> from hf_rfa.embeddings.batches import groups_of, identity_batch
        >>> labels = [0, 0, 0, 1, 1, 2, 2, 2]
        >>> [labels[text] for text in identity_batch(groups_of(labels), 0, identities=2, passages=2)] in (
        ...     [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 2, 2], [2, 2, 0, 0], [1, 1, 2, 2], [2, 2, 1, 1])
        True
    """
    usable = usable_groups(groups, identities, passages)
    in_a_pass = len(usable) // identities
    turn, place = divmod(number, in_a_pass)
    order = torch.randperm(len(usable), generator=_generator(seed, turn, 0)).tolist()
    generator = _generator(seed, number, 1)
    batch: list[int] = []
    for identity in order[place * identities : (place + 1) * identities]:
        group = usable[identity]
        batch += [group[i] for i in torch.randperm(len(group), generator=generator)[:passages].tolist()]
    return batch


def _generator(seed: int, number: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + number) * 2 + purpose)
