"""`OperatorCall`: the operator's arguments, checked once, in the shapes that all forms work on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from hf_rfa.errors import ConfigError
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.features.maps import feature_map_of_heads
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import BACKENDS, AttentionSettings
from hf_rfa.ops.state import RFAState, accumulation_dtype


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """One call of the operator: B rows, Hk key heads with G query heads each, N new tokens, head dims D and M.

    Attributes:
        query: (B, Hk, G, N, D), the query heads grouped by key head.
        key, value: (B, Hk, N, D), (B, Hk, N, M).
        far: The far kernel of the Hk key heads.
        sink_logits: (Hk, G) or None.
        state: The state to continue from; None at the beginning of a sequence.
        kept_of_heads: Number of kept keys per key head.
        output_final_state: Whether the state after the last token is wanted.
        statistics: Counts how often the far part is dropped; None if that is not wanted.
        softmax_heads, sliding_window, backend: See `AttentionSettings`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    far: FarKernel
    causal: bool
    window: int
    sink_tokens: int
    scaling: float
    layout: TokenLayout
    softmax_heads: tuple[int, ...]
    sliding_window: int | None
    sink_logits: torch.Tensor | None
    state: RFAState | None
    backend: str = "auto"
    kept_of_heads: tuple[int, ...] = ()
    output_final_state: bool = False
    statistics: FarStatistics | None = None

    @classmethod
    def of(
        cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kernel: FarKernel,
        settings: AttentionSettings, layout: TokenLayout, state: RFAState | None = None,
    ) -> "OperatorCall":  # fmt: skip
        """The call for these arguments of `attend`; raises `ConfigError` if they do not fit."""
        check_tokens(query, key, value)
        batch, heads, length, dim = query.shape
        key_heads = key.shape[1]
        far = _fitting(kernel, key_heads, dim, settings.causal).to(accumulation_dtype(query.dtype), query.device)
        check_backend(settings.backend)
        window, sink_tokens, causal = settings.window, settings.sink_tokens, settings.causal
        if window < 0 or sink_tokens < 0 or (window and sink_tokens > window):
            raise ConfigError(
                f"`window` must be >= 0 and `sink_tokens` between 0 and `window`. Got window={window}, "
                f"sink_tokens={sink_tokens}. Set, for example, window=64, sink_tokens=4."
            )
        kept = settings.kept_keys
        kept = (kept,) * key_heads if isinstance(kept, int) else tuple(kept)
        if len(kept) != key_heads:
            raise ConfigError(
                f"`kept_keys` must be a number, or one per key head ({key_heads}). Got {len(kept)} numbers. Pass one "
                "for each."
            )
        if min(kept) < 0 or (any(kept) and not window):
            raise ConfigError(
                "`kept_keys` must be >= 0, and 0 without a window: where nothing is exact no key has a score. Got "
                f"kept_keys={settings.kept_keys}, window={window}. Set a window, for example 64."
            )
        layout.check(batch, length)
        sink_logits = settings.sink_logits
        if sink_logits is not None:
            _expect("sink_logits", sink_logits.shape, (heads,), "(query heads,)")
            sink_logits = sink_logits.unflatten(0, (key_heads, -1))
        exact, sliding_window = tuple(sorted(set(settings.softmax_heads))), settings.sliding_window
        if exact and not 0 <= exact[0] <= exact[-1] < key_heads:
            raise ConfigError(
                f"`softmax_heads` must be key heads 0..{key_heads - 1}. Got {list(exact)}. Remove the others."
            )
        if sliding_window is not None and (len(exact) < key_heads or not causal or sliding_window < 1):
            raise ConfigError(
                f"`sliding_window` belongs to causal layers whose key heads are all exact. Got {sliding_window}, "
                f"causal={causal}, softmax_heads={list(exact)}. Pass all key heads as `softmax_heads`."
            )
        if state is not None and len(state.count) != batch:
            raise ConfigError(
                f"`initial_state` must have as many rows as query. Got {len(state.count)} instead of {batch}. Use "
                "`state.select_rows`."
            )
        scaling = float(settings.scaling)
        if scaling <= 0:
            raise ConfigError(f"`scaling` must be positive. Got {scaling}. Pass the factor that the model gives q.k.")
        return cls(
            query.unflatten(1, (key_heads, -1)), key, value, far, causal, window, sink_tokens, scaling, layout, exact,
            sliding_window, sink_logits, state, settings.backend, kept,
        )  # fmt: skip

    @property
    def linear_heads(self) -> list[int]:
        """The key heads that are not exact."""
        return [head for head in range(self.key.shape[1]) if head not in self.softmax_heads]

    def heads(self, heads: Sequence[int]) -> "OperatorCall":
        """The call restricted to some key heads; the state is passed on unchanged."""
        index = consecutive(heads)
        logits = None if self.sink_logits is None else self.sink_logits[index]
        return self.replace(
            query=self.query[:, index],
            key=self.key[:, index],
            value=self.value[:, index],
            far=self.far.select(heads),
            kept_of_heads=tuple(self.kept_of_heads[head] for head in heads),
            sink_logits=logits,
        )

    @property
    def kept_keys(self) -> int:
        """K, for calls whose heads all keep the same number of keys, such as those of one group."""
        numbers = set(self.kept_of_heads)
        assert len(numbers) <= 1, "a call of several groups"
        return numbers.pop() if numbers else 0

    @property
    def most_kept(self) -> int:
        """K, the most keys that a head keeps."""
        return max(self.kept_of_heads, default=0)

    def groups(self) -> list[tuple[list[int], "OperatorCall"]]:
        """Linear heads grouped by their number of kept keys (ascending), each group with its own call and state.

        Raises:
            ConfigError: The state has different groups.
        """
        linear = self.linear_heads
        if not linear:
            return []
        numbers = sorted({self.kept_of_heads[head] for head in linear})
        states = (None,) * len(numbers) if self.state is None else (self.state, *self.state.beside)
        if len(states) != len(numbers):
            raise ConfigError(
                f"`initial_state` comes from another kind of call: its heads keep {len(states)} different numbers of "
                f"keys, those of this call {len(numbers)}. Continue with the `kept_keys` of that call."
            )
        if len(numbers) == 1 and len(linear) == self.key.shape[1]:
            return [(linear, self)]
        found = []
        for number, state in zip(numbers, states, strict=True):
            heads = [head for head in linear if self.kept_of_heads[head] == number]
            found.append((heads, self.heads(heads).replace(state=state)))
        return found

    def to(self, dtype: torch.dtype) -> "OperatorCall":
        """The call with q, k, v and the far kernel in `dtype`."""
        far = self.far.to(dtype)
        if far is self.far and self.query.dtype == self.key.dtype == self.value.dtype == dtype:
            return self
        return self.replace(query=self.query.to(dtype), key=self.key.to(dtype), value=self.value.to(dtype), far=far)

    def cpu(self) -> "OperatorCall":
        """The call with all of its tensors on the CPU; itself if they are there."""
        there = torch.device("cpu")
        if self.query.device == there:
            return self
        return self.replace(
            query=self.query.cpu(), key=self.key.cpu(), value=self.value.cpu(),
            far=self.far.to(self.far.omega.dtype, there),
            sink_logits=None if self.sink_logits is None else self.sink_logits.cpu(),
            state=None if self.state is None else self.state.to(there),
        )  # fmt: skip

    def replace(self, **changes: Any) -> "OperatorCall":
        """The call with some fields changed."""
        return dataclasses.replace(self, **changes)

    def empty_state(self) -> RFAState:
        """The state before the first token of this call's key heads."""
        return RFAState.empty(*self._state_size())

    def check_state(self) -> None:
        """Raise `ConfigError` if the initial state belongs to a call with different shapes, window or sinks."""
        if self.state is None:
            return
        shapes = RFAState.shapes(*self._state_size())
        if not self.most_kept and self.state.kept_key is not None:
            shapes["kept_key"] = (*self.state.kept_key.shape[:2], 0, self.state.kept_key.shape[3])
        for name, want in shapes.items():
            tensor = getattr(self.state, name)
            got = None if tensor is None else tuple(tensor.shape)
            if got != want:
                raise ConfigError(
                    f"`initial_state` comes from another kind of call: its `{name}` has shape {got}, this call "
                    f"needs {want}. Continue with the window, sinks, kept "
                    "keys, heads, features and causality of that call."
                )

    def _state_size(self) -> tuple[int, torch.Tensor, torch.Tensor, int, int, int, int, int]:
        # A state of the bidirectional form has neither near nor kept keys.
        window, kept_keys = (self.window, self.most_kept) if self.causal else (0, 0)
        exact = window, self.sink_tokens, kept_keys, self.query.shape[2]
        return len(self.query), self.key, self.value, self.far.num_components, *exact


