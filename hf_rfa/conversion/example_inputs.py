"""A small batch for the dry run of a conversion: guessed from the model's config, or the caller's own."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_rfa.errors import ConfigError, UnsupportedModelError
from hf_rfa.runtime.arguments import accepts
from hf_rfa.runtime.devices import execution_device

#: Two primes, so that no other dimension of a tiny model is mistaken for a sequence length.
TEXT_TOKENS, DECODER_TOKENS = 37, 29
_WAVE, _FRAMES = 16000, 128  # sound: samples of a waveform, frames of a spectrogram


def guess_inputs(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs to try in turn, the smallest first; `UnsupportedModelError` if none can be guessed."""
    config, name = model.config, model.main_input_name
    device = execution_device(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs: dict[str, Any] = {"use_cache": False} if accepts(model, "use_cache") else {}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _token_ids(config.get_text_config(decoder=True), DECODER_TOKENS, device)
    if name == "input_ids":
        inputs[name] = _token_ids(config.get_text_config(), TEXT_TOKENS, device)
        yield inputs
        if accepts(model, "pixel_values"):  # two towers that always run, as in CLIP
            yield {**inputs, "pixel_values": torch.zeros(_image_shape(model), device=device, dtype=dtype)}
        return
    shape = _image_shape(model) if name == "pixel_values" else _sound_shape(model)
    if shape is None:
        raise UnsupportedModelError(
            f"`convert` does not know what to feed {type(model).__name__} (its main input is {name!r}) in its dry "
            "run. Pass `convert(model, config, example_inputs={...})` with a small batch."
        )
    yield {**inputs, name: torch.zeros(shape, device=device, dtype=dtype)}


def refuse_meta(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` for a model on the meta device: it cannot be run or fitted."""
    if execution_device(model).type == "meta":
        raise UnsupportedModelError(
            f"The weights of this {type(model).__name__} are on the meta device: they have no values yet. Load them "
            "before `hf_rfa.convert`."
        )


def describe(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as JSON, for `rebuild`: integers and plain values as they are, only the shape of other tensors."""
    if not isinstance(inputs, Mapping):
        raise ConfigError(
            f"`example_inputs` must be a dictionary of the model's arguments. Got {type(inputs).__name__}. Pass, for "
            "example, {'input_ids': ids}."
        )
    described: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            described[name] = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        elif isinstance(value, torch.Tensor):
            described[name] = {"values": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
        elif value is None or isinstance(value, (bool, int, float, str)):
            described[name] = {"value": value}
        else:
            raise ConfigError(
                f"`example_inputs` may hold tensors and plain values, because they are saved with the conversion. Got "
                f"{name!r} of type {type(value).__name__}. Leave it out."
            )
    return described


def rebuild(described: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch that `describe` wrote, with zeros in place of floating-point numbers."""
    inputs: dict[str, Any] = {}
    for name, entry in described.items():
        if "value" in entry:
            inputs[name] = entry["value"]
            continue
        dtype = getattr(torch, entry["dtype"])
        if "shape" in entry:
            inputs[name] = torch.zeros(entry["shape"], dtype=dtype, device=device)
        else:
            inputs[name] = torch.tensor(entry["values"], dtype=dtype, device=device)
    return inputs


def _image_shape(model: PreTrainedModel) -> tuple[int, ...]:
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
    return (1, *frames, getattr(vision, "num_channels", 3), height, width)


def _sound_shape(model: PreTrainedModel) -> tuple[int, ...] | None:
    config, name = model.config, model.main_input_name
    if name == "input_values" and hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return 1, config.max_length, config.num_mel_bins  # a spectrogram of fixed length
    if name == "input_values":
        return 1, _WAVE
    if name == "input_features" and hasattr(config, "input_feat_per_channel"):
        return 1, _FRAMES, config.input_feat_per_channel * getattr(config, "input_channels", 1)
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return 1, config.num_mel_bins, 2 * config.max_source_positions
    return None


def _token_ids(config: Any, length: int, device: torch.device) -> torch.Tensor:
    longest = getattr(config, "max_position_embeddings", None) or length
    longest = longest if longest > 0 else length  # XLNet says -1: any length
    length = min(length, longest - 4) if longest > 8 else longest  # some models count positions from 2 on
    vocabulary = getattr(config, "vocab_size", 16) or 16
    # Ordinary tokens: the first few are often padding, which some models mask; image placeholders are high.
    return (5 + torch.arange(length) % max(1, min(vocabulary, 64) - 5)).clamp_max(vocabulary - 1)[None].to(device)
