"""The cache of a converted model: one `RFAState` per layer, of constant size but for its exact heads."""

from typing import Any, Literal

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from hf_rfa.config import HeadIndex
from hf_rfa.errors import StaleStateError, UnsupportedModelError
from hf_rfa.ops.decode import Decoder
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.state import RFAState
from hf_rfa.runtime.adapter import RFAAdapter
from hf_rfa.runtime.attention_call import AttendInputs
from hf_rfa.runtime.calls import is_called_with
from hf_rfa.runtime.recorded_steps import RecordedStep, state_after


class RFACacheLayer(CacheLayerMixin):
    """Cache layer of a converted attention module, used by plain `model.generate`.

    `update` returns the new keys and values unchanged; the attention function then calls `extend` or `decode`. `given`
    are keys and values taken over from a plain cache, until `absorb` turns them into a state. `companions` are layers
    without a place of their own in the cache: of a module's second call, if it attends twice in a forward, and of
    modules that attend to the keys of an earlier one.

    A cache belongs to one conversion: `filled_by` is the fingerprint of the adapter whose state it holds. `expected`
    is set by the pre-hook of the converted module, so that `update` can tell that the new keys come from it ("traced"
    under a tracer, which cannot read the context).
    """

    is_croppable = True
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self._state: RFAState | None = None
        self._decoder: Decoder | None = None  # holds the state instead of `_state` during decoding
        self.seen = 0  # token slots, padding included
        self.filled_by: str | None = None
        self.draw: int | None = None  # for the error message
        self.linear_heads: tuple[HeadIndex, ...] = ()  # whose state it is, for `kept_tokens`
        self.expected: Literal["", "called", "traced"] = ""
        self.record_past = False
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None
        self.took_over = False  # tokens of a plain cache, unknown to layers that share these keys
        self.companions: dict[Any, RFACacheLayer] = {}
        self._steps: list[RecordedStep] = []

    @property
    def state(self) -> RFAState | None:
        """The state after all tokens so far."""
        return self._state if self._decoder is None else self._decoder.state()

    @state.setter
    def state(self, state: RFAState | None) -> None:
        self._state, self._decoder = state, None

    def companion(self, name: Any) -> "RFACacheLayer":
        """The companion of that name, made if there is none."""
        if name not in self.companions:
            self.companions[name] = RFACacheLayer()
            self.companions[name].record_past = self.record_past
        return self.companions[name]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Empty, for models that ask whether the layer holds any.
        self.keys, self.values = (t.new_empty(*t.shape[:2], 0, t.shape[3]) for t in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if not (self.expected == "traced" or (self.expected and is_called_with(self))):
            raise StaleStateError(
                "This cache belongs to a converted model: it holds a state of constant size and no keys. Got it in a "
                "layer with softmax attention (the model was reverted, or is another one). Start with a new cache."
            )
        self.expected = ""
        return key_states, value_states

    def check(self, adapter: RFAAdapter) -> None:
        """Raise `StaleStateError` if the cache was filled by another conversion, or by another draw of this one."""
        fingerprint, draw = adapter.fingerprint, adapter.draw_number
        if self.filled_by is None or not self.seen:
            self.filled_by, self.draw = fingerprint, draw
            self.linear_heads = tuple((adapter.layer, head) for head in adapter.linear_heads)
            self.state = self.state  # drops the decoder, which was prepared from another adapter's tensors
        elif fingerprint != self.filled_by and self.draw != draw:
            raise StaleStateError(
                f"This cache was filled with draw {self.draw} of omega; the model now has draw {draw}. Start a new "
                "sequence after `hf_rfa.resample`."
            )
        elif fingerprint != self.filled_by:
            raise StaleStateError(
                "This cache was filled by another conversion, or before this one was changed (another seed, alpha, "
                "map, window, exact heads or kept keys): its state means nothing to this model. Start a new sequence "
                "with a new cache."
            )

    def hand_on(self) -> None:
        """Let any conversion continue the state from here: training changes it between steps."""
        self.filled_by = self.draw = None
        for companion in self.companions.values():
            companion.hand_on()

    def absorb(self, new: AttendInputs, token_mask: torch.Tensor | None) -> None:
        """Turn the `given` keys and values into a state before `new`; `token_mask` (B, seen) is False for padding."""
        if self.given is None:
            return
        key, value = self.given
        if any(a.shape[1::2] != b.shape[1::2] for a, b in ((key, new.key), (value, new.value))):
            raise UnsupportedModelError(
                f"This cache holds {self.seen} tokens, but not as the keys and values of the attention (it has "
                f"{tuple(key.shape)}, the attention {tuple(new.key.shape)}). Start with an empty cache."
            )
        if new.settings.kept_keys:
            raise UnsupportedModelError(
                f"This cache holds the keys and values of {self.seen} tokens, but not their queries, which decide "
                "what a model with kept keys keeps of them. Start with an empty cache, or convert with "
                "RFAConfig(kept_keys=0)."
            )
        self.given = None
        layout = TokenLayout(None if token_mask is None else token_mask[:, -key.shape[2] :])
        # Without kept keys no query has a say in a state.
        settings = new.settings.replace(sink_logits=None)
        self.state = state_after(AttendInputs(key, key, value, new.kernel, settings, layout), None)

    def extend(self, new: AttendInputs) -> torch.Tensor:
        """The attention (B, H, N, M) of new tokens; the state then includes them."""
        before = self.state
        output, state = new.attend(before, output_final_state=True)
        if self.record_past:
            self._steps.append(RecordedStep(before, new))
        self.state = state
        self.seen += new.key.shape[2]
        return output

    def decode(self, new: AttendInputs) -> torch.Tensor:
        """The same (B, H, 1, M) for one token, in place and without gradients; it cannot be taken back."""
        self.seen += 1
        tokens, kernel, settings = new.tokens, new.kernel, new.settings
        with torch.autocast(new.query.device.type, enabled=False):
            if self._decoder is None or not self._decoder.continues(*tokens, kernel, settings):
                self._decoder = Decoder(*tokens, kernel, settings, self.state)
                self._state = None
            return self._decoder.step(*tokens, new.layout, new.statistics)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.seen, self.given, self.took_over = None, 0, None, False
        self.filled_by = self.draw = None
        self.companions.clear()
        self._steps.clear()

    def activate_past_recording(self) -> None:
        """Remember each forward until the next `crop`, which can then take tokens back."""
        self.record_past = True
        for companion in self.companions.values():
            companion.activate_past_recording()

    def stop_recording(self) -> None:
        """Forget the past states; from here on no token can be taken back."""
        self.record_past = False
        self._steps.clear()
        for companion in self.companions.values():
            companion.stop_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative number); 0 confirms all of them."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"`crop` takes the number of tokens to remove as a negative number. Got {tokens_to_remove}. Pass "
                f"{-tokens_to_remove}."
            )
        remove = -tokens_to_remove
        if remove and remove >= self.seen:
            self.reset()
            return
        recorded = sum(step.length for step in self._steps)
        if remove > recorded:
            raise RuntimeError(
                f"`crop` can take back what was recorded since the last `crop`: {recorded} tokens. Got {remove}. A "
                "state of constant size forgets; call `activate_past_recording()` before the forward that you want "
                "to undo."
            )
        while remove:
            step = self._steps.pop()
            kept = max(0, step.length - remove)
            self.state = step.replay(kept)
            self.seen -= step.length - kept
            remove -= step.length - kept
        self._steps.clear()
        for companion in self.companions.values():
            companion.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        state = self.state
        rows = len(self.given[0]) if self.given else 0 if state is None else len(state.count)
        self._select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices)

    def offload(self) -> None:
        raise UnsupportedModelError(
            "The RFA cache has constant size and is not offloaded. Drop `cache_implementation='offloaded'`."
        )

    def _select(self, rows: torch.Tensor) -> None:
        if self._decoder is not None:
            self._decoder.select_rows(rows)
        elif self._state is not None:
            self._state = self._state.select_rows(rows)
        if self.given is not None:
            key, value = self.given
            self.given = key[rows.to(key.device)], value[rows.to(value.device)]
        self._steps.clear()
        for companion in self.companions.values():
            companion._select(rows)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a Transformers cache holds, converted layers or not.

    Not counted are the tables that a layer prepares from the model's own tensors for decoding (about the size of its
    omega, two or three times that once it is calibrated): they hold nothing of the text.

    Example:
        >>> import torch, hf_rfa
        >>> from hf_rfa.runtime.arguments import cache_of
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = hf_rfa.convert(LlamaForCausalLM(LlamaConfig(**size)), calibrate=False).eval()
        >>> short, long = (model(torch.ones(1, n, dtype=torch.long), use_cache=True) for n in (200, 1000))
        >>> hf_rfa.cache_bytes(cache_of(short)) == hf_rfa.cache_bytes(cache_of(long))
        True
    """
    return sum(_bytes(value) for layer in cache.layers for value in vars(layer).values())


def _bytes(value: Any) -> int:
    """Of a tensor, a state, a decoder, a companion, or several of them."""
    if isinstance(value, torch.Tensor | RFAState):
        return value.nbytes
    if isinstance(value, Decoder):  # without the tables prepared from the model's own tensors
        return value.state().nbytes
    if isinstance(value, RFACacheLayer):
        return sum(_bytes(part) for part in vars(value).values())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(_bytes(part) for part in parts)
