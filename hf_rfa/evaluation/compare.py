"""`compare`: an original, its window-only model and its conversions, measured side by side on the same tokens.

from hf_rfa.evaluation.compare import compare, default_model
from hf_rfa.evaluation.results import CompareSettings
comparison = compare(CompareSettings(model=default_model()))
"""

import copy
import dataclasses
import os
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import hf_rfa
from hf_rfa.config import RFAConfig
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.equal_bytes import equal_bytes_columns
from hf_rfa.evaluation.measuring import Tokens, with_far_recovery
from hf_rfa.evaluation.results import (
    EXACT,
    LINEAR,
    ORIGINAL,
    SAME_BYTES,
    WINDOW_ONLY,
    CompareSettings,
    Comparison,
    Training,
    column_titles,
)
from hf_rfa.evaluation.speed import measure_speed
from hf_rfa.runtime.devices import chosen_device
from hf_rfa.runtime.record import conversion_config
from hf_rfa.training.config import FinetuneConfig
from hf_rfa.training.loop import finetune

# Units of the progress bar, about a second each on two cores, per measurement of quality, per calibration and per turn
# of the speed measurement; a step of fine-tuning is one unit.
_QUALITY_UNITS, _CALIBRATION_UNITS, _SPEED_UNITS = 8, 12, 1
_BAR = "{desc:36} {percentage:3.0f}% |{bar:30}| {elapsed} < {remaining}"


def default_model() -> str:
    """Folder of the embedded model: `examples/stdlib-llama` of a clone, or the copy inside an installed package.

    Raises:
        FileNotFoundError: neither is there.
    """
    package = Path(hf_rfa.__file__).resolve().parent
    folders = (package.parent / "examples" / "stdlib-llama", package / "_embedded" / "stdlib-llama")
    for folder in folders:
        if (folder / "config.json").is_file():
            return str(folder)
    raise FileNotFoundError(
        "The embedded model is missing: no config.json in "
        + " or ".join(f"{folder.parent.name}/{folder.name}" for folder in folders)
        + ". Install the package again, train it with `python examples/train_stdlib_llama.py`, or name a model with "
        "`--model`."
    )


def compare(
    settings: CompareSettings, *, progress: bool = True
) -> tuple[Comparison, PreTrainedModel, PreTrainedTokenizerBase]:
    """Converts, calibrates, measures, fine-tunes and measures again.

    By default four models are compared: the original; `window only`, which sees the exact window and the sinks and
    nothing else; `every head linear`; and `retrieval heads exact`, which keeps the costliest key heads as softmax. Up
    to three more hold as many bytes as the last one, see `hf_rfa.evaluation.equal_bytes`. All are fine-tuned alike:
    same batches, same steps. The KL divergence and the greedy agreement of every model, before and after fine-tuning,
    are with the untrained original.

    Returns:
        The figures, the model `retrieval heads exact` (fine-tuned if it is among the columns), and the tokenizer. All
        models are in memory at the same time.

    Raises:
        ConfigError, ValueError, OSError: settings, data or a model that cannot be used.
        UnsupportedModelError: the model cannot be converted.
        FloatingPointError: logits or a loss that are not finite.
    """
    started = time.perf_counter()
    torch.set_num_threads(_idle_cores() if settings.threads is None else settings.threads)
    torch.manual_seed(settings.seed)
    bar = tqdm(total=0, disable=not progress, desc="loading", bar_format=_BAR)
    with bar:
        original, tokenizer = _load(settings)
        speed_contexts, names = _speed_contexts(settings, original), column_titles(settings.columns)
        bar.total = _CALIBRATION_UNITS + len(names) * (
            _QUALITY_UNITS * (2 if settings.steps else 1)
            + _SPEED_UNITS * len(speed_contexts) * settings.speed_repeats
            + settings.steps
        )
        tokens = Tokens(settings, tokenizer)
        models = {ORIGINAL: original, **_conversions(settings, original, names)}
        comparison = Comparison(
            settings=settings,
            environment=_environment(original.device),
            parameters=original.num_parameters(),
            key_heads=0,
            bytes_per_token=tokens.bytes_per_token,
            eval_tokens=len(tokens.evaluated),
        )

        bar.set_description("calibrating")
        report = hf_rfa.calibrate(models[EXACT], tokens.calibration_batches())
        converted = models[EXACT]
        if LINEAR in models:
            _only_linear(models[LINEAR], converted)
        models |= _of_equal_bytes(original, converted, tokens.prompt(tokens.longest), names)
        models = {name: models[name] for name in names}
        comparison.calibration = report.to_dict()
        comparison.key_heads = len(report.ranking)
        comparison.softmax_heads = report.softmax_heads
        bar.update(_CALIBRATION_UNITS)

        measure = tokens.measurer(original)
        for name in names:
            bar.set_description(f"measuring {name}")
            comparison.calibrated[name] = measure(models[name])
            bar.update(_QUALITY_UNITS)
        comparison.calibrated = with_far_recovery(comparison.calibrated, tokens.longest)
        if conversion_config(converted).most_kept_keys:
            comparison.kept = hf_rfa.kept_tokens(models.get(LINEAR, converted), tokens.prompt(tokens.longest))

        for context in speed_contexts:
            bar.set_description(f"speed at {context} tokens")
            prompt = tokens.prompt(context)
            speeds = measure_speed(models, prompt, context, settings.new_tokens, settings.speed_repeats, bar.update)
            for name, speed in speeds.items():
                comparison.speed.setdefault(name, []).append(speed)

        if settings.steps:
            models[ORIGINAL] = copy.deepcopy(original)  # the KL divergence needs the untouched one
            for name in names:
                bar.set_description(f"fine-tuning {name}")
                comparison.training[name] = _finetune(models[name], settings, tokens, bar)
                bar.set_description(f"measuring {name}")
                comparison.finetuned[name] = measure(models[name])
                bar.update(_QUALITY_UNITS)
            comparison.finetuned = with_far_recovery(comparison.finetuned, tokens.longest)
        bar.set_description("done")
    comparison.seconds = time.perf_counter() - started
    return comparison, converted, tokenizer


