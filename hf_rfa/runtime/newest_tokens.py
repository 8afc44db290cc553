"""What `generate` carries from step to step, cut down to the newest tokens where a state holds the past.

`GenerationMixin._update_model_kwargs_for_generation` concatenates the padding mask and the position ids of all tokens
at each step, and the model looks at the whole mask again. A model whose every layer keeps a state needs the newest
columns alone: padding in the past is accounted for in the states. The ids themselves remain `generate`'s own business,
since stopping criteria and logits processors look at them.
"""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerationMixin

from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.cache import RFACacheLayer

#: The tensors that are cut, by their last dimension.
_OF_TOKENS = ("attention_mask", "position_ids")
#: Steps of one token each; others look at the mask's length, or take tokens back.
_PLAIN_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass
class Generation:
    """One call of `generate`.

    Attributes:
        plain: Whether it was called without an assistant and without a decoding loop of the caller's own.
        caches: Weak references to the caches that it prepared.
        newest_only: Whether masks and position ids are cut down to the newest tokens.
    """

    plain: bool
    caches: list[Any] = field(default_factory=list)
    newest_only: bool = False


#: The `generate` that this thread is in.
running: ContextVar[Generation | None] = ContextVar("running", default=None)


def needs_newest_only(model: Any, generation_config: Any, cache: Cache) -> bool:
    """Whether a model's decoding steps need no mask of past tokens."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ()
    own_inputs = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    # ALiBi reads positions off the mask.
    if own_inputs or model.config.is_encoder_decoder or getattr(config, "alibi", False):
        return False
    if generation_config.is_assistant or generation_config.prefill_chunk_size is not None:
        return False
    return (
        generation_config.get_generation_mode() in _PLAIN_MODES
        and all(kind == "full_attention" for kind in kinds)
        and all(adapter.kind == "linear" for _, _, adapter in named_adapters(model))
        and all(isinstance(layer, RFACacheLayer) and not layer.record_past for layer in cache.layers)
    )


def update_model_kwargs(
    model: Any, own: Callable[..., Any], outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """`_update_model_kwargs_for_generation` of a converted model: its own, then past columns are dropped."""
    updated = own(outputs, model_kwargs, *args, **kwargs)
    generation = running.get()
    # Without position ids the model may count positions in the mask.
    if generation is None or not generation.newest_only or updated.get("position_ids") is None:
        return updated
    for name in _OF_TOKENS:
        if updated.get(name) is not None:
            updated[name] = updated[name][..., -1:].clone()
    return updated
