"""What the main job is asked for and what it found: plain data, written to report.json as it is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.measures import PositionBin
from hf_rfa.evaluation.speed import Speed

#: Version of report.json.
REPORT_VERSION = 1

ORIGINAL = "original"
WINDOW_ONLY = "window only"
LINEAR = "every head linear"
EXACT = "retrieval heads exact"
VARIANTS = (ORIGINAL, WINDOW_ONLY, LINEAR, EXACT)


@dataclass(frozen=True)
class CompareSettings:
    """What `compare` does. `model` and `data` take a folder or an id of the Hugging Face Hub."""

    model: str
    data: str = "stdlib"
    output: str = "hf-rfa-report"
    feature_map: str = "hyperbolic"
    num_features: int = 64
    window: int = 64
    sink_tokens: int = 4
    softmax_heads: Any = "auto"  # of the last variant, see RFAConfig
    contexts: tuple[int, ...] = (512, 1024, 2048)  # each a divisor of the longest
    eval_windows: int = 8  # of the longest context
    copy_gaps: tuple[int, ...] = (300, 1500)  # tokens between the two appearances of a span
    calibration_batches: int = 2
    steps: int = 40  # of fine-tuning; 0 = none
    batch_size: int = 2  # sequences of the longest context, in calibration and fine-tuning
    learning_rate: float = 1e-4
    repeat_probability: float = 0.5  # share of training sequences with planted repeats, see hf_rfa.data
    mixed_precision: str = "auto"  # of fine-tuning: "no", "bf16", or "auto" = bf16 where the hardware has it
    speed_contexts: tuple[int, ...] = (1024, 4096, 16384)  # may be longer than what the model has learnt
    speed_repeats: int = 3
    new_tokens: int = 32  # decoded when speed is measured
    seed: int = 0
    threads: int | None = None  # None = the cores that are idle at the start
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.contexts or any(n < 2 or max(self.contexts) % n for n in self.contexts):
            raise ConfigError(
                "Each of `contexts` must divide the longest, so that all are measured on the same tokens. Got "
                f"{list(self.contexts)}. Set, for example, 512,1024,2048."
            )
        if not self.speed_contexts or min(self.speed_contexts) < 1:
            raise ConfigError(
                f"`speed_contexts` must be prompts of at least 1 token. Got {list(self.speed_contexts)}."
            )
        if self.window < 1:
            raise ConfigError(
                f"`window` must be at least 1: without one there is no window-only model to compare with. Got "
                f"{self.window}."
            )
        if self.steps < 0:
            raise ConfigError(f"`steps` must be at least 0. Got {self.steps}. 0 leaves fine-tuning out.")
        for name in ("eval_windows", "calibration_batches", "batch_size", "speed_repeats", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1. Got {getattr(self, name)}.")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"`threads` must be at least 1. Got {self.threads}. Leave it out for the idle cores.")
        if self.mixed_precision not in ("auto", "no", "bf16"):
            raise ConfigError(f"`mixed_precision` must be 'auto', 'no' or 'bf16'. Got {self.mixed_precision!r}.")


@dataclass(frozen=True)
class Quality:
    """How good one model is, all on the same tokens (definitions: `hf_rfa.evaluation`)."""

    perplexity: dict[int, float]  # context -> exp(nats/token)
    bits_per_byte: dict[int, float]  # context -> bits
    by_position: list[PositionBin]  # at the longest context
    kl_to_original: float  # nats/token at the longest context
    far_recovery: float | None  # at the longest context; None where the window loses nothing
    copy_perplexity: dict[int, float]  # gap -> perplexity of a span's second appearance
    greedy_agreement: float  # share of tokens


@dataclass(frozen=True)
class Training:
    """What the fine-tuning of one variant took."""

    steps: int
    tokens: int
    seconds: float
    losses: list[float]  # nats/token, one per step


@dataclass
class Comparison:
    """Everything that the main job measured. Keys are the names in `VARIANTS`."""

    settings: CompareSettings
    environment: dict[str, Any]  # versions, device, threads
    parameters: int
    key_heads: int  # over all layers
    bytes_per_token: float
    eval_tokens: int
    softmax_heads: list[tuple[int, int]] = field(default_factory=list)  # (layer, key head) of the last variant
    calibration: dict[str, Any] = field(
        default_factory=dict
    )  # hf_rfa.CalibrationReport.to_dict(), of both conversions
    calibrated: dict[str, Quality] = field(default_factory=dict)  # no weight trained
    finetuned: dict[str, Quality] = field(default_factory=dict)  # empty if steps = 0
    training: dict[str, Training] = field(default_factory=dict)
    speed: dict[str, list[Speed]] = field(default_factory=dict)  # one per length of the prompt
    seconds: float = 0.0  # the whole job
    report_version: int = REPORT_VERSION


def source_name(source: str | Path) -> str:
    """A local folder by its own name: a report that is passed on shall not carry a user's paths."""
    return Path(source).name if Path(source).exists() else str(source)
