"""Sequence parallelism: one document split over processes, each with its contiguous share of the tokens.

Linear attention needs little from the processes before. With s the first token of process r and C the window:

    far sums   [S | z | max] over the tokens before chunk s // C - 1: each process sums its own tokens (and those that
               its left neighbour left near); gathered once per layer, merged under a common maximum
    near keys  the up to 2C - 1 tokens before s, from the process before
    sinks      the first tokens of process 0

Together they are the `RFAState` after s tokens. Each process runs the operator on its own tokens from that state, with
the same results as a single process, forward and backward. Traffic per layer does not depend on the document's length.

**Heads that stay softmax** need every key: theirs are gathered, `N * (D + M)` numbers per head and layer on every
process. Memory falls as 1 / processes for everything else. Documents that are packed, padded or cut with the state
carried over are refused: their states begin at another place in each row.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_rfa.data.document_batches import IGNORED, Batch
from hf_rfa.errors import ConfigError, UnsupportedModelError
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.attention import attend
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.scan import chunk_sums, merge_states
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.state import RFAState, accumulation_dtype
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.calls import Interception, intercept

#: Keys whose features are computed at once for a process's far sums, and recomputed in the backward pass.
KEYS_AT_ONCE = 4096


@contextmanager
def sequence_parallel(model: nn.Module, group: dist.ProcessGroup) -> Iterator[None]:
    """Within the block every converted layer reads the tokens of the processes before it in `group`.

    Each process calls the model with its share (`shard_batch`), all of them at the same time, forward and backward.

    Raises:
        UnsupportedModelError: the model is not converted, or mixes tokens by convolutions as well.
        ConfigError: pure RFA (window = 0), whose state is not aligned to chunks, or kept keys.
    """
    adapters = require_adapters(model)
    mixing = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)), None)
    if mixing is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} mixes neighbouring tokens by a convolution too ({mixing}), which would have to "
            "be exchanged at the borders as well. Use data parallelism for it."
        )
    if adapters[0].config.window == 0:
        raise ConfigError(
            "Sequence parallelism needs an exact window. Got window=0. Convert with RFAConfig(window=64)."
        )
    if adapters[0].config.most_kept_keys:
        raise ConfigError(
            "Which far keys are kept is decided chunk after chunk, and sequence parallelism cannot hand that on from "
            f"process to process yet. Got kept_keys={adapters[0].config.most_kept_keys}. Convert with "
            "RFAConfig(kept_keys=0, head_kept_keys=None), or use one process per document."
        )
    with intercept(Interception(shards={adapter: Shard(adapter, group) for adapter in adapters})):
        yield


def shard_batch(batch: Tensor | Batch, rank: int, processes: int) -> Batch:
    """The share of process `rank`: ceil(N / processes) tokens of each row, with their positions.

    If the processes do not divide N, the last ones get tokens after the document's end that predict nothing.

    Example:
        >>> shard_batch(torch.arange(6)[None], rank=1, processes=2)
        Batch(input_ids=tensor([[3, 4, 5]]), targets=tensor([[   4,    5, -100]]), position_ids=tensor([[3, 4, 5]]),
              fresh=None)
    """
    whole = Batch.of(batch)
    if whole.position_ids is not None or whole.fresh is not None:
        raise ConfigError(
            "Sequence parallelism takes one whole document per row: packed documents and documents that are cut with "
            "the state carried over begin somewhere else in each row. Pass token ids, or set `sequence_parallel=1`."
        )
    rows, length = whole.input_ids.shape
    share = -(-length // processes)
    own = slice(rank * share, (rank + 1) * share)
    missing = share * processes - length
    ids = torch.cat([whole.input_ids, whole.input_ids.new_zeros(rows, missing)], dim=1)
    targets = torch.cat([whole.targets, whole.targets.new_full((rows, missing), IGNORED)], dim=1)
    positions = torch.arange(own.start, own.stop, device=ids.device).expand(rows, -1)
    return Batch(ids[:, own], targets[:, own], positions)


@dataclass(frozen=True)
class Shard:
    """One layer of one process; called by the attention function in place of the operator."""

    adapter: RFAAdapter
    group: dist.ProcessGroup

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, kernel: FarKernel, settings: AttentionSettings,
        layout: TokenLayout, statistics: FarStatistics | None, cache_layer: Any,
    ) -> Tensor:  # fmt: skip
        """Output (B, H, n, M) of this process's n tokens."""
        if cache_layer is not None:
            raise UnsupportedModelError(
                "A process has only its share of the tokens, and so has no cache. Call the model with use_cache=False."
            )
        if not layout.is_plain or not settings.causal:
            raise UnsupportedModelError(
                "Sequence parallelism splits one causal document per row, without padding or packing. Got a layer "
                "with one of them. Pass whole documents, or leave the mode."
            )
        if kernel.gate_weight is not None:
            raise ConfigError(
                "Sequence parallelism cannot carry a gate over processes yet. Got a layer with one. Use "
                "RFAConfig(gate=False), or one process per document."
            )
        rank = dist.get_rank(self.group)
        length, window = key.shape[2], self.adapter.config.window
        exact = list(settings.softmax_heads)
        linear = [head for head in range(key.shape[1]) if head not in exact]
        if linear and length < 2 * window:
            raise ConfigError(
                f"Each process needs at least two windows ({2 * window}) of tokens. Got {length}. Use longer "
                "documents or fewer processes."
            )
        call = OperatorCall.of(query, key, value, kernel, settings, layout)
        part = call.heads(linear).to(accumulation_dtype(key.dtype))
        count = torch.full((len(key),), rank * length)
        state = dataclasses.replace(part.empty_state(), count=count)
        if linear:
            state = self._linear_state(part, state, rank)
        if exact:
            keys, values = (self._gather(t[:, exact]) for t in (key, value))
            # Process 0 takes a slice of length 0, and not nothing: it has to take part in the backward pass.
            before = [torch.cat(t.unbind(), dim=2)[:, :, : rank * length] for t in (keys, values)]
            state = dataclasses.replace(state, exact_key=before[0], exact_value=before[1])
        return attend(query, key, value, kernel, settings, layout, state, statistics=statistics)[0]

    def _linear_state(self, call: OperatorCall, empty: RFAState, rank: int) -> RFAState:
        """The state of the linear heads before this process's first token."""
        key, value, window, sinks = call.key, call.value, call.window, call.sink_tokens
        length, processes = key.shape[2], dist.get_world_size(self.group)
        near_from = [_near_start(r * length, window) for r in range(processes + 1)]
        # Near keys of the next process: its first chunks are aligned to the document, not to its own tokens.
        tail = (rank + 1) * length - near_from[rank + 1]
        blank = 2 * window - tail
        edges = []
        for tensor in (key, value):
            tail_tokens = tensor[:, :, length - tail :]
            edges.append(torch.cat([tail_tokens, tensor.new_zeros(*tensor.shape[:2], blank, tensor.shape[3])], 2))
            edges.append(tensor[:, :, :sinks])
        gathered = self._gather(torch.cat([t.flatten(1) for t in edges], 1))  # (processes, B, ...)
        split = gathered.split([t[0].numel() for t in edges], dim=2)
        parts = [t.unflatten(2, e.shape[1:]) for t, e in zip(split, edges, strict=True)]
        mine = torch.zeros(processes, dtype=key.dtype, device=key.device)
        if rank:
            mine[rank - 1] = 1
        near_key, near_value = (torch.einsum("p,pbhnd->bhnd", mine, t) for t in (parts[0], parts[2]))
        is_later = float(rank > 0)
        sink_key, sink_value = is_later * parts[1][0], is_later * parts[3][0]
        # Far for all later processes: from the first token that the process before left near to the first that this
        # one leaves near.
        held = rank * length - near_from[rank] if rank else 0
        far_key = torch.cat([near_key[:, :, :held], key[:, :, : length - tail]], 2)
        far_value = torch.cat([near_value[:, :, :held], value[:, :, : length - tail]], 2)
        keep = torch.ones(far_key.shape[2], dtype=torch.bool, device=key.device)
        first = near_from[rank] if rank else 0
        keep[: max(0, sinks - first)] = False
        sums, log_max = far_sums(call.far, far_key, far_value, keep, call.scaling)
        all_sums = self._gather(sums)
        log_maxima = self._gather(log_max.detach())
        before = (torch.arange(processes, device=key.device) < rank).view(-1, 1, 1)
        log_maxima = log_maxima.masked_fill(~before, -torch.inf)
        log_max = log_maxima.amax(0)
        weights = (log_maxima - log_max.masked_fill(log_max == -torch.inf, 0.0)).exp()
        kv_state = torch.einsum("pbh,pbhfm->bhfm", weights, all_sums)
        return dataclasses.replace(
            empty,
            kv_state=kv_state,
            log_max=log_max,
            near_key=near_key,
            near_value=near_value,
            sink_key=sink_key,
            sink_value=sink_value,
        )

    def _gather(self, tensor: Tensor) -> Tensor:
        """The tensors (...) of all processes, (processes, ...); gradients flow back to each of them."""
        return _AllGather.apply(tensor, self.group)


