"""`generation_config`: how Transformers' own clients say how an answer is chosen, as fields of a request.

`transformers chat` sends `GenerationConfig.to_json_string()` beside the messages, with what its flags and `!set` ask
for. A setting that is absent is this server's default, and sampling is off unless `do_sample` asks for it.
"""

import json
from typing import Any

from pydantic import ConfigDict, ValidationError

from hf_rfa.serving.choice import Choice
from hf_rfa.serving.faults import FieldError, fault_of
from hf_rfa.serving.unsupported import refuse_unless_neutral, short

#: Fields of a request that Transformers has another name for.
_NAMES = {"max_tokens": "max_new_tokens", "stop": "stop_strings"}
#: Settings that this server does not have, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "early_stopping": (False,), "length_penalty": (1,),
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,), "min_p": (0,), "typical_p": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "renormalize_logits": (False,), "remove_invalid_values": (False,),
    "token_healing": (False,), "guidance_scale": (1,), "bad_words_ids": ([],), "suppress_tokens": ([],),
    "cache_implementation": ("dynamic", "hybrid"),  # the second is in Gemma's folders, and `generate` ignores it
}  # fmt: skip
#: Settings that have no say in the answer: of padding, of speed, of what `generate` returns.
_IGNORED = (
    "transformers_version", "bos_token_id", "pad_token_id", "use_cache", "return_dict_in_generate", "output_scores",
    "output_logits", "output_attentions", "output_hidden_states",
)  # fmt: skip


class _Settings(Choice):
    """The settings that this server has."""

    model_config = ConfigDict(alias_generator=lambda name: _NAMES.get(name, name))

    do_sample: bool = False


def fields_of(text: Any) -> dict[str, Any]:
    """The fields of a request that a generation config stands for.

    Raises:
        FieldError: It is not the JSON of an object, or asks for what this server does not have.
    """
    settings = _read(text)
    if "max_new_tokens" in settings:
        settings.pop("max_length", None)  # as `generate` does
    own = {_NAMES.get(name, name) for name in _Settings.model_fields}
    for name in settings.keys() - own:
        if name not in _IGNORED and not name.startswith("_"):
            advice = "Set max_new_tokens instead." if name == "max_length" else "Set it to null, or leave it out."
            refuse_unless_neutral(f"generation_config.{name}", settings[name], _NEUTRAL.get(name, ()), advice)
    settings = {name: settings[name] for name in own & settings.keys()}
    try:
        found = _Settings.model_validate(settings)
    except ValidationError as error:
        field, message = fault_of(error.errors(), settings, "generation_config.")
        raise FieldError(field or "generation_config", message) from error
    fields = found.model_dump(exclude={"do_sample"}, exclude_none=True)
    return fields if found.do_sample else fields | {"temperature": 0}


def _read(text: Any) -> dict[str, Any]:
    """The settings that are set."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FieldError(
            "generation_config",
            "`generation_config` must be the JSON of an object, as `GenerationConfig.to_json_string()` writes it, in "
            f"a string. Got {short(text)}.",
        )
    return {name: value for name, value in found.items() if value is not None}
