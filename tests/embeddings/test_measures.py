"""VAL, ROC, retrieval, clusters and the vector index, against counts made one at a time."""

import numpy as np
import pytest

from hf_rfa.embeddings import (
    EmbeddingIndex,
    clustering,
    first_found,
    pair_distances,
    ratio_interval,
    recall_interval,
    retrieve,
    roc,
    val_at_far,
)
from hf_rfa.embeddings.retrieval import split_queries
from hf_rfa.errors import CheckpointError, ConfigError


def drawn(identities=40, texts=4, size=16, noise=0.8, seed=0):
    generator = np.random.default_rng(seed)
    labels = [n for n in range(identities) for _ in range(texts)]
    centres = generator.normal(size=(identities, size))
    return centres[labels] + noise * generator.normal(size=(len(labels), size)), labels


def test_distances_are_squared_and_of_unit_vectors():
    f, _ = drawn()
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    want = ((unit[:, None] - unit) ** 2).sum(-1)
    np.testing.assert_allclose(pair_distances(3 * f), want, atol=1e-6)
    np.testing.assert_allclose(pair_distances(f, f[::-1]), want[:, ::-1], atol=1e-6)


def test_val_at_far_by_folds_of_identities():
    f, labels = drawn()
    distances = pair_distances(f)
    found = val_at_far(distances, labels, far=0.01, folds=4, seed=5)
    order = np.random.default_rng(5).permutation(40)
    fold = {int(identity): place % 4 for place, identity in enumerate(order)}
    vals, fars, allowed = [], [], []
    for number in range(4):
        different, same, touching = [], [], []
        for i in range(160):
            for j in range(160):
                inside = (fold[labels[i]] == number) + (fold[labels[j]] == number)
                if labels[i] != labels[j]:
                    (touching if inside else different).append(distances[i, j])
                elif i != j and inside:
                    same.append(distances[i, j])
        different = np.array(different)
        threshold = max(d for d in different if np.mean(different <= d) <= 0.01)
        vals.append(np.mean(np.array(same) <= threshold))
        fars.append(np.mean(np.array(touching) <= threshold))
        allowed.append(np.mean(different <= threshold))
    assert found.val == pytest.approx(np.mean(vals))
    assert found.error == pytest.approx(np.std(vals, ddof=1) / 2)
    assert found.far == pytest.approx(np.mean(fars))
    assert 0.1 < found.val < 0.9
    assert max(allowed) <= 0.01


def test_val_falls_with_the_far_and_noise():
    f, labels = drawn()
    noisy, _ = drawn(noise=1.5)
    strict, loose = (val_at_far(pair_distances(f), labels, far=far).val for far in (1e-3, 1e-1))
    assert strict < loose
    assert val_at_far(pair_distances(noisy), labels).val < strict
    with pytest.raises(ConfigError, match=r"over 50 folds of identities\. Got 40"):
        val_at_far(pair_distances(f), labels, folds=50)


def test_roc_has_the_share_of_both_kinds_of_pairs():
    f, labels = drawn(identities=10)
    distances, names = pair_distances(f), np.array(labels)
    far, val = roc(distances, labels)
    same = (names[:, None] == names) & ~np.eye(40, dtype=bool)
    different = names[:, None] != names
    threshold = np.median(distances[same])
    place = np.searchsorted(far, np.mean(distances[different] <= threshold), side="right") - 1
    assert val[place] >= np.mean(distances[same] <= threshold) - 1e-9
    assert (far[0], val[0], far[-1], val[-1]) == (0, 0, 1, 1)


def test_retrieval_counts_identities_among_the_first():
    pytest.importorskip("sentence_transformers")
    f, labels = drawn(noise=1.0)
    other = f + 0.3 * np.random.default_rng(1).normal(size=f.shape)
    queries, held = split_queries(labels)
    assert sorted(queries + held) == list(range(160))
    cosines = 1 - pair_distances(f, other)[np.ix_(queries, held)] / 2
    hits = {1: 0, 10: 0}
    gains = []
    for row, query in zip(cosines, queries, strict=True):
        ranked = [labels[held[place]] == labels[query] for place in np.argsort(-row)[:10]]
        for k in hits:
            hits[k] += any(ranked[:k])
        ideal = sum(1 / np.log2(place + 2) for place in range(2))
        gains.append(sum(hit / np.log2(place + 2) for place, hit in enumerate(ranked)) / ideal)
    found = retrieve(f, other, labels)
    assert found.recall == pytest.approx({k: count / 80 for k, count in hits.items()})
    assert found.ndcg == pytest.approx(np.mean(gains))
    assert 0.2 < found.recall[1] < found.recall[10]
    assert retrieve(other, f, labels) != found


