"""The state that one piece of a document passes to the next: truncated backpropagation through the RFA state.

Each piece starts from the state at the end of the piece before, detached: gradients reach back to the piece's own
first token, and earlier pieces have their effect through [S | z], the near keys and the sinks. The state of a linear
head has a constant size, so a document of any length trains in constant memory. **Heads that stay softmax** keep the
keys and values of the whole document so far, as in decoding: correct, but `2 * head_dim * heads * bytes` more per
token. With `RFAConfig(softmax_heads=None)` memory is constant.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_rfa.data.document_batches import Batch
from hf_rfa.errors import ConfigError
from hf_rfa.ops.state import RFAState
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.cache import RFACacheLayer


class Carry:
    """The carried states of the rows of one lane of batches (see `carried_batches`)."""

    def __init__(self) -> None:
        self.cache: DynamicCache | None = None

    def start(self, batch: Batch) -> DynamicCache:
        """The cache that the batch's forward continues: states are detached, and empty in fresh rows."""
        assert batch.fresh is not None
        if self.cache is None or bool(batch.fresh.all()):
            self.cache = DynamicCache()
        for layer in self.cache.layers:
            if isinstance(layer, RFACacheLayer) and layer.state is not None:
                layer.hand_on()  # an optimiser step in between may have changed learned features
                layer.state = without_rows(layer.state.detach(), batch.fresh)
        return self.cache

    def state_dict(self) -> list[dict[str, Any]]:
        """The tensors of every layer, for a checkpoint."""
        layers = [] if self.cache is None else self.cache.layers
        saved = []
        for layer in layers:
            assert isinstance(layer, RFACacheLayer)
            assert layer.state is not None
            saved.append({"state": layer.state.detach().to_dict(), "seen": layer.seen})
        return saved

    def load_state_dict(self, saved: list[dict[str, Any]], device: torch.device) -> None:
        """Continue from `state_dict`."""
        self.cache = DynamicCache() if saved else None
        for entry in saved:
            layer = RFACacheLayer()
            layer.state = RFAState.from_dict(entry["state"]).to(device)
            layer.seen = entry["seen"]
            layer.lazy_initialization(layer.state.near_key, layer.state.near_value)
            assert self.cache is not None
            self.cache.layers.append(layer)


def check_carry(model: PreTrainedModel) -> None:
    """Check that a model can pass on a state.

    Raises:
        UnsupportedModelError: the model is not converted, so that its cache would hold every token.
        ConfigError: activation checkpointing, under which Transformers drops the cache; or omega may be redrawn in
            the middle of a document.
    """
    config = require_adapters(model)[0].config
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ConfigError(
            "Transformers drops the cache under activation checkpointing, and with it the state that a cut document "
            "carries. Turn one of the two off: the pieces are short already."
        )
    if config.resample != "never":
        raise ConfigError(
            f"A carried state was summed with one draw of omega. Got resample={config.resample!r}. Convert with "
            "RFAConfig(resample='never'), or pack the documents instead."
        )


def without_rows(state: RFAState, rows: Tensor) -> RFAState:
    """The state with `rows` (batch,) bool reset to the empty state; old slots that no row needs are dropped."""

    def cleared(tensor: Tensor, empty: float) -> Tensor:
        mask = rows.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1))
        return torch.where(mask, torch.full((), empty, dtype=tensor.dtype, device=tensor.device), tensor)

    if bool(rows.any()):
        token_mask = state.exact_mask
        if state.exact_key is not None and token_mask is None:
            token_mask = torch.ones(
                len(rows), state.exact_key.shape[2], dtype=torch.bool, device=state.exact_key.device
            )
        emptied = dataclasses.replace(state, exact_mask=token_mask).map(lambda tensor: cleared(tensor, 0))
        state = dataclasses.replace(emptied, log_max=cleared(state.log_max, -torch.inf))
        if state.kept_position is not None:
            state = dataclasses.replace(state, kept_position=cleared(state.kept_position, -1))
        state = dataclasses.replace(state, beside=tuple(without_rows(other, rows) for other in state.beside))
    if state.exact_key is None or state.exact_value is None or state.exact_mask is None:
        return state
    used = state.exact_mask.any(0).nonzero()
    first = int(used[0]) if len(used) else state.exact_mask.shape[1]
    return dataclasses.replace(
        state,
        exact_key=state.exact_key[:, :, first:],
        exact_value=state.exact_value[:, :, first:],
        exact_mask=state.exact_mask[:, first:],
    )
