"""Calibration text that a model writes itself, from its first token: no data is needed to convert it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from hf_rfa.calibration.progress import Progress
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.devices import execution_device
from hf_rfa.runtime.quiet import quiet_eval

#: A model is meant for texts much longer than what a query sees exactly: fitted and ranked on texts of 512 tokens,
#: with up to 256 seen exactly, SmolLM2-135M diverged 13 times as much at 2,048 as after a calibration on so many.
#: There are at most so many texts, and at most so many tokens of them.
ROWS, TOKENS = 4, 4096
LENGTH, LONGEST = 1024, 2048
#: Each is joined of pieces of at most so many tokens, written side by side: a step reads all weights for one token of
#: each piece. Calibrated on texts of four joined pieces SmolLM2-135M diverges as much as on whole ones (0.0071
#: nats/token from token 1,536 to 2,048 of novels both times), and writing them takes a quarter of the steps.
PIECE = 512
#: Length of the texts, in what a query sees exactly.
EXACT_SHARE = 8
#: A step takes about as long as the forward of so many tokens, and of one more for each row.
STEP_TOKENS = 24


def check_can_write(model: PreTrainedModel, window: int, kept_keys: int = 0) -> int:
    """The length of the texts that the model can write: 8 times what a query sees exactly, if its context allows.

    Raises:
        ConfigError: The model does not write text, or none longer than two windows.
    """
    name = type(model).__name__
    if not model.can_generate() or model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise ConfigError(
            f"{name} cannot write a text to calibrate itself on. Pass texts of your own, "
            "`convert(model, config, calibrate=[text, ...])`, or `calibrate=False` and call `hf_rfa.calibrate` later."
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
    length = min(max(LENGTH, EXACT_SHARE * (2 * window + kept_keys)), LONGEST, longest)
    if length <= 2 * window:
        raise ConfigError(
            f"{name} would calibrate itself on texts of {length} tokens, in which nothing lies beyond two windows of "
            f"{window}. Lower `window`, or pass `calibrate=batches` with longer texts, or `calibrate=False`."
        )
    return length


def write_text(
    model: PreTrainedModel, *, window: int, kept_keys: int = 0, seed: int = 0, progress: Progress | None = None
) -> torch.Tensor:
    """Token ids (at most ROWS, at most LONGEST) of joined pieces that the model wrote, each from its first token on.

    Args:
        model: Must behave as the original: not converted, or with every head exact.
        window, kept_keys: Of the conversion; the text must be longer than two windows, or nothing in it is far.
        seed: The same text for the same seed; the global random state is left as it was.

    Raises:
        ConfigError: The model does not write text, or its longest context is too short.
    """
    length = check_can_write(model, window, kept_keys)
    rows, pieces = min(ROWS, TOKENS // length), -(-length // PIECE)
    each, texts = -(-length // pieces), rows * pieces
    first, ends = _first_token(model), getattr(model.generation_config, "eos_token_id", None)
    # Every setting that changes the text. A checkpoint's own generation settings (stop strings, penalties, watermarks,
    # beams, assistants, ...) would stop the text or sample it from another distribution than the model's.
    settings = GenerationConfig(
        do_sample=True, num_beams=1, temperature=1.0, top_k=0, top_p=1.0, use_cache=True, min_new_tokens=each - 1,
        max_new_tokens=each - 1, bos_token_id=first, pad_token_id=first, eos_token_id=ends,
    )  # fmt: skip
    device = execution_device(model)
    prompt = torch.full((texts, 1), first, dtype=torch.int64, device=device)
    with quiet_eval(model), _seeded(device, seed), _own_defaults(model):
        # Of the class: a checkpoint's own code may have put another `generate` on the instance.
        model_class: Any = type(model)
        text = model_class.generate(
            model, prompt, attention_mask=torch.ones_like(prompt), generation_config=settings,
            **_noting(progress, texts, each),
        )  # fmt: skip
    if not isinstance(text, torch.Tensor) or text.shape != (texts, each):
        raise ConfigError(
            f"{type(model).__name__} did not write {texts} texts of {each} tokens. Got "
            f"{tuple(text.shape) if isinstance(text, torch.Tensor) else type(text).__name__}. Pass texts of your own, "
            "`convert(model, config, calibrate=batches)`."
        )
    return text.reshape(rows, -1)[:, :length]


def _noting(progress: Progress | None, rows: int, length: int) -> dict[str, Any]:
    """Arguments of `generate` that note each step as progress."""
    if progress is None:
        return {}
    progress.stage("writing a text", (STEP_TOKENS + rows) * (length - 1))

    def note(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        progress.done(STEP_TOKENS + rows)
        return scores

    return {"logits_processor": LogitsProcessorList([note])}


@contextmanager
def _own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills what a caller leaves unset with the model's defaults: none of them while the block runs."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The generator that `device` samples from, seeded for the block and then as it was."""
    if device.type == "cpu":  # `quiet_eval` keeps its state
        torch.default_generator.manual_seed(seed)
        yield
        return
    with torch.random.fork_rng(devices=[device], device_type=device.type):
        module = torch.get_device_module(device)
        with module.device(device):
            module.manual_seed(seed)
        yield


def _first_token(model: PreTrainedModel) -> int:
    """The token that texts begin with; if there is none, the one that ends them, because the next text follows it."""
    config = model.config.get_text_config()
    return next(
        (
            token
            for name in ("bos_token_id", "eos_token_id")
            for token in (getattr(model.generation_config, name, None), getattr(config, name, None))
            if isinstance(token, int) and 0 <= token < config.vocab_size
        ),
        0,
    )
