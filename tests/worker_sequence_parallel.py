"""Run by torchrun: a document split over the processes against the whole of it on one, forward and gradients.

torchrun --nproc_per_node 2 worker_sequence_parallel.py RESULT MAP HEADS CHECKPOINTING
"""

import copy
import json
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from families import checkpoint_activations, llama, token_ids

import hf_rfa
from hf_rfa.training.sequence_parallel import sequence_parallel, shard_batch


def main(result: str, feature_map: str, heads: str, checkpointing: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = llama(gain=1, hidden_size=64, intermediate_size=64)
    config = hf_rfa.RFAConfig(
        feature_map=feature_map,
        num_features=16,
        window=8,
        sink_tokens=3,
        softmax_heads=json.loads(heads),
        alpha=0.5,
        kept_keys=0,
    )
    hf_rfa.convert(model, config, calibrate=False).train()
    ids = token_ids(2, 163)  # no multiple of the window, nor of the processes
    whole = copy.deepcopy(model)
    expected = whole(input_ids=ids, use_cache=False).logits
    F.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    if checkpointing == "yes":
        checkpoint_activations(model, use_reentrant=False)
    with sequence_parallel(model, dist.group.WORLD):
        batch = shard_batch(ids, rank, processes)
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum").backward()
    share = batch.input_ids.shape[1]
    mine = expected[:, rank * share : (rank + 1) * share]
    worst = [(logits[:, : mine.shape[1]] - mine).abs().max() / expected.abs().max()]
    for parameter, reference in zip(model.parameters(), whole.parameters(), strict=True):
        dist.all_reduce(parameter.grad)
        worst.append((parameter.grad - reference.grad).abs().max() / reference.grad.abs().max())
    errors = torch.stack(worst).detach()
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    if rank == 0:
        with open(result, "w") as file:
            json.dump(errors.tolist(), file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
