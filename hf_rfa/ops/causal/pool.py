"""The tokens from which each chunk takes the keys that it keeps and those that it lets go.

A pool has, per row and key head, the K kept keys of the state that a call continues, then the aligned tokens. Nothing
of it is copied per chunk for longer than its block lasts: K keys per chunk of C tokens are K / C times all tokens.
"""

import torch


class Pool:
    """Keys or values of a call, by index."""

    def __init__(self, of_state: torch.Tensor, tokens: torch.Tensor) -> None:
        """of_state (B, Hk, K, D), tokens (B, Hk, T, D)."""
        whole = torch.cat([of_state, tokens], dim=2)
        self.shape = whole.shape
        self._rows = whole.view(-1, whole.shape[-1])

    def take(self, index: torch.Tensor) -> torch.Tensor:
        """The rows (A, n, L, D) at `index` (A, n, L)."""
        return self._rows.index_select(0, pool_rows(index, self.shape)).view(*index.shape, self.shape[-1])

    def put(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Write what lies at `index` (A, L) into `rows` (L, A, D), one piece of memory."""
        starts = torch.arange(len(index), device=index.device) * self.shape[2]
        places = (index.T + starts).flatten()
        flat = rows.view(-1, rows.shape[-1])
        if rows.dtype == self._rows.dtype:
            torch.index_select(self._rows, 0, places, out=flat)
        else:
            flat.copy_(self._rows.index_select(0, places))


class PoolGradient:
    """The gradient of a pool's rows, gathered block by block."""

    def __init__(self, pool: Pool, dtype: torch.dtype) -> None:
        self._shape = pool.shape
        self._rows = pool._rows.new_zeros(pool._rows.shape, dtype=dtype)

    def add(self, index: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add gradients (A, n, L, D) of the rows at `index` (A, n, L)."""
        self._rows.index_add_(0, pool_rows(index, self._shape), gradient.flatten(0, 2))

    def split(self, kept_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the state's kept keys (B, Hk, K, D) and of the tokens (B, Hk, T, D)."""
        whole = self._rows.view(self._shape)
        return whole[:, :, :kept_keys], whole[:, :, kept_keys:]


def pool_rows(index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`index` (A, n, L) into pools of their own, of `shape` (B, Hk, K + T, D), as rows of all of them (A * n * L)."""
    starts = torch.arange(len(index), device=index.device) * shape[2]
    return (index + starts.view(-1, 1, 1)).flatten()
