"""Metric learning on converted encoders, and an index that survives the conversion (FaceNet, arXiv 1503.03832)."""

from hf_rfa.embeddings.batches import groups_of, identity_batch
from hf_rfa.embeddings.config import MetricConfig
from hf_rfa.embeddings.encoders import load_encoder, packaged_encoder
from hf_rfa.embeddings.heads import add_head
from hf_rfa.embeddings.identities import Passages, PassageSettings, load_passages
from hf_rfa.embeddings.index import EmbeddingIndex
from hf_rfa.embeddings.intervals import first_found, ratio_interval, recall_interval
from hf_rfa.embeddings.losses import make_loss
from hf_rfa.embeddings.mining import TripletCounts, count_triplets
from hf_rfa.embeddings.retrieval import Retrieval, clustering, retrieve
from hf_rfa.embeddings.training import MetricProgress, text_features, train_embeddings
from hf_rfa.embeddings.verification import Verification, pair_distances, roc, val_at_far

__all__ = [
    "EmbeddingIndex",
    "MetricConfig",
    "MetricProgress",
    "PassageSettings",
    "Passages",
    "Retrieval",
    "TripletCounts",
    "Verification",
    "add_head",
    "clustering",
    "count_triplets",
    "first_found",
    "groups_of",
    "identity_batch",
    "load_encoder",
    "load_passages",
    "make_loss",
    "packaged_encoder",
    "pair_distances",
    "ratio_interval",
    "recall_interval",
    "retrieve",
    "roc",
    "text_features",
    "train_embeddings",
    "val_at_far",
]
