"""The tokens from which each chunk takes the keys that it keeps and those that it evicts.

Per row and key head, a pool holds the K kept keys of the state that a call continues, then the aligned tokens. Copies
per chunk live only as long as their block: K keys per chunk of C tokens would be K / C times all tokens.
"""

import torch


class Pool:
    """Keys or values of a call, looked up by index."""

    def __init__(self, of_state: torch.Tensor, tokens: torch.Tensor, continues: bool) -> None:
        """of_state (B, Hk, K, D), tokens (B, Hk, T, D); `continues`: whether the call continues a state."""
        # A new state has no kept keys, and tokens that need not follow its K empty places need not be copied.
        whole = torch.cat([of_state, tokens], dim=2) if continues else tokens
        self.shape, self.first = whole.shape, 0 if continues else of_state.shape[2]
        self._rows = whole.reshape(-1, whole.shape[-1])

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """The rows (A, n, L, D) at `index` (A, n, L); any at the empty places of a new state."""
        return self._rows.index_select(0, self.rows(index)).view(*index.shape, self.shape[-1])

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """`index` (A, n, L) as row numbers (A * n * L) over all pools."""
        starts = torch.arange(len(index), device=index.device) * self.shape[2]
        within = (index - self.first).clamp_min_(0) if self.first else index
        return (within + starts.view(-1, 1, 1)).flatten()


class PoolGradient:
    """The gradient of a pool's rows, accumulated block by block: where that of the tokens is, if it can be."""

    def __init__(self, pool: Pool, dtype: torch.dtype, tokens: torch.Tensor) -> None:
        """tokens (B * Hk, T, D), contiguous: the gradient of the tokens, which then begins at zero."""
        self._pool = pool
        #: Whether what is added goes to `tokens` at once: they are the whole pool, and precise enough for sums.
        self.shared = pool.first > 0 and tokens.dtype == dtype
        flat = tokens.view(-1, tokens.shape[-1])
        self._rows = flat.zero_() if self.shared else pool._rows.new_zeros(pool._rows.shape, dtype=dtype)

    def add(self, index: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add gradients (A, n, L, D) of the rows at `index` (A, n, L); those of empty places are zero."""
        self._rows.index_add_(0, self._pool.rows(index), gradient.flatten(0, 2))

    def finish(self, tokens: torch.Tensor, kept_keys: int) -> torch.Tensor:
        """Bring `tokens` up to date; the gradient of the state's kept keys (B, Hk, K, D)."""
        batch, heads, _, dim = self._pool.shape
        if self._pool.first:
            if not self.shared:
                tokens += self._rows.view_as(tokens)
            return tokens.new_zeros(batch, heads, kept_keys, dim)
        whole = self._rows.view(self._pool.shape)
        tokens += whole[:, :, kept_keys:].flatten(0, 1)
        return whole[:, :, :kept_keys]
