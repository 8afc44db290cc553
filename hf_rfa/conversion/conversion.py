"""`hf_rfa.convert`: swap the attention of a loaded model and fit it, in one call."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hf_rfa.calibration.batches import batches_of
from hf_rfa.calibration.calibrate import calibrate_on
from hf_rfa.calibration.progress import Progress, progress_bar
from hf_rfa.calibration.self_text import check_can_write, write_text
from hf_rfa.calibration.strings import read_texts
from hf_rfa.config import RFAConfig
from hf_rfa.conversion.attach import revert, swap_attention
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.quiet import plain_torch
from hf_rfa.runtime.record import base_model, conversion_config, store_config
from hf_rfa.runtime.softmax_heads import set_softmax_heads
from hf_rfa.saving.patterns import check_pattern, with_pattern

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)


def convert(
    model: ModelT,
    config: RFAConfig | None = None,
    *,
    calibrate: Any = True,
    example_inputs: Mapping[str, Any] | None = None,
    submodels: Sequence[str] | None = None,
    parts: Sequence[str] | None = None,
    progress: bool | None = None,
    pattern: str | Path | None = None,
    tokenizer: Any = None,
) -> ModelT:
    """Convert a loaded model from softmax to random-feature attention, in place; it stays an instance of its class.

    Every attention module that goes through Transformers' attention interface gets an `RFAAdapter`. Layers that
    `config.layers` leaves out, layers with a sliding window, chunks or another mask of their own and cross-attention
    stay exact softmax. Parts that the dry run does not reach (the image tower of a model that is fed text) keep the
    attention that they have. The result is verified by a second dry run, then every head is calibrated
    (`hf_rfa.calibrate`); if anything fails, the model is put back as it was. `hf_rfa.calibration_report(model)` says
    how each head was fitted and what it costs.

    The model gets config objects of its own, so that another model of the same config is not touched: change
    `model.config` from then on, not a reference that was kept from before.

    Args:
        model: A loaded Transformers model (or a PEFT model or a `SentenceTransformer` around one).
        config: None = `RFAConfig()`.
        calibrate: True: on two to four texts of 1,024 to 2,048 tokens (eight times what a query sees exactly, fewer if
            the model's context ends before) that the model writes itself, whatever its `generation_config` says.
            Batches of your own or a list of texts, as long as the contexts to come (see `hf_rfa.calibrate`), are
            better, and encoders need them.
            False leaves it out: the far part then has the config's alpha and gamma on every head.
        example_inputs: A small batch for the dry run, for models whose inputs cannot be guessed from the config, or
            to reach parts that text alone does not. Saved with the conversion (of images and sounds only the shape).
        submodels: Sub-configs whose part of a composite model is converted, for example ["text_config"]; None: every
            part that the dry run reaches.
        parts: The old name of `submodels`.
        progress: Whether to show a progress bar, with its stages and the time left; None: if stderr is a terminal.
        pattern: A file of `hf_rfa.save_pattern`: its exact heads and numbers of kept keys are taken, and no head is
            ranked. It must be of the same model.
        tokenizer: Reads the texts of `calibrate`; None: the model's own, which lies where the model was loaded from.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: The model computes attention outside of the interface, or hands its attention function
            something that random features cannot express; the message names it.
        CheckpointError: `pattern` cannot be read.
        ConfigError: The model cannot write a text to calibrate itself on, or an argument does not fit: `calibrate` is
            neither a bool nor batches, for example.

    Example:
        >>> import torch, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model = LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=96))
        >>> model = hf_rfa.convert(model, hf_rfa.RFAConfig(num_features=32, window=16, sink_tokens=2))
        >>> type(model).__name__, model(torch.ones(1, 100, dtype=torch.long)).logits.shape
        ('LlamaForCausalLM', torch.Size([1, 100, 64]))
        >>> hf_rfa.calibration_report(model).tokens
        384
    """
    if parts is not None:
        if submodels is not None:
            raise ConfigError("`parts` is the old name of `submodels`. Got both. Pass `submodels` alone.")
        warnings.warn("`parts` of hf_rfa.convert is called `submodels` now.", FutureWarning, stacklevel=2)
        submodels = parts
    config = RFAConfig() if config is None else config
    if pattern is not None:
        config = with_pattern(config, pattern)
    batches: Any = None
    with plain_torch():
        # Arguments are checked before anything is changed.
        if calibrate is True and isinstance(config, RFAConfig):
            read_texts(calibrate, model, tokenizer, name="calibrate")  # refuses a tokenizer without texts
            check_can_write(base_model(model), config.window, config.most_kept_keys)
        elif not isinstance(calibrate, bool):
            read = read_texts(calibrate, model, tokenizer, name="calibrate")
            batches = list(batches_of(read, base_model(model), name="calibrate"))
        try:
            swap_attention(model, config, example_inputs=example_inputs, submodels=submodels)
        except ConfigError as error:
            if pattern is None:
                raise
            raise ConfigError(
                f"{str(pattern)!r} is of another model, or `layers` leaves out its layers: {error}"
            ) from error
        try:
            if pattern is not None:
                check_pattern(model, pattern)
            if calibrate is False:
                return model
            with progress_bar(progress) as bar:
                texts = [_own_text(model, bar)] if batches is None else batches
                logger.info("%s", calibrate_on(model, texts, True, bar))
        except BaseException:
            revert(model)
            raise
    return model


def _own_text(model: nn.Module, progress: Progress) -> torch.Tensor:
    """A text that the model writes while every head is exact, as the original would."""
    config = conversion_config(model)
    converted = [adapter for _, _, adapter in named_adapters(model) if adapter.converted]
    set_softmax_heads(model, [(adapter.layer, head) for adapter in converted for head in range(adapter.key_heads)])
    seen = {"window": config.window, "kept_keys": config.most_kept_keys}
    text = write_text(base_model(model), **seen, progress=progress)
    store_config(model, config)
    return text