def test_clusters():
    f, labels = drawn(noise=0.05)
    assert clustering(f, labels) == pytest.approx(1)
    noisy, _ = drawn(noise=2)
    assert clustering(noisy, labels) < 0.95


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_index_finds_what_the_cosine_says_and_comes_back_from_a_folder(precision, tmp_path):
    pytest.importorskip("faiss")
    f, _ = drawn()
    names = [f"text {n}" for n in range(160)]
    index = EmbeddingIndex(f, names, precision=precision)
    assert (len(index), index.vector_bytes) == (160, 64 if precision == "float32" else 16)
    unit = f / np.linalg.norm(f, axis=1, keepdims=True)
    tolerance = 1e-6 if precision == "float32" else 0.01
    assert np.abs(index.vectors - unit).max() < tolerance
    queries = f[::7] + 0.1
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ index.vectors.T
    found = index.search(queries, 5)
    for row, results in zip(cosines, found, strict=True):
        order = np.argsort(-row)[:5]
        assert [name for name, _ in results] == [names[n] for n in order]
        assert [cosine for _, cosine in results] == pytest.approx(row[order], abs=1e-5)
    index.save(tmp_path)
    assert EmbeddingIndex.load(tmp_path).search(queries, 5) == found
    with pytest.raises(ConfigError, match=r"the index's 16 dimensions\. Got shape \(2, 5\)"):
        index.search(np.ones((2, 5)), 1)


def test_damaged_indices_are_refused(tmp_path):
    pytest.importorskip("faiss")
    f, _ = drawn()
    with pytest.raises(ConfigError, match=r"Got 1 names and 160 embeddings"):
        EmbeddingIndex(f, ["a"])
    with pytest.raises(ConfigError, match="Got 'int4'"):
        EmbeddingIndex(f, list(map(str, range(160))), precision="int4")
    with pytest.raises(CheckpointError, match="No index can be read"):
        EmbeddingIndex.load(tmp_path)
    EmbeddingIndex(f, list(map(str, range(160)))).save(tmp_path)
    (tmp_path / "names.json").write_text('["a"]')
    with pytest.raises(CheckpointError, match="160 embeddings and 1 names"):
        EmbeddingIndex.load(tmp_path)
    (tmp_path / "index.faiss").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="No index can be read"):
        EmbeddingIndex.load(tmp_path)


def test_the_first_found_is_what_retrieval_counts():
    pytest.importorskip("sentence_transformers")
    f, labels = drawn(noise=1.0)
    other = f + 0.3 * np.random.default_rng(1).normal(size=f.shape)
    hits = first_found(f, other, labels)
    assert hits.shape == (80,)
    assert hits.mean() == pytest.approx(retrieve(f, other, labels).recall[1])
    assert not np.array_equal(hits, first_found(other, f, labels))


def test_intervals_are_those_of_identities():
    labels = [n for n in range(50) for _ in range(8)]  # four queries of each
    by_identity = np.repeat(np.arange(50) < 20, 4)
    by_query = np.tile([True, False], 100)
    low, high = recall_interval(by_identity, labels)
    assert low == pytest.approx(0.4 - 1.96 * np.sqrt(0.24 / 50), abs=0.03)
    assert high == pytest.approx(0.4 + 1.96 * np.sqrt(0.24 / 50), abs=0.03)
    assert recall_interval(by_query, labels) == (0.5, 0.5)  # every identity is alike
    # The same queries fail in both: of their ratio nothing is uncertain, though much is of each.
    assert ratio_interval(by_identity, by_identity, labels) == (1, 1)
    low, high = ratio_interval(by_identity, by_query, labels)
    assert low < 0.8 < high
    assert high - low == pytest.approx(2 * 2 * 1.96 * np.sqrt(0.24 / 50), abs=0.1)
    assert np.isnan(ratio_interval(by_query, np.zeros(200, dtype=bool), labels)).all()


def test_what_is_not_finite_is_no_place():
    pytest.importorskip("faiss")
    rows = np.eye(4, dtype=np.float32)
    index = EmbeddingIndex(rows, list("abcd"))
    strange = rows.copy()
    strange[2, 1] = np.nan
    for use in (
        lambda: EmbeddingIndex(strange, list("abcd")),
        lambda: index.search(strange, 2),
        lambda: pair_distances(strange),
        lambda: retrieve(strange, rows, [0, 0, 1, 1]),
    ):
        with pytest.raises(ConfigError, match=r"finite\. Got a NaN or an infinity in 1 of \d, the first"):
            use()
    with pytest.raises(ConfigError, match="Got count=0"):
        index.search(rows, 0)
    with pytest.raises(ConfigError, match=r"\(texts, dimension\)\. Got \(4,\)"):
        EmbeddingIndex(rows[0], list("abcd"))