def consecutive(heads: Sequence[int]) -> slice | list[int]:
    """An index of these heads: a slice if possible, which copies nothing."""
    index = list(heads)
    if index and index == list(range(index[0], index[-1] + 1)):
        return slice(index[0], index[-1] + 1)
    return index


def check_backend(name: str) -> None:
    """Raise `ConfigError` if there is no backend of that name."""
    if name not in BACKENDS:
        raise ConfigError(f"`backend` must be one of {list(BACKENDS)}. Got {name!r}. Leave it 'auto'.")


def check_tokens(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise `ConfigError` unless the shapes and types of q, k and v fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4 or not tensor.is_floating_point():
            is_tensor = isinstance(tensor, torch.Tensor)
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if is_tensor else type(tensor).__name__
            raise ConfigError(
                f"`{name}` must be a floating-point tensor (batch, heads, seq, dim). Got {got}. Reshape it."
            )
    batch, heads, length, dim = query.shape
    key_heads, value_dim = key.shape[1], value.shape[-1]
    _expect("key", key.shape, (batch, key_heads, length, dim), "(batch, key_heads, seq, head_dim of query)")
    _expect("value", value.shape, (batch, key_heads, length, value_dim), "(batch, key_heads, seq, value_dim)")
    if batch == 0 or length == 0:
        raise ConfigError(
            f"There must be at least one row with one token. Got {batch} rows of {length} tokens. Leave empty batches "
            "out."
        )
    if key_heads == 0 or heads % key_heads:
        raise ConfigError(
            f"There must be a number of query heads that key heads divide. Got {heads} query heads, {key_heads} key "
            "heads. Pass key and value without repetition."
        )


def _fitting(kernel: FarKernel, key_heads: int, dim: int, causal: bool) -> FarKernel:
    """The kernel, if it fits the number of key heads and the head dim; raises `ConfigError` otherwise."""
    omega = kernel.omega
    if omega.dim() != 3 or omega.shape[0] != key_heads or omega.shape[2] != dim:
        raise ConfigError(
            f"`omega` must have shape (key_heads, num_features, head_dim) = ({key_heads}, m, {dim}). Got "
            f"{tuple(omega.shape)}. Draw it with `hf_rfa.features.omega.draw_omega`."
        )
    feature_map_of_heads(kernel.feature_maps, key_heads)
    per_head, row = ((key_heads,), "(key heads,)"), ((key_heads, dim), "(key heads, head_dim)")
    matrix = ((key_heads, dim, dim), "(key heads, head_dim, head_dim)")
    wanted = {
        "alpha": per_head, "gamma": per_head, "proposal": per_head, "query_center": row, "key_center": row,
        "query_transform": matrix, "key_transform": matrix, "query_radius": per_head, "key_radius": per_head,
        "gate_weight": row, "gate_bias": per_head, "far_limit": per_head,
    }  # fmt: skip
    for name, (shape, meaning) in wanted.items():
        tensor = getattr(kernel, name)
        if tensor is not None:
            _expect(name, tensor.shape, shape, meaning)
    if (kernel.gate_weight is None) != (kernel.gate_bias is None):
        raise ConfigError(
            "`gate_weight` and `gate_bias` describe one gate. Got only one of them. Pass both, or None for both."
        )
    if kernel.gate_weight is not None and not causal:
        raise ConfigError(
            "The gate forgets what lies behind a query: it needs an order of time. Got a gate with causal=False. "
            "Drop `gate_weight` and `gate_bias` (RFAConfig(gate=False))."
        )
    return kernel


def _expect(name: str, got: Sequence[int], want: Sequence[int], meaning: str) -> None:
    if tuple(got) != tuple(want):
        raise ConfigError(
            f"`{name}` must have shape {meaning} = {tuple(want)}. Got {tuple(got)}. Reshape or slice it."
        )
