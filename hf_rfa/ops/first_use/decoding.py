"""The same for decoding: a state, and the tokens of some steps after it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.causal.chunked import chunked_causal
from hf_rfa.ops.first_use.kind import Kind
from hf_rfa.ops.first_use.problems import problem, small_length
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.ops.state import RFAState

Tokens = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class DecodingProblem:
    """The state after a small prompt, and the tokens of the following steps."""

    kernel: FarKernel
    settings: AttentionSettings
    state: RFAState
    steps: list[Tokens]

    @classmethod
    def of(cls, kind: Kind, device: torch.device, *, batch: int, heads: int, steps: int) -> "DecodingProblem":
        """Calls of that kind with random tokens; without gradients."""
        prompt = small_length(kind)
        call = problem(kind, device, batch=batch, heads=heads, length=prompt + steps).call
        first = {name: getattr(call, name)[..., :prompt, :] for name in ("query", "key", "value")}
        _, state = chunked_causal(call.replace(**first, output_final_state=True))
        assert state is not None
        settings = AttentionSettings(
            window=kind.window, sink_tokens=kind.sink_tokens, kept_keys=kind.kept_keys, scaling=call.scaling,
            sink_logits=None if call.sink_logits is None else call.sink_logits.flatten(),
        )  # fmt: skip
        whole = call.query.flatten(1, 2), call.key, call.value
        tokens = [[x[:, :, place : place + 1] for x in whole] for place in range(prompt, prompt + steps)]
        return cls(call.far, settings, state, [(q, k, v) for q, k, v in tokens])

    def decoded(self, backend: str) -> dict[str, torch.Tensor]:
        """The outputs of all steps, and what they leave behind, by name."""
        decoder = self._decoder(backend)
        outputs = [decoder.step(*tokens) for tokens in self.steps]
        state = decoder.state()
        sums = state.kv_state * state.log_max.exp()[..., None, None]
        found = {"output": torch.cat(outputs, dim=2), "far sums": sums}
        if state.kept_position is not None and state.mass is not None:
            found |= {"kept keys": state.kept_position + 1, "attention received": state.mass}
        return found

    def stepping(self, backend: str) -> Callable[[], None]:
        """A function that decodes the tokens of all steps, as often as it is called."""
        decoder = self._decoder(backend)

        def run() -> None:
            for tokens in self.steps:
                decoder.step(*tokens)

        return run

    def _decoder(self, backend: str) -> Any:
        from hf_rfa.ops.decode import Decoder  # which asks for verdicts itself

        return Decoder(*self.steps[0], self.kernel, self.settings.replace(backend=backend), self.state)
