"""Forwards that a cache layer can take back, whole or in part."""

import dataclasses
from dataclasses import dataclass

from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.state import RFAState
from hf_rfa.runtime.attention_call import AttendInputs


@dataclass(frozen=True)
class RecordedStep:
    """One forward: the state before it and the tokens that it added."""

    before: RFAState | None
    new: AttendInputs

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.new.key.shape[2]

    def replay(self, kept: int) -> RFAState | None:
        """The state after the first `kept` tokens."""
        if not kept:
            return self.before
        token_mask = self.new.layout.token_mask
        query, key, value = (x[:, :, :kept] for x in self.new.tokens)
        layout = TokenLayout(None if token_mask is None else token_mask[:, :kept])
        # Far parts that were dropped have been counted before.
        return state_after(
            dataclasses.replace(self.new, query=query, key=key, value=value, layout=layout, statistics=None),
            self.before,
        )


def state_after(new: AttendInputs, before: RFAState | None) -> RFAState:
    """The state after these tokens."""
    _, state = new.attend(before, output_final_state=True)
    assert state is not None
    return state
