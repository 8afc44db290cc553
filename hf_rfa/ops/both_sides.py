"""Far sums of layers that see both sides: per chunk, those of all chunks of its document that are not near to it.

Subtracting the near chunks from a total would lose digits to cancellation, and running sums from both ends would be
two more tables as large as that of all chunks' sums. So for a block of chunks c, with w near chunks on each side,

    far sums of c = before + after + sums of those chunks j of the block and its w neighbours with |j - c| > w

where `before` and `after` hold what is near to no chunk of the block: one of each per block.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from hf_rfa.ops.chunks import BLOCK_CHUNKS
from hf_rfa.ops.scan import Sums, sums_of_members

#: A place that is far from every chunk.
FAR_AWAY = -(2**31)


def far_states(sums: Sums, segment_ids: torch.Tensor, near_chunks: int, start: Sums) -> Iterator[Sums]:
    """The far sums of the chunks, `BLOCK_CHUNKS` at a time.

    Args:
        sums: Of each chunk, see `chunk_sums`.
        segment_ids: (R, n) number of the document that a chunk belongs to.
        near_chunks: w, the chunks on each side that are near; -1: not even the chunk itself is.
        start: Sums (B, H, F, M + 1) and their log, which the first chunk's document begins with.
    """
    edge, blocks = max(near_chunks, 0), _blocks(sums, segment_ids)
    first = _Chunks(start[0].unsqueeze(2), start[1].unsqueeze(2), segment_ids[:, :1], blocks[0].place[:1] + FAR_AWAY)
    nothing = dataclasses.replace(
        first, sums=torch.zeros_like(first.sums), log_max=torch.full_like(first.log_max, -torch.inf)
    )
    lead = [first.part(0, 0), *(block.part(block.count - edge, block.count) for block in blocks[:-1])]
    trail = [*(block.part(0, edge) for block in blocks[1:]), first.part(0, 0)]
    before, after = [first], [nothing]
    for block, beside in zip(blocks[:-1], lead[:-1], strict=True):
        before.append(_total([before[-1], beside, block.part(0, block.count - edge)], -1))
    for block, beside in zip(blocks[:0:-1], trail[:0:-1], strict=True):
        after.append(_total([block.part(edge, block.count), beside, after[-1]], 0))
    for block, *others in zip(blocks, before, lead, trail, reversed(after), strict=True):
        read = [block, _joined(others)]
        members = [
            (block.document[:, :, None] == chunks.document[:, None])
            & ((block.place[:, None] - chunks.place).abs() > near_chunks)
            for chunks in read
        ]
        yield sums_of_members([(chunks.sums, chunks.log_max) for chunks in read], torch.cat(members, dim=2))


@dataclasses.dataclass(frozen=True)
class _Chunks:
    """n chunks, or the sums of many in the place of one.

    Attributes:
        sums, log_max: (B, H, n, F, M + 1), (B, H, n).
        document: (R, n) number of the document of each.
        place: (n,) number of each chunk, `FAR_AWAY` of many.
    """

    sums: torch.Tensor
    log_max: torch.Tensor
    document: torch.Tensor
    place: torch.Tensor

    @property
    def count(self) -> int:
        return len(self.place)

    def part(self, begin: int, end: int) -> "_Chunks":
        some = slice(begin, end)
        return _Chunks(self.sums[:, :, some], self.log_max[:, :, some], self.document[:, some], self.place[some])


def _blocks(sums: Sums, segment_ids: torch.Tensor) -> list[_Chunks]:
    # Split, not sliced: the gradient of a slice is as long as the whole sequence, and there is one per block.
    of_chunks = [x.split(BLOCK_CHUNKS, dim=2) for x in sums]
    place = torch.arange(segment_ids.shape[1], device=segment_ids.device).split(BLOCK_CHUNKS)
    return [_Chunks(*x) for x in zip(*of_chunks, segment_ids.split(BLOCK_CHUNKS, dim=1), place, strict=True)]


def _joined(parts: Sequence[_Chunks]) -> _Chunks:
    return _Chunks(
        torch.cat([x.sums for x in parts], dim=2),
        torch.cat([x.log_max for x in parts], dim=2),
        torch.cat([x.document for x in parts], dim=1),
        torch.cat([x.place for x in parts]),
    )


def _total(parts: Sequence[_Chunks], which: int) -> _Chunks:
    """The sum of those chunks that are of the same document as number `which` of them all."""
    documents = torch.cat([x.document for x in parts], dim=1)
    document = documents[:, which].unsqueeze(1)
    member = (documents == document).unsqueeze(1)
    sums, log_max = sums_of_members([(x.sums, x.log_max) for x in parts], member)
    return _Chunks(sums, log_max, document, parts[0].place.new_full((1,), FAR_AWAY))
