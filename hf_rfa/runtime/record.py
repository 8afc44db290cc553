"""A model's record of its conversion: the config, the attention it had before, the calibration report."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_rfa.config import RFAConfig
from hf_rfa.errors import ConfigError, UnsupportedModelError
from hf_rfa.report import CalibrationReport

#: The name of the attention implementation in Transformers.
IMPLEMENTATION = "rfa"
#: Where the conversion is noted in the model's own config, which its `save_pretrained` writes.
CONFIG_FIELD = "rfa_config"
#: Config objects, outer ones first, with the implementation that each has: setting an outer one sets the inner ones.
Implementations = list[tuple[Any, str]]
#: The attribute of a converted model that holds its `Conversion`.
RECORD = "_rfa_conversion"
#: The same attribute of every Transformers model inside the converted one, itself included.
INSIDE = "_rfa_conversion_around"
#: The attribute of a converted model's class that holds its original class.
ORIGINAL = "_rfa_original_class"


@dataclass
class Conversion:
    """All that `revert` and saving need.

    Attributes:
        implementations: The config objects of the model and the implementation that each had.
        scope: The caller's choices for the dry run, as JSON: `parts` and `example_inputs`; {} if none were made.
        packs: Whether the model keeps packed documents apart.
    """

    config: RFAConfig
    implementations: Implementations
    scope: dict[str, Any]
    report: CalibrationReport | None = None
    packs: bool = True


def wrapped_models(model: nn.Module) -> Iterator[nn.Module]:
    """The model and what it wraps, from the outside in: `torch.compile`, PEFT, distributed wrappers, a
    SentenceTransformer; the last one is the Transformers model.

    Raises:
        ConfigError: There is no Transformers model in it.
        UnsupportedModelError: A SentenceTransformer that computes with another backend than torch, or with several
            Transformers models.
    """
    while True:
        yield model
        if isinstance(model, PreTrainedModel):
            return
        unwrap: Any = getattr(model, "get_base_model", None)
        # `torch.compile(model)` holds the model as its one submodule, and hands on every other attribute of it.
        inner: Any = model._modules.get("_orig_mod") if isinstance(model, nn.Module) else None
        if inner is None and is_sentence_transformer(model):
            inner = _inside_sentence_transformer(model)
        if inner is None:
            inner = unwrap() if unwrap is not None else getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise ConfigError(
                f"`model` must be a loaded Transformers model. Got {type(model).__name__}. Load it with "
                "`from_pretrained`, or pass a SentenceTransformer that holds one."
            )
        model = inner


def base_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside `torch.compile`, PEFT, distributed wrappers or a SentenceTransformer."""
    *_, base = wrapped_models(model)
    assert isinstance(base, PreTrainedModel)
    return base


def is_sentence_transformer(model: Any) -> bool:
    """Whether it is a model of sentence-transformers, which need not be installed."""
    return isinstance(model, nn.Module) and hasattr(type(model), "transformers_model")


def _inside_sentence_transformer(model: Any) -> nn.Module | None:
    """The one Transformers model (or a PEFT model around it); None if it has none."""
    if model.get_backend() != "torch":
        raise UnsupportedModelError(
            f"This {type(model).__name__} computes with {model.get_backend()}, outside of Transformers. Got "
            f"backend={model.get_backend()!r}. Load it with backend='torch'; after the conversion there is no export "
            "to ONNX or OpenVINO, nor a quantised one."
        )
    modules = list(model.modules())
    inside = {id(part) for m in modules if isinstance(m, PreTrainedModel) for part in m.modules() if part is not m}
    outermost = [m for m in modules if isinstance(m, PreTrainedModel) and id(m) not in inside]
    if len(outermost) > 1:
        raise UnsupportedModelError(
            f"This {type(model).__name__} holds {len(outermost)} Transformers models (a router). Convert each by "
            "itself, as `hf_rfa.convert(module.model)` of the modules that hold them."
        )
    inner = model.transformers_model
    return inner if isinstance(inner, nn.Module) else None


def original_class(model: nn.Module) -> Any:
    """The class of a model without its conversion."""
    return getattr(type(model), ORIGINAL, type(model))


def is_converted(model: nn.Module) -> bool:
    """Whether `convert` was called on the model."""
    return hasattr(base_model(model), RECORD)


def conversion_config(model: nn.Module) -> RFAConfig:
    """The config that the model was converted with, its exact heads as calibration resolved them."""
    base = base_model(model)
    if not is_converted(base):
        raise UnsupportedModelError(
            f"This {type(base).__name__} is not converted. Call `hf_rfa.convert(model)` first."
        )
    config: RFAConfig = getattr(base, RECORD).config
    return config


def store_config(model: nn.Module, config: RFAConfig) -> None:
    """Write `config` into the model's own config (saved with it) and its conversion record."""
    base = base_model(model)
    getattr(base, RECORD).config = config
    setattr(base.config, CONFIG_FIELD, config.to_dict())


def store_report(model: nn.Module, report: CalibrationReport | None) -> None:
    """Keep the calibration report beside the conversion."""
    getattr(base_model(model), RECORD).report = report


def stored_report(model: nn.Module) -> CalibrationReport | None:
    """The calibration report; None if the model was not calibrated."""
    report: CalibrationReport | None = getattr(base_model(model), RECORD).report
    return report


def calibration_report(model: nn.Module) -> CalibrationReport:
    """How each head of a converted model was fitted and what it costs; saved by `save_pretrained`.

    Raises:
        UnsupportedModelError: The model is not converted, or was not calibrated.

    Example:
        >>> import torch, hf_rfa
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=64)
        >>> model, ids = LlamaForCausalLM(LlamaConfig(**size)), torch.arange(200)[None] % 64
        >>> model = hf_rfa.convert(model, hf_rfa.RFAConfig(window=16), calibrate=ids)
        >>> len(hf_rfa.calibration_report(model).heads)
        2
    """
    conversion_config(model)  # raises if it is not converted
    report = stored_report(model)
    if report is None:
        raise UnsupportedModelError(
            f"This {type(base_model(model)).__name__} was converted but not calibrated. Call `hf_rfa.calibrate(model, "
            "batches)`."
        )
    return report
