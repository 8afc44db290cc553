"""How much exact softmax attends to far keys, token by token: the mass that the far part has to estimate."""

import torch

from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.exact_keys import ExactKeys

#: Query rows that are scored at once, so that memory stays linear in the number of tokens.
ROWS = 256


def far_masses(call: OperatorCall, every: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weight of all far keys per query, and of each key as a far key over all queries.

        given_i = sum_{j in far(i)} p_ij,        taken_j = sum_{i: j in far(i)} p_ij,        p = softmax(scaling q.k)

    Far are the keys that a query sees, but not exactly (see `ops.exact_keys`); with `window = 0` all that it sees.

    Args:
        call: Without an earlier state and without exact heads. Its far kernel is not used.
        every: Only every so many-th query is asked, and counts as so many: the others give 0.

    Returns:
        given (B, Hk, G, N) and taken (B, Hk, N), float32. Time quadratic in N, memory linear.
    """
    query, key, exact_keys = call.query, call.key, ExactKeys.of(call)
    batch, heads, groups, length, _ = query.shape
    given = query.new_zeros(batch, heads, groups, length, dtype=torch.float32)
    taken = query.new_zeros(batch, heads, length, dtype=torch.float32)
    for row in range(batch):
        for rows in torch.arange(every // 2, length, every, device=query.device).split(ROWS):
            visible, exact = (x[0].unsqueeze(1) for x in exact_keys.pairs(rows, slice(row, row + 1)))
            far = visible & ~exact & exact_keys.token_mask[row, rows, None]
            scores = torch.einsum("hgnd,hmd->hgnm", query[row][:, :, rows].float(), key[row].float()) * call.scaling
            scores = scores.masked_fill(~visible, -torch.inf)
            total = scores.logsumexp(-1, keepdim=True)
            if call.sink_logits is not None:
                total = torch.logaddexp(total, call.sink_logits.float().view(heads, groups, 1, 1))
            # Padding sees nothing: its -inf - -inf is masked.
            weights = (scores - total).exp_().masked_fill_(~far, 0.0).mul_(every)
            given[row][:, :, rows] = weights.sum(-1)
            taken[row] += weights.sum((1, 2))
    return given, taken
