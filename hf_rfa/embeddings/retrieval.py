"""Retrieval and clustering of labelled texts by stored embeddings.

Half of the texts of each identity are queries, the others lie in the index, which may be of another encoder (FaceNet's
figure 8). Figures are those of the `InformationRetrievalEvaluator` of sentence-transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_rfa.embeddings.batches import groups_of
from hf_rfa.embeddings.index import unit

#: Results that are looked at.
DEPTHS = (1, 10)


@dataclass(frozen=True)
class Retrieval:
    """Shares of queries.

    Attributes:
        recall: {1: R@1, 10: R@10}: a text of the query's identity is among the first 1, 10 (Recall@k of metric
            learning; sentence-transformers calls it accuracy@k).
        ndcg: nDCG@10, every text of the identity being relevant.
    """

    recall: dict[int, float]
    ndcg: float


def split_queries(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Numbers of the queries and of the texts in the index: every other text of each identity."""
    groups = groups_of(labels)
    return [n for group in groups for n in group[::2]], [n for group in groups for n in group[1::2]]


class _Stored:
    """Stands in for an encoder: gives the stored embeddings of texts that are their own numbers."""

    def __init__(self, embeddings: np.ndarray) -> None:
        self.embeddings = torch.from_numpy(unit(embeddings))

    def encode_query(self, texts: Sequence[str], **options: Any) -> torch.Tensor:
        return self.embeddings[[int(text) for text in texts]]

    encode_document = encode_query


def retrieve(queries: np.ndarray, index: np.ndarray, labels: Sequence[int]) -> Retrieval:
    """Search one encoder's embeddings (n, d) of the index's texts with another's (n, d) of the queries.

    Args:
        queries, index: Embeddings of all n texts; of each the part that `split_queries` names is used.

    Example:
        >>> import numpy as np, pytest
        >>> _ = pytest.importorskip("sentence_transformers")
        >>> from hf_rfa.embeddings.retrieval import retrieve
        >>> labels = [i for i in range(20) for _ in range(4)]
        >>> retrieve(np.eye(20)[labels], np.eye(20)[labels], labels)
        Retrieval(recall={1: 1.0, 10: 1.0}, ndcg=1.0)
    """
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    asked, held = split_queries(labels)
    evaluator = InformationRetrievalEvaluator(
        queries={str(n): str(n) for n in asked},
        corpus={str(n): str(n) for n in held},
        relevant_docs={str(n): {str(m) for m in held if labels[m] == labels[n]} for n in asked},
        accuracy_at_k=list(DEPTHS), ndcg_at_k=[10], mrr_at_k=[10], map_at_k=[10], precision_recall_at_k=[10],
        score_functions={"cosine": cos_sim},
    )  # fmt: skip
    old: Any = _Stored(index)
    found = evaluator.compute_all_metrics(_Stored(queries), corpus_model=old)["cosine"]  # type: ignore[arg-type]
    values: Any = found
    return Retrieval({k: float(values["accuracy@k"][k]) for k in DEPTHS}, float(values["ndcg@k"][10]))


def clustering(embeddings: np.ndarray, labels: Sequence[int]) -> float:
    """V-measure of agglomerative clusters (average linkage, cosine), as many as there are identities.

    FaceNet clusters so too (its figure 7). 1 where each cluster is one identity.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import v_measure_score

    clusters = AgglomerativeClustering(n_clusters=len(set(labels)), metric="cosine", linkage="average")
    return float(v_measure_score(labels, clusters.fit_predict(unit(embeddings))))
