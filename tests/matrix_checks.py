"""What a converted model must still do, checked on one tiny model: the stages of the matrix of architectures.

A stage demands of the converted model what the original does. Where the original itself does not have the property (it
leaves padding in its sums, its cached tokens differ from its uncached ones), the stage says so and demands no more;
packed documents are the exception: they are kept apart or refused, whatever the original does.
"""

import copy
import dataclasses
import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from families import SHORT
from tiny_models import ordinary_ids
from transformers import PreTrainedModel

import hf_rfa
from hf_rfa import UnsupportedModelError

#: Tokens of the two rows of a batch (all of the second row's columns after SHORTER are padding), of a decoder's rows,
#: of prompts and of what is generated.
LENGTH, SHORTER, DECODER, PROMPT, NEW = 40, 29, 36, 30, 8
#: Largest difference of outputs that are the same but for rounding, relative to the largest output.
TOLERANCE = 2e-3
#: How a stage may end, besides a refusal (the message of the `UnsupportedModelError`).
PASSED, NOT_APPLICABLE, AS_ORIGINAL = "ok", "-", "as the original"


@dataclasses.dataclass
class Subject:
    """A tiny model before its conversion (`original`, with its outputs on `inputs`) and after it."""

    original: PreTrainedModel
    converted: PreTrainedModel
    inputs: dict[str, Any]
    before: torch.Tensor


def check_model(model: PreTrainedModel) -> dict[str, str]:
    """Every stage's ending, by name; an `AssertionError` or any other exception but a refusal is a defect."""
    inputs = inputs_for(model)
    before = outputs_of(model, inputs)
    original = copy.deepcopy(model)
    try:
        hf_rfa.convert(model, SHORT, calibrate=False, example_inputs=inputs if needs_examples(model) else None)
    except UnsupportedModelError as refusal:
        assert torch.equal(outputs_of(model, inputs), before), "a refused conversion changed the model"
        return {"convert": str(refusal)}
    subject = Subject(original, model, inputs, before)
    endings = {}
    for stage in STAGES:
        try:
            endings[stage.__name__] = stage(subject)
        except UnsupportedModelError as refusal:
            endings[stage.__name__] = str(refusal)
        except Exception as error:
            error.add_note(f"stage: {stage.__name__}")
            raise
    return endings


# --- stages ----------------------------------------------------------------------------------------------------------


def convert(subject: Subject) -> str:
    """Finite outputs that are not the original's, from random features in at least one layer."""
    after = outputs_of(subject.converted, subject.inputs)
    assert torch.isfinite(after).all()
    assert not torch.equal(after, subject.before)
    assert hf_rfa.far_statistics(subject.converted)
    return PASSED


def padding(subject: Subject) -> str:
    """Rows padded on the right, on the left and within give what they give alone."""
    if set(subject.inputs) - {"input_ids", "decoder_input_ids", "use_cache"}:
        return NOT_APPLICABLE
    sides = ["right", "left", "interior"] if _accepts(subject.original, "position_ids") else ["right"]
    lost = []
    for side in sides:
        # Positions are given, or the model's own where it counts them by the padding token. (Other models move padded
        # rows to later positions: the same to softmax, another turn of the same draw to random features.)
        ways = [given for given in (True, False) if _padding_error(subject.original, side, given) <= TOLERANCE]
        if ways:
            error = _padding_error(subject.converted, side, ways[0])
            assert error <= TOLERANCE, f"{side} padding changes the outputs by {error:.1e}"
        else:
            lost.append(side)
    return f"{AS_ORIGINAL}: {', '.join(lost)}" if lost else PASSED


def packing(subject: Subject) -> str:
    """Two documents packed in a row by `position_ids` give what they give alone."""
    if "pixel_values" in subject.inputs or "input_ids" not in subject.inputs or not _packable(subject.original):
        return NOT_APPLICABLE
    error = packing_error(subject.converted)
    assert error <= TOLERANCE, f"packed documents see each other: outputs differ by {error:.1e}"
    return PASSED


