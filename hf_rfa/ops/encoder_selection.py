"""Choice of the kept keys of a bidirectional call: one pass over all keys, with a few queries per document.

The logits are computed block by block, so that memory stays small whatever the length of a document.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from hf_rfa.ops import kept_encoder_keys
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.documents import Documents
from hf_rfa.ops.recomputing import Flags, Tensors, recomputing

#: Logits per block: they must fit into a CPU's cache; a GPU takes many times as many.
BLOCK_LOGITS, TIMES_ON_GPU = 2**20, 16


@dataclasses.dataclass(frozen=True)
class EncoderChoice:
    """The keys that a call keeps.

    Attributes:
        slots: (d, Hk, K) int64, the kept keys' slots in the row, ascending, for each of the d documents longer than
            the near range; empty places come first and hold -1.
        kept: (B, Hk, N) bool: whether each token is kept.
        documents: All documents of the call.
        chosen: (d,) which of them the d documents are.
    """

    slots: torch.Tensor
    kept: torch.Tensor
    documents: Documents
    chosen: np.ndarray

    def of_chunks(self, segment_ids: torch.Tensor) -> torch.Tensor:
        """`slots` (B, Hk, n, K) for the document of each chunk, `segment_ids` (R, n); n is 1 if no row has two."""
        documents, device = self.documents, self.slots.device
        rows, number = documents.row[self.chosen], documents.number[self.chosen]
        most = int(documents.number.max())
        index = np.full((documents.rows, most + 1), len(self.chosen))
        index[rows, number] = np.arange(len(self.chosen))
        of_chunk = torch.from_numpy(index).to(device)
        if most:
            of_chunk = of_chunk.gather(1, segment_ids.expand(len(of_chunk), -1))
        slots = F.pad(self.slots, (0, 0, 0, 0, 0, 1), value=-1)  # for documents that keep nothing
        return slots[of_chunk].transpose(1, 2)


def choose_encoder_keys(call: OperatorCall) -> EncoderChoice | None:
    """The choice for a call in float32 or float64; None if all keys are near."""
    documents = call.layout.documents(len(call.query), call.query.shape[3])
    chosen = np.flatnonzero(documents.length > 2 * call.window)
    if not call.kept_keys or not len(chosen):
        return None
    sizes = {name: getattr(call, name) for name in ("kept_keys", "window", "sink_tokens", "scaling")}
    selection = _Selection(documents, chosen, **sizes)
    given = (call.query, call.key, call.value, call.sink_logits)
    slots, kept = recomputing(selection, *(None if x is None else x.detach() for x in given))
    return EncoderChoice(slots, kept, documents, chosen)


@dataclasses.dataclass(frozen=True)
class _Selection:
    """See `ops.recomputing`; none of the outputs has a gradient."""

    documents: Documents
    chosen: np.ndarray
    kept_keys: int
    window: int
    sink_tokens: int
    scaling: float
    outputs: int = 2
    constant: tuple[int, ...] = (0, 1)
    forward_only: tuple[int, ...] = ()

    def forward(self, tensors: Tensors, followed: Flags) -> tuple[torch.Tensor, ...]:
        query, key, value, sink_logits = tensors
        assert query is not None
        assert key is not None
        assert value is not None
        documents, chosen, device = self.documents, self.chosen, key.device
        asking = _Asking(query, key, torch.linalg.vector_norm(value, dim=-1), sink_logits, self.scaling)
        lengths, (batch, heads, total) = documents.length[chosen], key.shape[:3]
        most = min(self.kept_keys, int(lengths.max()))
        slots = key.new_full((len(chosen), heads, most), -1, dtype=torch.int64)
        chunks = -(-lengths // self.window)
        for size in np.unique(chunks):  # documents with equally many chunks together
            own = np.flatnonzero(chunks == size)
            group = _Group.of(documents, chosen[own], self.window, self.sink_tokens, device)
            rank = kept_encoder_keys.best(asking.scores(group), most)
            slot = group.slot.unsqueeze(1).expand(-1, heads, -1).gather(2, rank.clamp_min(0))
            slots[torch.from_numpy(own).to(device), :, most - rank.shape[2] :] = slot.masked_fill(rank < 0, -1)
        kept = torch.zeros(batch, heads, total + 1, dtype=torch.bool, device=device)
        row = torch.from_numpy(documents.row[chosen]).to(device)
        head = torch.arange(heads, device=device)
        kept[row[:, None, None], head[:, None], torch.where(slots < 0, total, slots)] = True
        return slots, kept[..., :total].contiguous()

    def backward(self, *_: object) -> Sequence[torch.Tensor | None]:
        raise AssertionError("a choice has no gradient")


@dataclasses.dataclass(frozen=True)
class _Group:
    """g documents of at most L tokens, S queries (the *asked* tokens) of each, and the keys that are near to those.

    Attributes:
        row: (g,) the row of each document.
        slot: (g, L) slot of each token in the row; beyond the document's end, that of its first token.
        token_mask: (g, L) whether there is a token.
        count: (g, L) number of asked queries that count for each key; 0 for sinks and where there is no token.
        rank: (g, S) number of each asked token within the document.
        asked: (g, S) whether there is an asked token.
        near: (g, S, 3C) numbers of the tokens that are near to it; some occur twice.
    """

    row: torch.Tensor
    slot: torch.Tensor
    token_mask: torch.Tensor
    count: torch.Tensor
    rank: torch.Tensor
    asked: torch.Tensor
    near: torch.Tensor

    @classmethod
    def of(cls, documents: Documents, which: np.ndarray, window: int, sinks: int, device: torch.device) -> "_Group":
        """The group of the documents `which` (g,)."""
        length = documents.length[which][:, None]
        place = np.arange(length.max())
        token_mask = place < length
        token = documents.token[documents.begin[which][:, None] + np.where(token_mask, place, 0)]
        rank = kept_encoder_keys.asked_ranks(length[:, 0])
        asked = rank >= 0
        rank = np.maximum(rank, 0)
        first = (rank // window - 1) * window
        near = first[..., None] + np.arange(3 * window)
        near = np.where((near >= 0) & (near < length[..., None]), near, rank[..., None])
        # The number of asked tokens per chunk, with an empty chunk at both ends; then summed over three chunks.
        chunks = -(-len(place) // window)
        of_chunk = np.zeros((len(which), chunks + 2), dtype=np.int64)
        np.add.at(of_chunk, (np.nonzero(asked)[0], rank[asked] // window + 1), 1)
        of_three = of_chunk[:, :-2] + of_chunk[:, 1:-1] + of_chunk[:, 2:]
        count = asked.sum(1, keepdims=True) - of_three[:, place // window]
        count[~token_mask | (place < sinks)] = 0
        tables = documents.row[which], token % documents.slots, token_mask, count, rank, asked, near
        return cls(*(torch.from_numpy(x).to(device) for x in tables))


@dataclasses.dataclass(frozen=True)
class _Asking:
    """Scores of all keys, from query (B, Hk, G, N, D), key (B, Hk, N, D) and length (B, Hk, N), the values' norms."""

    query: torch.Tensor
    key: torch.Tensor
    length: torch.Tensor
    sink_logits: torch.Tensor | None
    scaling: float

    def scores(self, group: _Group) -> torch.Tensor:
        """Scores (g, Hk, L), see `ops.kept_encoder_keys`."""
        heads, groups = self.query.shape[1:3]
        asked, size = group.rank.shape[1], group.slot.shape[1]
        block = BLOCK_LOGITS * (1 if self.key.device.type == "cpu" else TIMES_ON_GPU)
        pairs = torch.arange(len(group.row) * heads, device=self.key.device)
        found = []
        for part in pairs.split(max(1, block // (asked * groups * size))):  # pairs of a document and a head
            document, head = part // heads, part % heads
            place = group.row[document].unsqueeze(1), head.unsqueeze(1), group.slot[document]
            key, length, mass = self.key[place], self.length[place], self.length.new_zeros(len(part), groups, size)
            for some in torch.arange(asked, device=part.device).split(max(1, block // (len(part) * groups * size))):
                mass += self._mass(group, document, head, some, key)
            found.append(kept_encoder_keys.scores(mass, length, group.count[document]))
        return torch.cat(found).unflatten(0, (len(group.row), heads))

    def _mass(
        self, group: _Group, document: torch.Tensor, head: torch.Tensor, some: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        """Mass (P, G, L) that S' of the asked queries give to keys (P, L, D), for P pairs of a document and a head."""
        of_pair, row = document.unsqueeze(1), group.row[document].unsqueeze(1)
        slot = group.slot[of_pair, group.rank[of_pair, some]]
        query = self.query.transpose(2, 3)[row, head.unsqueeze(1), slot].transpose(1, 2) * self.scaling
        groups = query.shape[1]  # query (P, G, S', D)
        weights = query.flatten(1, 2) @ key.mT
        weights.masked_fill_(~group.token_mask[document].unsqueeze(1), -torch.inf)
        largest = weights.amax(-1)
        if self.sink_logits is not None:
            logits = self.sink_logits[head].to(largest).repeat_interleave(len(some), 1)
            largest = torch.maximum(largest, logits)
        total = weights.sub_(largest.unsqueeze(-1)).exp_().sum(-1)
        if self.sink_logits is not None:
            total += (logits - largest).exp_()
        asked, near = group.asked[of_pair, some].repeat(1, groups), group.near[of_pair, some].repeat(1, groups, 1)
        weights.scatter_(2, near, 0.0)
        shares = (asked / total).unflatten(1, (groups, 1, -1))
        return (shares @ weights.unflatten(1, (groups, -1))).squeeze(2)