def _load(settings: CompareSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    device = chosen_device(settings.device)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval().to(device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max(settings.contexts) > limit:
        raise ConfigError(
            f"The model's positions end at {limit} (`max_position_embeddings`). Got a context of "
            f"{max(settings.contexts)}. Lower `contexts`."
        )
    return model, AutoTokenizer.from_pretrained(settings.model)


def _speed_contexts(settings: CompareSettings, model: PreTrainedModel) -> list[int]:
    """Rotary models can be timed beyond their trained length; position tables cannot."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None or getattr(config, "rope_parameters", None) is not None:
        return list(settings.speed_contexts)
    return [n for n in settings.speed_contexts if n + settings.new_tokens <= limit]


def _conversions(
    settings: CompareSettings, original: PreTrainedModel, names: Sequence[str]
) -> dict[str, PreTrainedModel]:
    """Converted copies of the original, not calibrated yet: the one with exact heads, and those of `names`."""
    config = dataclasses.replace(settings.conversion, softmax_heads=None, budget=None)
    configs = {
        WINDOW_ONLY: dataclasses.replace(config, gamma=0.0, kept_keys=0, head_kept_keys=None),
        LINEAR: config,
        EXACT: settings.conversion,
    }
    return {
        name: hf_rfa.convert(copy.deepcopy(original), config, calibrate=False)
        for name, config in configs.items()
        if name in (EXACT, *names)
    }


def _only_linear(model: PreTrainedModel, converted: PreTrainedModel) -> None:
    """Make an uncalibrated conversion the calibrated one without exact heads; those keep the usual number of keys."""
    config = conversion_config(converted)
    hf_rfa.set_kept_keys(model, config.usual_kept_keys, dict(config.head_kept_keys or ()))
    model.load_state_dict(converted.state_dict())
    hf_rfa.set_softmax_heads(model, [])


def _of_equal_bytes(
    original: PreTrainedModel, converted: PreTrainedModel, ids: Tensor, names: Sequence[str]
) -> dict[str, PreTrainedModel]:
    """Those of `names` whose caches after `ids` have the bytes of the converted model's."""

    def convert(config: RFAConfig) -> PreTrainedModel:
        return hf_rfa.convert(copy.deepcopy(original), config, calibrate=False)

    return equal_bytes_columns(convert, converted, ids, [name for name in names if name in SAME_BYTES])


class _BarHook:
    """Advances the bar with each optimiser step."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def step(self, model: PreTrainedModel) -> None:
        self._bar.update()


def _finetune(model: PreTrainedModel, settings: CompareSettings, tokens: Tokens, bar: tqdm) -> Training:
    bf16 = settings.mixed_precision == "bf16" or (settings.mixed_precision == "auto" and _has_bfloat16(model.device))
    config = FinetuneConfig(
        steps=settings.steps, learning_rate=settings.learning_rate, mixed_precision="bf16" if bf16 else "no",
        progress=not bar.disable,
    )  # fmt: skip
    done = finetune(model, tokens.training_batches(), config, hooks=[_BarHook(bar)])
    return Training(done.step, done.tokens, done.seconds, done.losses)


def _idle_cores() -> int:
    """PyTorch's number of threads minus the cores that are busy already, at least 1.

    On a busy machine, threads that wait for each other make small models many times slower than a single thread.
    """
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, torch.get_num_threads() - round(busy))


def _has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices; otherwise autocast to bfloat16 is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    features = _cpu_features()
    return bool(features.get("amx_bf16") or features.get("avx512_bf16"))


def _cpu_features() -> Mapping[str, Any]:
    """The processor's capabilities as PyTorch reports them; empty if PyTorch is too old."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def _version() -> str:
    try:
        return version("hf_rfa")
    except PackageNotFoundError:  # run from a clone that was not installed
        return "unknown"


def _environment(device: torch.device) -> dict[str, Any]:
    cpu = _cpu_features().get("cpu_name") or platform.machine()
    return {
        "hf_rfa": _version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
    }
