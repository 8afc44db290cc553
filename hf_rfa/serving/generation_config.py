"""`generation_config`: how Transformers' own clients say how an answer is chosen, as fields of a request.

`transformers chat` sends `GenerationConfig.to_json_string()` beside the messages, with what its flags and `!set` ask
for. A setting that is absent is this server's default, and sampling is off unless `do_sample` asks for it.
"""

import json
from typing import Any

from hf_rfa.serving.unsupported import refuse_unless_neutral, short

#: Settings that fields of a request have another name for; both have the same meaning.
_FIELDS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_new_tokens": "max_tokens",
    "stop_strings": "stop", "eos_token_id": "eos_token_id",
}  # fmt: skip
#: Settings that this server does not have, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "early_stopping": (False,), "length_penalty": (1,),
    "repetition_penalty": (1,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,), "min_p": (0,), "typical_p": (1,),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "renormalize_logits": (False,), "remove_invalid_values": (False,),
    "token_healing": (False,), "guidance_scale": (1,), "bad_words_ids": ([],), "suppress_tokens": ([],),
}  # fmt: skip
#: Settings that have no say in the answer: of padding, of speed, of what `generate` returns.
_IGNORED = (
    "transformers_version", "bos_token_id", "pad_token_id", "use_cache", "return_dict_in_generate", "output_scores",
    "output_logits", "output_attentions", "output_hidden_states",
)  # fmt: skip


def fields_of(text: Any) -> dict[str, Any]:
    """The fields of a request that a generation config stands for.

    Raises:
        ValueError: It is not the JSON of an object, or asks for what this server does not have.
    """
    settings = _read(text)
    if "max_new_tokens" in settings:
        settings.pop("max_length", None)  # as `generate` does
    fields = {_FIELDS[name]: settings.pop(name) for name in _FIELDS.keys() & settings.keys()}
    sample = settings.pop("do_sample", False)
    if not isinstance(sample, bool):
        raise ValueError(f"`generation_config.do_sample` must be true or false. Got {sample!r}.")
    if not sample:
        fields["temperature"] = 0
    for name, value in settings.items():
        if name not in _IGNORED and not name.startswith("_"):
            advice = "Set max_new_tokens instead." if name == "max_length" else "Set it to null, or leave it out."
            refuse_unless_neutral(f"generation_config.{name}", value, _NEUTRAL.get(name, ()), advice)
    return fields


def _read(text: Any) -> dict[str, Any]:
    """The settings that are set."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            "`generation_config` must be the JSON of an object, as `GenerationConfig.to_json_string()` writes it, in "
            f"a string. Got {short(text)}."
        )
    return {name: value for name, value in found.items() if value is not None}