class _AllGather(torch.autograd.Function):
    """The tensors (...) of all processes of a group, (processes, ...)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = tensor.new_empty(dist.get_world_size(group), *tensor.shape)
        dist.all_gather_into_tensor(gathered, tensor.contiguous()[None], group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = gradient.new_empty(1, *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own[0], None


def far_sums(far: FarKernel, key: Tensor, value: Tensor, keep: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """[S | z] (B, Hk, F, M + 1) of keys (B, Hk, n, D), divided by exp(log_max), and the log_max (B, Hk)."""
    shape = (*key.shape[:2], far.num_components, value.shape[-1] + 1)
    total = key.new_zeros(shape), key.new_full(key.shape[:2], -torch.inf)
    parts = zip(*(t.split(KEYS_AT_ONCE, dim=2) for t in (key, value)), keep.split(KEYS_AT_ONCE), strict=True)
    for keys, values, kept in parts:

        def block(keys: Tensor = keys, values: Tensor = values, kept: Tensor = kept) -> tuple[Tensor, Tensor]:
            features, log_scale = far.key_features(keys.unsqueeze(2), scaling)
            sums, log_max = chunk_sums(features, log_scale, values.unsqueeze(2), kept[None, None])
            return sums.squeeze(2), log_max.squeeze(2)

        added = checkpoint(block, use_reentrant=False) if torch.is_grad_enabled() else block()
        total = merge_states(total, added)
    return total


def _near_start(token: int, window: int) -> int:
    """First token of the chunk before that of `token`, 0 if there is none."""
    return max(0, token // window - 1) * window
