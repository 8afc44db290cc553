"""Linear heads of any size on stored embeddings of a frozen encoder, each trained alike: FaceNet's tables 5 and 6."""

from typing import Any

import numpy as np
import torch
from torch import nn

from hf_rfa.embeddings.config import MetricConfig
from hf_rfa.embeddings.training import MetricProgress, train_embeddings


def add_head(encoder: Any, dimension: int, seed: int = 0) -> Any:
    """A linear layer to `dimension` and a normalisation at the end of a SentenceTransformer, in place."""
    for module in linear_head(encoder.get_embedding_dimension(), dimension, seed):
        encoder.add_module(str(len(encoder)), module.to(encoder.device))
    return encoder


def linear_head(size: int, dimension: int, seed: int = 0) -> nn.Sequential:
    """Modules of sentence-transformers: a linear layer whose rows begin orthonormal, then a normalisation."""
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    drawn = torch.randn(max(size, dimension), min(size, dimension), generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(drawn)[0]
    weight = rotation if dimension > size else rotation.T
    dense = Dense(size, dimension, bias=False, activation_function=nn.Identity(), init_weight=weight.contiguous())
    return nn.Sequential(dense, Normalize())


def train_head(
    embeddings: np.ndarray, labels: list[int], dimension: int, config: MetricConfig
) -> tuple[nn.Sequential, MetricProgress]:
    """A head of `dimension` on stored embeddings (n, d) of labelled texts, trained by `config`."""
    head, stored = linear_head(embeddings.shape[1], dimension, config.seed), torch.as_tensor(embeddings).float()
    done = train_embeddings(
        head, labels, config, features=lambda numbers: {"sentence_embedding": stored[numbers]},
        description=f"head of {dimension}",
    )  # fmt: skip
    return head.eval(), done


@torch.no_grad()
def apply_head(head: nn.Module, embeddings: np.ndarray) -> np.ndarray:
    """(n, d) -> (n, dimension), unit vectors."""
    found: np.ndarray = head({"sentence_embedding": torch.as_tensor(embeddings).float()})["sentence_embedding"].numpy()
    return found
