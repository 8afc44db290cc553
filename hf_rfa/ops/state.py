"""`RFAState`: a layer's memory of the tokens it has seen, of a size independent of their number."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class RFAState:
    """Decoding state of one layer after `count` tokens. Immutable: every step returns a new one.

    With C = window, c0 = count // C the chunk of the next token, B rows, Hk linear key heads, D / M the dims of keys /
    values, F components of psi, s sink tokens and K kept keys:

    Attributes:
        kv_state: (B, Hk, F, M + 1) sums over the far keys, `sum_j psi(k_j) [v_j, 1]`, divided by exp(log_max): the
            columns are [S | z]. Far keys are those of chunks up to c0 - 2 except sinks and kept keys (all keys
            if C = 0). With a gate, key j has the weight exp(sum of log g over the tokens behind it).
        log_max: (B, Hk) running maximum of the far keys' log-scale, -inf while there are none.
        near_key, near_value: (B, Hk, 2C, D or M), the keys and values of chunks c0 - 1 and c0, in their places.
        sink_key, sink_value: (B, Hk, s, D or M), the first tokens of the sequence.
        count: (B,) int64 on the CPU, tokens seen by each row (without padding).
        kept_key, kept_value: (B, Hk, K, D or M), far keys that are seen exactly, in order, empty places first;
            None if K = 0, like the following three.
        kept_position: (B, Hk, K) int64, positions of these tokens in their document; -1 in empty places.
        kept_decay: (B, Hk, K), sum of log g over the tokens behind each key; 0 without a gate.
        mass: (B, Hk, G, K + 2C), attention received by the kept and the near keys from each of the G query heads,
            see `ops.kept_keys`.
        exact_key, exact_value: (B, He, T, D or M), the whole KV cache of the softmax heads; None if there are none.
        exact_mask: (B, T) bool, which of its slots hold a token; None if all do.
        beside: The states of the heads that keep more keys, ascending; all other fields are of the first group.
    """

    kv_state: torch.Tensor
    log_max: torch.Tensor
    near_key: torch.Tensor
    near_value: torch.Tensor
    sink_key: torch.Tensor
    sink_value: torch.Tensor
    count: torch.Tensor
    kept_key: torch.Tensor | None = None
    kept_value: torch.Tensor | None = None
    kept_position: torch.Tensor | None = None
    kept_decay: torch.Tensor | None = None
    mass: torch.Tensor | None = None
    exact_key: torch.Tensor | None = None
    exact_value: torch.Tensor | None = None
    exact_mask: torch.Tensor | None = None
    beside: "tuple[RFAState, ...]" = ()

    @classmethod
    def empty(
        cls, batch: int, key: torch.Tensor, value: torch.Tensor, components: int, window: int, sink_tokens: int,
        kept_keys: int = 0, groups: int = 1,
    ) -> "RFAState":  # fmt: skip
        """The state before the first token, with shapes and device from key (_, Hk, _, D) and value (_, Hk, _, M)."""
        shapes = cls.shapes(batch, key, value, components, window, sink_tokens, kept_keys, groups)
        wide = accumulation_dtype(key.dtype)
        kept: dict[str, Any] = {}
        if kept_keys:
            kept = {
                "kept_key": key.new_zeros(shapes["kept_key"]),
                "kept_value": value.new_zeros(shapes["kept_value"]),
                "kept_position": key.new_full(shapes["kept_position"], -1, dtype=torch.int64),
                "kept_decay": key.new_zeros(shapes["kept_decay"], dtype=wide),
                "mass": key.new_zeros(shapes["mass"], dtype=wide),
            }
        return cls(
            kv_state=key.new_zeros(shapes["kv_state"], dtype=wide),
            log_max=key.new_full(shapes["log_max"], -torch.inf, dtype=wide),
            near_key=key.new_zeros(shapes["near_key"]),
            near_value=value.new_zeros(shapes["near_value"]),
            sink_key=key.new_zeros(shapes["sink_key"]),
            sink_value=value.new_zeros(shapes["sink_value"]),
            count=torch.zeros(batch, dtype=torch.int64),
            **kept,
        )

    @staticmethod
    def shapes(
        batch: int, key: torch.Tensor, value: torch.Tensor, components: int, window: int, sink_tokens: int,
        kept_keys: int = 0, groups: int = 1,
    ) -> dict[str, tuple[int, ...]]:  # fmt: skip
        """The shapes of the linear heads' tensors, see `empty`."""
        heads, dim, value_dim = key.shape[1], key.shape[-1], value.shape[-1]
        sinks = sink_tokens if window else 0
        kept = {}
        if kept_keys:
            kept = {
                "kept_key": (batch, heads, kept_keys, dim),
                "kept_value": (batch, heads, kept_keys, value_dim),
                "kept_position": (batch, heads, kept_keys),
                "kept_decay": (batch, heads, kept_keys),
                "mass": (batch, heads, groups, kept_keys + 2 * window),
            }
        return {
            "kv_state": (batch, heads, components, value_dim + 1),
            "log_max": (batch, heads),
            "near_key": (batch, heads, 2 * window, dim),
            "near_value": (batch, heads, 2 * window, value_dim),
            "sink_key": (batch, heads, sinks, dim),
            "sink_value": (batch, heads, sinks, value_dim),
            **kept,
        }

    @property
    def kept(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """kept_key, kept_value, kept_position, kept_decay and mass; only for states with kept keys."""
        key, value, position, decay, mass = (
            self.kept_key, self.kept_value, self.kept_position, self.kept_decay, self.mass,
        )  # fmt: skip
        assert key is not None
        assert value is not None
        assert position is not None
        assert decay is not None
        assert mass is not None
        return key, value, position, decay, mass

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors().values()) + sum(state.nbytes for state in self.beside)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RFAState":
        """The state with `function` applied to every tensor (all have the batch as first dimension)."""
        tensors = {name: function(tensor) for name, tensor in self._tensors().items()}
        return dataclasses.replace(self, **tensors, beside=tuple(state.map(function) for state in self.beside))

    @classmethod
    def cat(cls, states: Sequence["RFAState"]) -> "RFAState":
        """Concatenate several states along the batch; shorter caches of exact heads are padded in front."""
        states = _of_one_width(states)
        names = states[0]._tensors()
        rows: dict[str, Any] = {name: torch.cat([getattr(state, name) for state in states]) for name in names}
        groups = zip(*(state.beside for state in states), strict=True)
        return cls(**rows, beside=tuple(cls.cat(group) for group in groups))

    def narrowed(self, width: int) -> "RFAState":
        """The state with only the last `width` slots of the exact heads' cache, if it has more."""
        if self.exact_key is None or self.exact_value is None or self.exact_key.shape[2] <= width:
            return self
        last = slice(self.exact_key.shape[2] - width, None)
        mask = None if self.exact_mask is None else self.exact_mask[:, last]
        return dataclasses.replace(
            self, exact_key=self.exact_key[:, :, last].contiguous(),
            exact_value=self.exact_value[:, :, last].contiguous(),
            exact_mask=None if mask is None or bool(mask.all()) else mask,
        )  # fmt: skip

    def select_rows(self, rows: torch.Tensor) -> "RFAState":
        """The state of some rows, for beams and batch selection; `rows` (n,) int64."""
        return self.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def to(self, device: torch.device) -> "RFAState":
        """The state on another device; `count` stays on the CPU."""
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items() if name != "count"}
        return dataclasses.replace(self, **moved, beside=tuple(state.to(device) for state in self.beside))

    def detach(self) -> "RFAState":
        """The state detached from autograd, for truncated backpropagation through time."""
        return self.map(torch.Tensor.detach)

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def to_dict(self) -> dict[str, Any]:
        """The tensors by name, for saving."""
        return {**self._tensors(), "beside": [state.to_dict() for state in self.beside]}

    @classmethod
    def from_dict(cls, saved: dict[str, Any]) -> "RFAState":
        """The inverse of `to_dict`."""
        beside = tuple(cls.from_dict(state) for state in saved.get("beside", ()))
        return cls(**{**saved, "beside": beside})


def _of_one_width(states: Sequence[RFAState]) -> Sequence[RFAState]:
    """The states with caches of exact heads that have equally many slots, and a mask if any of them is empty."""
    found = [state.exact_key for state in states]
    if any(key is None for key in found):
        return states
    widths = [key.shape[2] for key in found if key is not None]
    if len(set(widths)) == 1 and all(state.exact_mask is None for state in states):
        return states
    padded = []
    for state, width in zip(states, widths, strict=True):
        assert state.exact_key is not None
        assert state.exact_value is not None
        empty, mask = max(widths) - width, state.exact_mask
        if mask is None:
            mask = torch.ones(len(state.count), width, dtype=torch.bool, device=state.exact_key.device)
        padded.append(dataclasses.replace(
            state, exact_key=F.pad(state.exact_key, (0, 0, empty, 0)),
            exact_value=F.pad(state.exact_value, (0, 0, empty, 0)), exact_mask=F.pad(mask, (empty, 0)),
        ))  # fmt: skip
    return padded


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of features, S, z and the division: float32 at least, whatever the model's dtype."""
    return torch.promote_types(dtype, torch.float32)
