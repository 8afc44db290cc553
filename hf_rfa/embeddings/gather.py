"""Embeddings of all processes in every process, with their gradients: negatives come from the whole batch.

Each process computes the loss L of the whole batch from the gathered table. The backward pass of the gather adds the
gradients that all n processes have for a row, n dL/d(row), and distributed data parallel averages over processes: what
the weights get is dL/d(weights), as of one process.
"""

import torch
from accelerate import Accelerator


def gather_with_gradients(embeddings: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """(B / n, d) of each of n processes -> (B, d) in each, in the order of the processes."""
    if accelerator.num_processes == 1:
        return embeddings
    from sentence_transformers.util import all_gather_with_grad

    gathered: torch.Tensor = all_gather_with_grad(embeddings.contiguous())
    return gathered
