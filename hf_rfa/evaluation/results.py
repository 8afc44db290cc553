"""Settings and results of `compare`: plain data, which report.json holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_rfa.config import HeadIndex, RFAConfig
from hf_rfa.data.documents import SOURCE_HELP
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.measures import PositionBin
from hf_rfa.evaluation.speed import Speed
from hf_rfa.evaluation.tasks.measuring import TaskScore, TaskSettings
from hf_rfa.options import Settings, option, part
from hf_rfa.runtime.devices import DEVICE_HELP
from hf_rfa.runtime.kept_tokens import KeptTokens

#: Version of report.json.
REPORT_VERSION = 1

ORIGINAL = "original"
WINDOW_ONLY = "window only"
LINEAR = "every head linear"
EXACT = "retrieval heads exact"
VARIANTS = (ORIGINAL, WINDOW_ONLY, LINEAR, EXACT)
SAME_WINDOW = "window of the same bytes"
SAME_SPLIT = "exact heads, window of the same bytes"
SAME_KEPT = "kept keys, no features"
#: At the bytes of `EXACT`, see `hf_rfa.evaluation.equal_bytes`.
SAME_BYTES = (SAME_WINDOW, SAME_SPLIT, SAME_KEPT)

#: Columns by the names that the option `columns` takes. The original is always the first.
COLUMNS = {
    "window": WINDOW_ONLY,
    "linear": LINEAR,
    "exact": EXACT,
    "same_window": SAME_WINDOW,
    "same_split": SAME_SPLIT,
    "same_kept": SAME_KEPT,
}
#: Each column costs a measurement, and in `compare` a fine-tuning.
DEFAULT_COLUMNS = ("window", "linear", "exact")
COLUMNS_HELP = (
    "Columns beside the original, some of: window (the window alone), linear (every head linear), exact (retrieval "
    "heads exact); and at the bytes that the cache of the conversion has at the longest context: same_window (window "
    "and sinks alone), same_split (the same exact heads, a bare window for the others), same_kept (more kept keys in "
    "place of the features)."
)


def column_titles(names: Sequence[str]) -> list[str]:
    """The titles of the columns, the original first, in the order of `COLUMNS`.

    Raises:
        ConfigError: an unknown name.
    """
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise ConfigError(f"`columns` must be some of {', '.join(COLUMNS)}. Got {unknown}. Correct the names.")
    return [ORIGINAL, *(title for name, title in COLUMNS.items() if name in names)]


_MEASUREMENT, _TUNING, _RUN = "Measurement", "Calibration and fine-tuning", "Run"


@dataclass(frozen=True)
class CompareSettings(Settings):
    """Settings of `compare`, and the options of `hf-rfa compare`."""

    model: str = option("Folder or hub id of a causal LM; by default the embedded 3.5M-parameter model.")
    data: str = option(SOURCE_HELP, "stdlib")
    output: str = option("Folder for report.md, report.json, the plots and the converted model.", "hf-rfa-report")
    seed: int = option("Seed of omega, of calibration and of training batches.", 0, least=0)
    conversion: RFAConfig = part(  # of the last column, whose exact heads the one before does without
        RFAConfig(softmax_heads="auto"),
        only=(
            *("feature_map", "num_features", "window", "sink_tokens", "kept_keys", "softmax_heads", "loss_budget"),
            *("budget", "budget_context", "seed"),
        ),
        group="Conversion",
    )
    columns: tuple[str, ...] = option(COLUMNS_HELP, DEFAULT_COLUMNS, group=_MEASUREMENT)
    contexts: tuple[int, ...] = option(
        "Context lengths, tokens; each must divide the longest.", (512, 1024, 2048), group=_MEASUREMENT
    )
    eval_windows: int = option(
        "Held-out windows of the longest context to measure on.", 8, group=_MEASUREMENT, least=1
    )
    copy_gaps: tuple[int, ...] = option(
        "Tokens between the two appearances of a span that is to be copied.", (300, 1500), group=_MEASUREMENT
    )
    speed_contexts: tuple[int, ...] = option(
        "Prompts whose time and cache are measured, tokens; may exceed the model's trained length.",
        (1024, 4096, 16384), group=_MEASUREMENT,
    )  # fmt: skip
    speed_repeats: int = option("Timed runs per model and prompt; the median counts.", 3, group=_MEASUREMENT, least=1)
    new_tokens: int = option("Tokens decoded to measure the speed.", 32, group=_MEASUREMENT, least=1)
    task_settings: TaskSettings = part(TaskSettings(), group=_MEASUREMENT)
    calibration_batches: int = option("Batches to calibrate on.", 2, group=_TUNING, least=1)
    steps: int = option(
        "Fine-tuning steps, the same for all columns; 0 for no fine-tuning.", 40, group=_TUNING, least=0
    )
    batch_size: int = option("Sequences per batch, of the longest context.", 2, group=_TUNING, least=1)
    learning_rate: float = option(
        "Highest learning rate of AdamW (linear warm-up, cosine decay).", 1e-4, group=_TUNING, above=0,
        below=float("inf"),
    )  # fmt: skip
    repeat_probability: float = option(
        "Share of the training sequences that repeat earlier spans from beyond the window.",
        0.5,
        group=_TUNING,
        least=0,
        most=1,
    )
    mixed_precision: Literal["auto", "no", "bf16"] = option(
        "Precision of fine-tuning; 'auto' is bf16 if the hardware multiplies bf16 matrices.", "auto", group=_TUNING
    )
    threads: int | None = option(
        "CPU threads; by default the cores that are idle at the start.", None, group=_RUN, least=1
    )
    device: str = option(DEVICE_HELP, "auto", group=_RUN)

    def __post_init__(self) -> None:
        super().__post_init__()
        column_titles(self.columns)  # raises where a name is unknown
        for name in ("contexts", "copy_gaps", "speed_contexts"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
        if not self.contexts or any(n < 2 or max(self.contexts) % n for n in self.contexts):
            raise ConfigError(
                "Each of `contexts` must divide the longest, so that all are measured on the same tokens. Got "
                f"{list(self.contexts)}. Set, for example, 512,1024,2048."
            )
        if not self.speed_contexts or min(self.speed_contexts) < 1:
            raise ConfigError(
                f"`speed_contexts` must be prompts of at least 1 token. Got {list(self.speed_contexts)}. Set, for "
                "example, 1024,4096."
            )
        if self.conversion.window < 1:
            raise ConfigError(
                "`window` must be at least 1: without one there is no window-only model to compare with. Got "
                f"{self.conversion.window}. Set it to, for example, 64."
            )


@dataclass(frozen=True)
class Quality:
    """Quality of one model, on the same tokens as all others (definitions: `hf_rfa.evaluation.measures`)."""

    perplexity: dict[int, float]  # context -> exp(nats/token)
    bits_per_byte: dict[int, float]  # context -> bits
    by_position: list[PositionBin]  # at the longest context
    kl_to_original: float  # nats/token at the longest context
    far_recovery: float | None  # at the longest context; None if the window loses nothing
    copy_perplexity: dict[int, float]  # gap -> perplexity of a span's second appearance
    greedy_agreement: float  # share of tokens
    cache_bytes: int | None = None  # after the longest context, batch size 1
    tasks: list[TaskScore] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """Cost and losses of the fine-tuning of one variant."""

    steps: int
    tokens: int
    seconds: float
    losses: list[float]  # nats/token, one per step


@dataclass
class Comparison:
    """Everything that `compare` measured. Keys are the titles of the columns."""

    settings: CompareSettings
    environment: dict[str, Any]  # versions, device, threads
    parameters: int
    key_heads: int  # over all layers
    bytes_per_token: float
    eval_tokens: int
    softmax_heads: list[HeadIndex] = field(default_factory=list)  # of the last variant
    calibration: dict[str, Any] = field(
        default_factory=dict
    )  # hf_rfa.CalibrationReport.to_dict(), of both conversions
    calibrated: dict[str, Quality] = field(default_factory=dict)  # no weight trained
    finetuned: dict[str, Quality] = field(default_factory=dict)  # empty if steps = 0
    training: dict[str, Training] = field(default_factory=dict)
    speed: dict[str, list[Speed]] = field(default_factory=dict)  # one per length of the prompt
    kept: KeptTokens | None = None  # of every head linear, over held-out text; None without kept keys
    seconds: float = 0.0  # the whole job
    report_version: int = REPORT_VERSION


def source_name(source: str | Path) -> str:
    """A local folder by its own name, so that reports hold no paths of a user's machine; a hub id as it is."""
    return Path(source).name if Path(source).exists() else str(source)
