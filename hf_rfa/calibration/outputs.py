"""What a model gives out, a block of tokens at a time: logits of a large vocabulary are never held for a whole text.

The vectors that a language model's head gets are kept instead of its logits. While the model runs, its head is given
the first token alone; afterwards it is called with a few tokens at a time, and what the model does to its logits (a
soft cap, a factor) is done to theirs. Whether that is what the model does is tried on the first token; if not, or if
the head is not called as a layer of its own, the logits are held whole, and a warning is logged once.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_rfa.report import NATS, RELATIVE

logger = logging.getLogger(__name__)

#: Bytes of the logits of one block, in float32 (about five tensors of that size are alive at once), and tokens that it
#: has at least, or reading the head would take longer than computing with it.
BLOCK_BYTES, BLOCK_TOKENS = 2**24, 32


@dataclass(frozen=True)
class Outputs:
    """The output of a model for one batch.

    Attributes:
        unit: NATS of a model with logits (B, N, V), RELATIVE of any other.
        tensor: (B, N, d) what the head gets; or the logits, or another output, whole.
        mask: (B, N) bool, False for padding; None if nothing is padded (or it is not known what is).
        logits: Logits of some tokens of `tensor`.
        size: V, entries of the logits of a token.
    """

    unit: str
    tensor: torch.Tensor
    mask: torch.Tensor | None
    logits: Callable[[torch.Tensor], torch.Tensor]
    size: int

    def detach(self) -> "Outputs":
        """The same without a graph."""
        return Outputs(self.unit, self.tensor.detach(), self.mask, self.logits, self.size)

    def blocks(self) -> Iterator[slice]:
        """Blocks of tokens whose logits may be held at once."""
        rows, length = self.tensor.shape[:2]
        step = max(1, max(BLOCK_TOKENS, BLOCK_BYTES // (4 * self.size)) // rows)
        yield from (slice(start, min(start + step, length)) for start in range(0, length, step))

    def weight(self) -> float:
        """What sums are divided by: the number of tokens (NATS), or the squared norm of the output (RELATIVE)."""
        if self.unit == NATS:
            return float(self.tensor[..., 0].numel() if self.mask is None else self.mask.sum())
        return self.kept(self.tensor).double().square().sum().item()

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, N, ...) with zeros at padding."""
        return x if self.mask is None else x * self.mask.view(*self.mask.shape, *(1,) * (x.dim() - 2)).to(x)

    def gradients(self, seeds: list[int], draws: int) -> list[torch.Tensor]:
        """Gradients of `tensor`, one per draw, whose products with a change have its square as the expected square.

        NATS: of sum_t log p(y_t), y drawn from p; (g . change)^2 / 2 is then the divergence that it makes. RELATIVE:
        of the product with noise N(0, I). seeds: one for each of the B rows.
        """
        if self.unit == RELATIVE:
            noise = [
                torch.randn(draws, *self.tensor.shape[1:], generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
            return [self.kept(torch.stack(rows).to(self.tensor)) for rows in zip(*noise, strict=True)]
        length = self.tensor.shape[1]
        uniform = torch.stack(
            [torch.rand(draws, length, generator=torch.Generator().manual_seed(seed)) for seed in seeds], dim=1
        ).to(self.tensor.device)
        found = [torch.empty_like(self.tensor, memory_format=torch.contiguous_format) for _ in range(draws)]
        for span in self.blocks():
            part = self.tensor[:, span].detach().requires_grad_()
            with torch.enable_grad():
                log_p = self.logits(part).float().log_softmax(-1)
            drawn = _inverse(log_p.detach(), uniform[:, :, span])
            for number, y in enumerate(drawn):
                with torch.enable_grad():
                    likelihood = log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
                kept = torch.ones_like(likelihood) if self.mask is None else self.mask[:, span].to(likelihood)
                again = number + 1 < draws
                found[number][:, span] = torch.autograd.grad(likelihood, part, kept, retain_graph=again)[0]
        return found


def _inverse(log_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draws (d, B, n) from the distributions log_p (B, n, V), by their inverse at uniform (d, B, n)."""
    sums = log_p.exp().cumsum_(-1)
    wanted = (uniform * sums[..., -1]).movedim(0, -1).contiguous()
    return torch.searchsorted(sums, wanted).clamp_(max=log_p.shape[-1] - 1).movedim(-1, 0)


class OutputReader:
    """Runs a model; see the module."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        try:
            head: Any = model.get_output_embeddings()
        except (AttributeError, NotImplementedError):  # Transformers' words for a model without a head
            head = None
        self._head: nn.Module | None = head if isinstance(head, nn.Module) else None
        self._after: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __call__(self, inputs: Mapping[str, Any]) -> Outputs:
        """The output for one batch, with its graph if gradients are recorded."""
        mask = inputs.get("attention_mask")
        if self._head is not None and inputs.get("labels") is None:  # the loss would need all logits
            found = self._shortened(self._head, inputs)
            if found is not None:
                return Outputs(NATS, found[0], _mask(mask, found[0]), *found[1:])
            logger.warning(
                "The logits of %s are held whole while it is calibrated: its head is not a layer that can be called "
                "with a few tokens at a time.", type(self.model).__name__,
            )  # fmt: skip
            self._head = None
        output = self.model(**inputs)
        logits = getattr(output, "logits", None)
        if isinstance(logits, torch.Tensor) and logits.dim() == 3:
            return Outputs(NATS, logits, _mask(mask, logits), lambda x: x, logits.shape[-1])
        return Outputs(RELATIVE, output[0], _mask(mask, output[0]), lambda x: x, 1)

    def _shortened(
        self, head: nn.Module, inputs: Mapping[str, Any]
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor], int] | None:
        """What the head gets, and logits of it; None if the model does not use its head as expected."""
        given: list[torch.Tensor] = []
        first: list[torch.Tensor] = []

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if len(args) != 1 or not isinstance(args[0], torch.Tensor) or args[0].dim() != 3:
                return None
            given.append(args[0])
            return (args[0][:, :1],)

        def behind(module: nn.Module, args: Any, output: Any) -> None:
            first.append(output)

        hooks = [head.register_forward_pre_hook(before), head.register_forward_hook(behind)]
        try:
            output = self.model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        final = getattr(output, "logits", None)
        if len(given) != 1 or len(first) != 1 or not isinstance(final, torch.Tensor) or final.dim() != 3:
            return None
        if self._after is None:
            self._after = _function_after(self.model, first[0].detach(), final.detach())
        after = self._after
        if after is None:
            return None

        def logits(x: torch.Tensor) -> torch.Tensor:
            return after(head(x))

        return given[0], logits, final.shape[-1]


def _function_after(
    model: PreTrainedModel, raw: torch.Tensor, final: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What the model does to the logits of its head, which it made `final` of; None if that is not known."""
    if raw.shape != final.shape:
        return None
    config = model.config.get_text_config()
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda x: x]
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "output_logit_soft_cap", None)
    if cap:
        ways.append(lambda x: (x / cap).tanh() * cap)
    if factor := getattr(config, "logit_scale", None):
        ways.append(lambda x: x * factor)
    if divisor := getattr(config, "logits_scaling", None):
        ways.append(lambda x: x / divisor)
    tolerance = 1e-5 if raw.dtype in (torch.float32, torch.float64) else 1e-2
    for way in ways:
        if torch.allclose(way(raw).float(), final.float(), rtol=tolerance, atol=tolerance):
            return way
    return None


def _mask(mask: Any, tensor: torch.Tensor) -> torch.Tensor | None:
    """The padding mask (B, N), if that is what `mask` is."""
    if isinstance(mask, torch.Tensor) and mask.shape == tensor.shape[:2]:
        return mask.bool().to(tensor.device)
    return None
