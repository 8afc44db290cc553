"""Batches by identity, and where identities come from."""

import collections
import json

import pytest

from hf_rfa.embeddings import PassageSettings, groups_of, identity_batch, load_passages
from hf_rfa.errors import ConfigError

LABELS = [n // 5 for n in range(60)]


def test_k_texts_of_each_of_p_identities():
    groups = groups_of(LABELS)
    for number in range(20):
        batch = identity_batch(groups, number, identities=4, passages=3, seed=1)
        counts = collections.Counter(LABELS[text] for text in batch)
        assert len(counts) == 4
        assert set(counts.values()) == {3}
        assert len(set(batch)) == 12
        labels = [LABELS[text] for text in batch]
        assert [label for label in labels[::3] for _ in range(3)] == labels
        assert batch == identity_batch(groups, number, identities=4, passages=3, seed=1)
    assert identity_batch(groups, 0, identities=4, passages=3, seed=2) != identity_batch(
        groups, 0, identities=4, passages=3, seed=1
    )


def test_a_pass_has_every_identity_once():
    groups = groups_of(LABELS)
    for turn in range(3):
        seen = [LABELS[t] for n in range(3) for t in identity_batch(groups, 3 * turn + n, identities=4, passages=2)]
        assert sorted(seen) == sorted(2 * list(range(12)))
    drawn = {text for number in range(60) for text in identity_batch(groups, number, identities=4, passages=2)}
    assert drawn == set(range(60))


def test_too_few_identities_are_refused():
    with pytest.raises(ConfigError, match=r"needs 13 identities with 2 texts each\. Got 12 \(of 12\)"):
        identity_batch(groups_of(LABELS), 0, identities=13, passages=2)
    with pytest.raises(ConfigError, match=r"2 identities with 6 texts each\. Got 0 \(of 12\)"):
        identity_batch(groups_of(LABELS), 0, identities=2, passages=6)


def test_chapters_are_identities(tmp_path):
    chapter = "It was a dark and stormy night. " * 30
    book = (
        f"THE BOOK\n\nCONTENTS\n\nCHAPTER I\n\nCHAPTER II\n\nCHAPTER I\n\n{chapter}\n\nCHAPTER II. OF RAIN\n\n"
        f"{chapter}\nVII. THE ADVENTURE OF THE TEST\n{chapter}\n"
    )
    (tmp_path / "train").mkdir()
    (tmp_path / "validation").mkdir()
    (tmp_path / "train" / "one.txt").write_text(book)
    (tmp_path / "train" / "two.txt").write_text(chapter)
    (tmp_path / "validation" / "three.txt").write_text(book)
    settings = PassageSettings(passage_characters=100, identity_passages=3)
    train = load_passages(tmp_path, "train", settings)
    assert len(train.names) == 4
    assert train.labels == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert not any("CHAPTER" in text or "ADVENTURE" in text for text in train.texts)
    assert len(set(train.of(0))) == 3
    assert all(100 <= len(text) <= 110 for text in train.texts)
    assert all(name.startswith("validation/three") for name in load_passages(tmp_path, "validation", settings).names)
    books = load_passages(tmp_path, "train", PassageSettings(passage_characters=100, identity="document"))
    assert books.names == ["train/one.txt", "train/two.txt"]


def test_rows_with_labels_are_split_by_identity(labelled):
    settings = PassageSettings(label_column="who")
    train, held_out = (load_passages(labelled, split, settings) for split in ("train", "validation"))
    assert (len(train.names), len(held_out.names)) == (48, 12)
    assert not set(train.names) & set(held_out.names)
    assert len(train.texts) == 192
    with pytest.raises(ConfigError, match=r"no column 'author'\. Its columns are 'who', 'text'"):
        load_passages(labelled, "train", PassageSettings(label_column="author"))
    with pytest.raises(FileNotFoundError, match="With `label_column`, pass"):
        load_passages("stdlib", "train", settings)


def test_parquet_rows(tmp_path, labelled):
    datasets = pytest.importorskip("datasets")
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "labelled.parquet")
    settings = PassageSettings(label_column="who")
    assert load_passages(tmp_path / "labelled.parquet", "train", settings) == load_passages(
        labelled, "train", settings
    )


def test_a_share_is_of_identities(labelled):
    train = load_passages(labelled, "train", PassageSettings(label_column="who"))
    part = train.share(0.25)
    assert len(part.names) == 12
    assert part.labels == [n // 4 for n in range(48)]
    assert set(part.names) < set(train.names)
    assert part.of(3) == train.of(train.names.index(part.names[3]))
    assert len(train.share(0.001, least=5).names) == 5
    assert train.share(1.0) == train.first(None) == train
    assert len(train.first(7).names) == 7


def test_the_standard_library_needs_no_download():
    train, held_out = (load_passages("stdlib", split) for split in ("train", "validation"))
    assert len(train.names) > 4 * 50
    assert not set(train.texts) & set(held_out.texts)


def test_one_identity_is_not_enough(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "a", "who": "x"}\n{"text": "b", "who": "x"}\n')
    with pytest.raises(ConfigError, match=r"must have two identities with two texts each\. Got 1"):
        load_passages(tmp_path / "one.jsonl", "train", PassageSettings(label_column="who"))
    with pytest.raises(ConfigError, match=r"`split` must be one of train, validation\. Got 'test'"):
        load_passages("stdlib", "test")


@pytest.mark.parametrize(
    "row", ['{"text": "a", "who": null}', '{"text": " ", "who": "x"}', '{"text": null, "who": "x"}']
)
def test_rows_without_a_label_or_words_are_named(tmp_path, row):
    (tmp_path / "one.jsonl").write_text('{"text": "a", "who": "x"}\n' + row + "\n")
    with pytest.raises(ConfigError, match=r"one\.jsonl, line 2 must have a label in 'who' and words in 'text'"):
        load_passages(tmp_path / "one.jsonl", "train", PassageSettings(label_column="who"))
