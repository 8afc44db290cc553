"""Calibration text that a model writes itself, from its first token: no data is needed to convert it."""

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_rfa.devices import execution_device
from hf_rfa.dry_run import quiet_eval
from hf_rfa.errors import ConfigError

ROWS = 4
LENGTH = 1024


def check_can_write(model: PreTrainedModel, window: int) -> int:
    """The length of the texts that the model can write; `ConfigError` if none that goes beyond the window."""
    name = type(model).__name__
    if not model.can_generate() or model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ConfigError(
            f"{name} cannot write a text to calibrate itself on. Pass texts of your own, "
            "`convert(model, config, calibrate=batches)`, or `calibrate=False` and call `hf_rfa.calibrate` later."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, longest)
    if length <= 2 * window:
        raise ConfigError(
            f"{name} would calibrate itself on texts of {length} tokens, in which nothing lies beyond two windows of "
            f"{window}. Lower `window`, or pass `calibrate=batches` with longer texts, or `calibrate=False`."
        )
    return length


def write_text(model: PreTrainedModel, *, window: int, seed: int = 0) -> torch.Tensor:
    """Token ids (ROWS, at most LENGTH) sampled from the model's own distribution, from its first token on.

    Args:
        model: It must answer as the original: not converted, or with every head exact.
        window: Of the conversion; the text must be longer than two windows, or nothing in it is far.
        seed: The same text for the same seed; the global random state is left as it was.

    Raises:
        ConfigError: The model does not write text, or its longest context is too short.
    """
    length = check_can_write(model, window)
    config = model.config.get_text_config()
    # Where no token begins a text, the one that ends one does: the next text follows it.
    first = next(
        (
            token
            for name in ("bos_token_id", "eos_token_id")
            for token in (getattr(model.generation_config, name, None), getattr(config, name, None))
            if isinstance(token, int) and 0 <= token < config.vocab_size
        ),
        0,
    )
    prompt = torch.full((ROWS, 1), first, dtype=torch.int64, device=execution_device(model))
    with quiet_eval(model):  # forks the random state, so that the seed stays inside
        torch.manual_seed(seed)
        generate: Any = model.generate
        text = generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, num_beams=1, top_k=0, top_p=1.0,
            temperature=1.0, min_new_tokens=length - 1, max_new_tokens=length - 1, pad_token_id=first,
        )  # fmt: skip
    assert isinstance(text, torch.Tensor)
    return text