def backward(subject: Subject) -> str:
    """Finite gradients for all parameters that the original has them for."""
    wanted, got = _gradients(subject.original, subject.inputs), _gradients(subject.converted, subject.inputs)
    assert wanted <= got, f"no gradient for {sorted(wanted - got)[:3]}"
    return PASSED


def generate(subject: Subject) -> str:
    """Greedy tokens with a cache are those without; the second row is padded on the left where the original can."""
    if not subject.original.can_generate():
        return NOT_APPLICABLE
    try:
        _generate(subject.original, False, True)
    except (TypeError, ValueError, AttributeError, RuntimeError, ImportError) as error:
        return f"{AS_ORIGINAL}: it does not generate from such inputs alone ({type(error).__name__})"
    for padded in (True, False):
        tokens = [_generate(subject.original, padded, use_cache) for use_cache in (True, False)]
        if torch.equal(*tokens):
            cached, uncached = (_generate(subject.converted, padded, use_cache) for use_cache in (True, False))
            assert torch.equal(cached, uncached), f"cached {cached.tolist()}, uncached {uncached.tolist()}"
            return PASSED
    _generate(subject.converted, False, True)
    return AS_ORIGINAL


def save(subject: Subject) -> str:
    """Saved and loaded, it gives the same outputs."""
    with tempfile.TemporaryDirectory() as folder:
        subject.original.save_pretrained(folder)
        again = type(subject.original).from_pretrained(folder).eval()
        if not torch.equal(outputs_of(again, subject.inputs), subject.before):
            return AS_ORIGINAL
    with tempfile.TemporaryDirectory() as folder:
        hf_rfa.save_pretrained(subject.converted, folder)
        again = hf_rfa.from_pretrained(folder).eval()
    error = _difference(outputs_of(again, subject.inputs), outputs_of(subject.converted, subject.inputs))
    assert error <= 1e-6, f"loaded, its outputs differ by {error:.1e}"  # the last bit, where weights lie otherwise
    return PASSED


def revert(subject: Subject) -> str:
    """The original's outputs, bit for bit."""
    hf_rfa.revert(subject.converted)
    assert torch.equal(outputs_of(subject.converted, subject.inputs), subject.before)
    return PASSED


STAGES: tuple[Callable[[Subject], str], ...] = (convert, padding, packing, backward, generate, save, revert)


# --- inputs and outputs ----------------------------------------------------------------------------------------------


def inputs_for(model: PreTrainedModel) -> dict[str, Any]:
    """A batch of two: texts, images, or sounds, by the model's main input, and what it cannot do without."""
    config, name = model.config, model.main_input_name
    inputs: dict[str, Any] = {}
    if name == "pixel_values" or config.model_type in ("clip", "blip-2"):
        vision = getattr(config, "vision_config", config)
        frames = (vision.num_frames,) if hasattr(vision, "num_frames") else ()
        inputs["pixel_values"] = _noise(2, *frames, 3, vision.image_size, vision.image_size)
    if name == "input_ids" or config.model_type == "blip-2":
        inputs["input_ids"] = ordinary_ids(2, LENGTH)
    if config.model_type == "blip-2":
        inputs["input_ids"][:, : config.num_query_tokens] = config.image_token_id
    if config.model_type == "audio-spectrogram-transformer":
        inputs[name] = _noise(2, config.max_length, config.num_mel_bins)
    elif name == "input_values":
        inputs[name] = _noise(2, 16000)
    elif config.model_type == "speech_to_text":
        inputs[name] = _noise(2, 160, config.input_feat_per_channel)
    elif name == "input_features":
        inputs[name] = _noise(2, config.num_mel_bins, 2 * config.max_source_positions)
    if config.model_type == "voxtral_realtime":
        frames = LENGTH * config.audio_length_per_tok
        inputs["input_features"] = _noise(2, config.audio_config.num_mel_bins, frames)
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ordinary_ids(2, DECODER, seed=1)
    if _accepts(model, "use_cache"):
        inputs["use_cache"] = False
    return inputs


