"""The training loss (next token, and KL to the original) as one module, which DDP, FSDP and autocast wrap whole."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_rfa.data.document_batches import IGNORED
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.quiet import evaluation_mode

#: Positions whose float32 logits are computed at a time.
POSITIONS_AT_ONCE = 512


class LossModule(nn.Module):
    """Sum over positions of the next-token loss, plus `kl_weight` times KL(teacher || model), in nats.

    Args:
        model: a causal LM.
        fused: never hold the logits of all positions. The hidden states go through
            `torch.nn.functional.linear_cross_entropy`; before torch 2.13, and for the KL term, in blocks of
            `POSITIONS_AT_ONCE` positions whose logits the backward pass recomputes.
        autocast: run everything under autocast to this dtype. Autocast around the module would be ended by DeepSpeed.
        teacher: the original, for the KL term; it is not trained, saved or changed.
    """

    def __init__(
        self, model: PreTrainedModel, *, fused: bool, autocast: torch.dtype | None = None, kl_weight: float = 0.0,
        teacher: PreTrainedModel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model, self.fused, self.autocast, self.kl_weight = model, fused, autocast, kl_weight
        # In a tuple, so that it is not a submodule: it must not be wrapped, saved or moved with the model.
        self._original = (teacher,)
        # FSDP and DeepSpeed read from here which layers to shard.
        self._no_split_modules = getattr(model, "_no_split_modules", None)
        self.config = model.config
        self._checked = False

    def forward(self, input_ids: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """Loss () in nats, summed over the targets that are not `IGNORED`; input_ids, targets (batch, seq)."""
        with torch.autocast(input_ids.device.type, self.autocast, enabled=self.autocast is not None):
            return self._loss(input_ids, targets.flatten(), inputs)

    def _loss(self, input_ids: Tensor, flat: Tensor, inputs: dict[str, Any]) -> Tensor:
        if not self.fused:
            logits = self.model(input_ids=input_ids, **inputs).logits.flatten(0, 1)
            loss = F.cross_entropy(logits.float(), flat, ignore_index=IGNORED, reduction="sum")
            parts = iter(logits.split(POSITIONS_AT_ONCE))
        else:
            hidden, head, last = self._hidden(self.model, input_ids, inputs)
            if not self._checked:
                _check_head(hidden, head, last)
                self._checked = True
            hidden = hidden.flatten(0, 1)
            loss = _fused_nll(hidden, head, flat)
            parts = (checkpoint(head, part, use_reentrant=False) for part in hidden.split(POSITIONS_AT_ONCE))
        return loss if self._original[0] is None else loss + self.kl_weight * self._kl(parts, input_ids, flat, inputs)

    def _kl(self, parts: Iterator[Tensor], input_ids: Tensor, targets: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Sum of KL(teacher || model) over the positions that have a target."""
        teacher: Any = self._original[0]
        with evaluation_mode(teacher):
            if self.fused:
                hidden, head, _ = self._hidden(teacher, input_ids, inputs)
                originals = (head(part) for part in hidden.flatten(0, 1).split(POSITIONS_AT_ONCE))
            else:
                logits = teacher(input_ids=input_ids, **inputs).logits.flatten(0, 1)
                originals = iter(logits.split(POSITIONS_AT_ONCE))
        total = torch.zeros((), device=targets.device)
        for target in targets.split(POSITIONS_AT_ONCE):
            with torch.no_grad():
                original = next(originals).float().log_softmax(-1)
            block = checkpoint(_kl_sum, next(parts), original, target != IGNORED, use_reentrant=False)
            total = total + block
        return total

    @staticmethod
    def _hidden(model: Any, input_ids: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Any, Tensor]:
        """Hidden states before the head (batch, seq, width), the head, and the logits of the last position.

        They come from a forward of the whole model, so that its hooks run (one of them redraws omega).
        """
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        seen: list[Tensor] = []
        hook = causal.base_model.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        try:
            # A tensor: with a number, Gemma 4 computes its last layers for those positions alone.
            last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
            logits = model(input_ids=input_ids, logits_to_keep=last, **inputs).logits
        finally:
            hook.remove()
        return seen[-1], causal.get_output_embeddings(), logits


def _fused_nll(hidden: Tensor, head: Any, targets: Tensor) -> Tensor:
    """Sum of the next-token loss (); hidden (N, width), targets (N,)."""
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(
            hidden,
            head.weight.to(hidden.dtype),
            targets,
            linear_bias=None if head.bias is None else head.bias.to(hidden.dtype),
            ignore_index=IGNORED,
            reduction="sum",
            options=torch.nn.LinearCrossEntropyOptions(),
        )
    pairs = zip(hidden.split(POSITIONS_AT_ONCE), targets.split(POSITIONS_AT_ONCE), strict=True)
    return torch.stack([checkpoint(_nll_sum, head, *pair, use_reentrant=False) for pair in pairs]).sum()


def _nll_sum(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, ignore_index=IGNORED, reduction="sum")


def _kl_sum(logits: Tensor, original: Tensor, counted: Tensor) -> Tensor:
    per_token = F.kl_div(logits.float().log_softmax(-1), original, reduction="none", log_target=True).sum(-1)
    return (per_token * counted).sum()


@torch.no_grad()
def _check_head(hidden: Tensor, head: Any, last: Tensor) -> None:
    """Refuse models that scale or cap their logits after the head: the fused loss would be another one."""
    expected = head(hidden[:, -1:])
    if not torch.allclose(expected.float(), last.float(), rtol=1e-2, atol=1e-3):
        raise ConfigError(
            "This model changes its logits after the output projection (a scale or a cap), which the fused loss does "
            f"not see: they differ by {float((expected - last).abs().max()):.3g}. Set `fused_loss=False`."
        )
