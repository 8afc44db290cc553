"""The tokens from which each chunk takes the keys that it keeps and those that it evicts.

Per row and key head, a pool holds the K kept keys of the state that a call continues, then the aligned tokens. Copies
per chunk live only as long as their block: K keys per chunk of C tokens would be K / C times all tokens.
"""

import torch


class Pool:
    """Keys or values of a call, looked up by index."""

    def __init__(self, of_state: torch.Tensor, tokens: torch.Tensor) -> None:
        """of_state (B, Hk, K, D), tokens (B, Hk, T, D)."""
        whole = torch.cat([of_state, tokens], dim=2)
        self.shape = whole.shape
        self._rows = whole.view(-1, whole.shape[-1])
        self._starts = torch.arange(whole.shape[0] * whole.shape[1], device=whole.device) * whole.shape[2]

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """The rows (A, n, L, D) at `index` (A, n, L)."""
        return self._rows.index_select(0, pool_rows(index, self.shape)).view(*index.shape, self.shape[-1])

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """`index` (A, L) as row numbers (L * A) over all pools of this length, for `put`."""
        return (index.T + self._starts).flatten()

    def put(self, rows: torch.Tensor, target: torch.Tensor) -> None:
        """Write the `rows` (L * A) to `target` (L, A, D), which is contiguous."""
        flat = target.view(-1, target.shape[-1])
        if target.dtype == self._rows.dtype:
            torch.index_select(self._rows, 0, rows, out=flat)
        else:
            flat.copy_(self._rows.index_select(0, rows))


class PoolGradient:
    """The gradient of a pool's rows, accumulated block by block."""

    def __init__(self, pool: Pool, dtype: torch.dtype) -> None:
        self._shape = pool.shape
        self._rows = pool._rows.new_zeros(pool._rows.shape, dtype=dtype)

    def add(self, index: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add gradients (A, n, L, D) of the rows at `index` (A, n, L)."""
        self._rows.index_add_(0, pool_rows(index, self._shape), gradient.flatten(0, 2))

    def split(self, kept_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the state's kept keys (B, Hk, K, D) and of the tokens (B, Hk, T, D)."""
        whole = self._rows.view(self._shape)
        return whole[:, :, :kept_keys], whole[:, :, kept_keys:]


def pool_rows(index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`index` (A, n, L), one pool of `shape` (B, Hk, K + T, D) each, as row numbers (A * n * L) over all pools."""
    starts = torch.arange(len(index), device=index.device) * shape[2]
    return (index + starts.view(-1, 1, 1)).flatten()