def needs_examples(model: PreTrainedModel) -> bool:
    """Whether the dry run needs inputs that the config alone does not tell."""
    return model.config.model_type in ("blip-2", "voxtral_realtime")


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def outputs_of(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head."""
    with torch.no_grad():
        return _first_output(model(**inputs))


def _first_output(output: Any) -> torch.Tensor:
    for name in ("logits", "last_hidden_state"):
        if isinstance(output.get(name), torch.Tensor):
            return output[name]
    return next(value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point())


def _accepts(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max().clamp_min(1))


def _padding_error(model: PreTrainedModel, side: str, positions_given: bool) -> float:
    long, short = ordinary_ids(1, LENGTH, seed=2), ordinary_ids(1, SHORTER, seed=3)
    slots = {
        "right": torch.arange(SHORTER),
        "left": torch.arange(LENGTH - SHORTER, LENGTH),
        "interior": torch.cat([torch.arange(12), torch.arange(12 + LENGTH - SHORTER, LENGTH)]),
    }[side]
    padding = 7 if positions_given else getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    ids, mask = torch.cat([long, torch.full_like(long, padding)]), torch.ones(2, LENGTH, dtype=torch.int64)
    ids[1, slots], mask[1] = short[0], 0
    mask[1, slots] = 1
    more: list[dict[str, Any]] = [{}, {}, {}]
    if model.config.is_encoder_decoder:
        decoder = ordinary_ids(2, DECODER, seed=4)
        more = [{"decoder_input_ids": rows} for rows in (decoder, decoder[:1], decoder[1:])]
    elif side != "right" and positions_given:
        more[0] = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    if _accepts(model, "use_cache"):
        more = [{**inputs, "use_cache": False} for inputs in more]
    both = outputs_of(model, {"input_ids": ids, "attention_mask": mask, **more[0]})
    alone = outputs_of(model, {"input_ids": long, **more[1]}), outputs_of(model, {"input_ids": short, **more[2]})
    second = both[1:] if model.config.is_encoder_decoder else both[1:, slots]
    return max(_difference(both[:1], alone[0]), _difference(second, alone[1]))


def _packable(model: PreTrainedModel) -> bool:
    """Whether packed documents can be described to the model at all."""
    return _accepts(model, "position_ids") and not model.config.is_encoder_decoder and is_causal(model)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether no token of the model sees those behind it."""
    ids = ordinary_ids(1, LENGTH, seed=5)
    other = torch.cat([ids[:, :-1], ids[:, -1:] + 1], dim=1)
    one, two = (outputs_of(model, {"input_ids": x}) for x in (ids, other))
    return one.shape[1] == LENGTH and _difference(two[:, :-1], one[:, :-1]) <= TOLERANCE


def packing_error(model: PreTrainedModel) -> float:
    documents = [ordinary_ids(1, 24, seed=6), ordinary_ids(1, 16, seed=7)]
    positions = torch.cat([torch.arange(24), torch.arange(16)])[None]
    off = {"use_cache": False} if _accepts(model, "use_cache") else {}
    together = outputs_of(model, {"input_ids": torch.cat(documents, dim=1), "position_ids": positions, **off})
    alone = torch.cat([outputs_of(model, {"input_ids": ids, **off}) for ids in documents], dim=1)
    return _difference(together, alone)


def _gradients(model: PreTrainedModel, inputs: dict[str, Any]) -> set[str]:
    """The names of the parameters that a loss on all outputs gives a gradient other than zero; all are finite."""
    model.train()
    _first_output(model(**inputs)).float().square().mean().backward()
    model.eval()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    model.zero_grad()
    return {name for name, gradient in found.items() if gradient.any()}


def _generate(model: PreTrainedModel, padded: bool, use_cache: bool) -> torch.Tensor:
    inputs = inputs_for(model)
    more: dict[str, Any] = {}
    main = inputs[model.main_input_name]
    if model.main_input_name == "input_ids":
        main = main[:, :PROMPT]
        if padded:
            mask = torch.ones_like(main)
            mask[1, : PROMPT - 23] = 0
            more["attention_mask"] = mask
    return model.generate(
        main, do_sample=False, num_beams=1, max_new_tokens=NEW, min_new_tokens=NEW, use_cache=use_cache, **more
    )
