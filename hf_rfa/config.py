"""`RFAConfig`: everything that decides what a conversion does, checked where it is made, saved beside the weights."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hf_rfa.config_checks import (
    LAYER_RULE,
    check_budget,
    check_choice,
    check_int,
    check_kept,
    is_int,
    normalise_features,
    normalise_heads,
    normalise_kept,
    normalise_layers,
)
from hf_rfa.errors import ConfigError
from hf_rfa.registry import FEATURE_MAPS
from hf_rfa.value_types import plain

#: Version of the saved format. A file with a higher one is refused instead of half understood.
FORMAT_VERSION = 2

#: (layer, key_head), both counted from 0, layers in the order in which the model calls them.
HeadIndex = tuple[int, int]
SoftmaxHeads = Literal["auto"] | float | Sequence[HeadIndex] | None
#: A string is a rule, see `RFAConfig.layers`.
Layers = Literal["all"] | Sequence[int] | str
LayerFeatures = Mapping[int, int] | Sequence[tuple[int, int]] | None
KeptKeys = int | Literal["auto"] | None
HeadNumbers = Mapping[HeadIndex, int] | Sequence[tuple[HeadIndex, int]] | None
#: "learned": drawn as "sphere", then trained by `distill` or found by `calibrate`, and never redrawn.
OmegaDraw = Literal["sphere", "orthogonal", "gaussian", "learned"]
OMEGA_DRAWS: tuple[str, ...] = get_args(OmegaDraw)
#: `kept_keys` where nothing is said and there is a window. On a real model it is the largest step in fidelity for its
#: bytes (scripts/experiments/README.md, *Kept keys*).
DEFAULT_KEPT_KEYS = 128
#: With `feature_map="auto"`, `calibrate` chooses one of these per key head; before that all heads have the first.
AUTO_MAPS = ("hyperbolic", "trigonometric")


def seen_exactly(window: int, sink_tokens: int) -> str:
    """The tokens that a query of a causal layer sees exactly, in words.

    Example:
        >>> seen_exactly(64, 4)
        '64 to 128 tokens and the first 4'
    """
    if not window:
        return "no token"
    return f"{window} to {2 * window} tokens" + (f" and the first {sink_tokens}" if sink_tokens else "")


def _help(text: str, default: Any, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class RFAConfig:
    """The attention that `hf_rfa.convert` puts in the place of softmax.

    A query attends exactly to its near keys and through random features to all others, under one normaliser:

        out_i = (sum_near exp(q.k) v + gamma psi(alpha q)^T S_far) / (sum_near exp(q.k) + gamma psi(alpha q)^T z_far)

    Near are the tokens of the query's chunk up to itself, those of the chunk before (together C to 2C tokens, with
    C = `window`) and the sinks. Calibration also gives each head a limit (`FarKernel.far_limit`): where the far
    sums are estimated to be more than so many times the near one, they are scaled down to that.

    Example:
        >>> from hf_rfa import RFAConfig
        >>> config = RFAConfig(feature_map="trigonometric", num_features=128, window=32)
        >>> config.num_features, config.window
        (128, 32)
        >>> RFAConfig(num_features=0)
        Traceback (most recent call last):
        ...
        hf_rfa.errors.ConfigError: `num_features` must be a positive integer. Got 0. Set it to, for example, 64.
    """

    feature_map: str = _help(
        "Random features psi: 'auto' (hyperbolic or trigonometric, chosen per key head by `calibrate`), or one of",
        "hyperbolic",
        choices=FEATURE_MAPS,
    )
    num_features: int = _help(
        "Random features per key head (D_random). A feature has one or two components, depending on the map.", 64
    )
    layer_features: LayerFeatures = _help(
        "Other numbers of random features for some layers, as {layer: number}; for example more where heads retrieve.",
        None,
    )
    omega: OmegaDraw = _help(
        "How omega is drawn: 'sphere' (blocks of orthogonal directions of equal length: least error, a small bias), "
        "'orthogonal' (the same with lengths as of N(0, I): unbiased) or 'gaussian' (i.i.d.). 'learned': drawn as "
        "'sphere', then trained by `distill` or found by `calibrate` (the clustered map); never redrawn.",
        "sphere",
    )
    window: int = _help(
        "Chunk size C of the exact near part, tokens. A query sees its own chunk up to itself and the whole chunk "
        "before, so C to 2C tokens exactly; layers that see both sides also see the chunk after. 0 = pure RFA: every "
        "key goes through the features.",
        64,
    )
    sink_tokens: int = _help("The first tokens of a sequence that every query sees exactly. Ignored if window = 0.", 4)
    kept_keys: KeptKeys = _help(
        "Far keys that each linear key head goes on seeing exactly: those that took the largest share of attention, "
        "chosen anew each time a chunk leaves the window (layers that see both sides: once, by queries from all over "
        "the text). All others go through the features. Needs a window: by default 128, and 0 if window = 0. 'auto': "
        "`calibrate` decides for each head, see `loss_budget`. `hf_rfa.kept_tokens` shows which they are.",
        None,
    )
    head_kept_keys: HeadNumbers = _help(
        "Other numbers of kept keys for some key heads, as {(layer, key_head): number}: heads differ a lot in how "
        "many far keys matter to them.",
        None,
    )
    softmax_heads: SoftmaxHeads = _help(
        "Key heads that stay exact softmax: None, 'auto' (as few as keep the loss small, see `loss_budget`; chosen by "
        "`calibrate`), a fraction of all key heads (chosen by `calibrate`), or a list of (layer, key_head).",
        None,
    )
    loss_budget: float = _help(
        "The loss that softmax_heads='auto' and kept_keys='auto' accept: bytes are spent on exact heads (at most a "
        "quarter of all), on kept keys or on both, each where it lowers the divergence most, until the converted "
        "model diverges by at most this much, as measured on the first 2,048 tokens of the calibration text (KL of "
        "the next token, nats/token). The same curve as `budget`'s, walked until the loss is small instead of until "
        "the bytes are spent.",
        0.005,
    )
    budget: float | str | None = _help(
        "Cache bytes to spend, by `calibrate`, where they lower the divergence most, on kept keys and exact heads: a "
        "share of the original's KV bytes at `budget_context` tokens in the converted layers, or 'N tokens' per key "
        "head whatever the length (then no head is exact). Decides `softmax_heads` and `head_kept_keys`. Windows and "
        "features stay as they are: as a choice of each layer they save little (scripts/experiments/README.md).",
        None,
    )
    budget_context: int = _help(
        "The length of text at which exact heads, and a share as `budget`, are counted, tokens.", 8192
    )
    layers: Layers = _help(
        "Layers to convert: 'all', a list of indices, or a rule such as 'every 4th stays softmax'.", "all"
    )
    seed: int = _help("Seed of omega. A draw is a function of (seed, layer, draw number).", 0)
    resample: Literal["never", "forward"] | int = _help(
        "When omega is redrawn in training: 'never', 'forward' (once per training forward of the model), or an "
        "integer k (every k optimiser steps, by `ResampleCallback`).",
        "never",
    )
    alpha: float = _help(
        "Tempering of the far kernel before calibration: far keys use psi(alpha q) psi(alpha k). 1 = the unbiased "
        "estimate, 0 = the plain mean of the far values.",
        0.25,
    )
    gamma: float = _help("Weight of the far part before calibration; 0 = none (the window alone).", 1.0)
    gate: bool = _help(
        "A forget gate of the far state per key head (Peng et al. 2021, section 3.2). It starts open; `distill` and "
        "fine-tuning train it. Causal layers only.",
        False,
    )

    def __post_init__(self) -> None:
        check_choice("feature_map", self.feature_map, ("auto", *FEATURE_MAPS))
        check_choice("omega", self.omega, OMEGA_DRAWS)
        check_int("num_features", self.num_features, 1, "a positive integer", "Set it to, for example, 64.")
        check_int("window", self.window, 0, "a non-negative integer", "Set 64, or 0 for pure RFA.")
        check_int("sink_tokens", self.sink_tokens, 0, "a non-negative integer", "Set 4, or 0 for none.")
        check_int("seed", self.seed, 0, "a non-negative integer", "Set 0.")
        check_kept(self.kept_keys, self.head_kept_keys, self.window)
        if self.window and self.sink_tokens > self.window:
            raise ConfigError(
                f"`sink_tokens` must be at most `window`. Got {self.sink_tokens} > {self.window}. Lower the one or "
                "raise the other."
            )
        for name in ("alpha", "gamma", "loss_budget"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(
                    f"`{name}` must be a finite number >= 0. Got {value!r}. Set it to, for example, 0.25."
                )
        every = self.resample if isinstance(self.resample, int) and not isinstance(self.resample, bool) else 0
        if self.resample not in ("never", "forward") and every < 1:
            raise ConfigError(
                "`resample` must be 'never', 'forward' or a positive integer k (every k optimiser steps). Got "
                f"{self.resample!r}. Set RFAConfig(resample='never')."
            )
        if self.feature_map == "clustered":
            if self.omega not in ("sphere", "learned"):  # "sphere" is the default and becomes "learned"
                raise ConfigError(
                    "With feature_map='clustered' the rows of omega are centroids of keys and are not drawn. Got "
                    f"omega={self.omega!r}. Leave `omega` out, or choose another map."
                )
            object.__setattr__(self, "omega", "learned")
        if self.omega == "learned" and self.resample != "never":
            raise ConfigError(
                f"omega='learned' is never redrawn. Got resample={self.resample!r}. Set RFAConfig(resample='never')."
            )
        if not isinstance(self.gate, bool):
            raise ConfigError(f"`gate` must be True or False. Got {self.gate!r}. Set RFAConfig(gate=False).")
        check_budget(self.budget, self.window)
        check_int("budget_context", self.budget_context, 1, "a positive integer", "Set 8192, for example.")
        object.__setattr__(self, "softmax_heads", normalise_heads(self.softmax_heads))
        object.__setattr__(self, "layers", normalise_layers(self.layers))
        object.__setattr__(self, "head_kept_keys", normalise_kept(self.head_kept_keys))
        object.__setattr__(self, "layer_features", normalise_features(self.layer_features))

    def features_of(self, layer: int) -> int:
        """Number of random features per key head of one layer."""
        return dict(self.layer_features or ()).get(layer, self.num_features)

    @property
    def usual_kept_keys(self) -> int:
        """The number of kept keys of the heads that `head_kept_keys` does not name; 'auto' begins with the default."""
        if self.kept_keys is None or self.kept_keys == "auto":
            return DEFAULT_KEPT_KEYS if self.window else 0
        return self.kept_keys

    def kept_of(self, layer: int, key_heads: int) -> int | tuple[int, ...]:
        """The number of kept keys of one layer, or that of each of its key heads where they differ."""
        others = dict(self.head_kept_keys or ())
        numbers = tuple(others.get((layer, head), self.usual_kept_keys) for head in range(key_heads))
        return numbers if len(set(numbers)) > 1 else numbers[0]

    @property
    def most_kept_keys(self) -> int:
        """The largest number of keys that any head keeps."""
        return max([self.usual_kept_keys, *(number for _, number in self.head_kept_keys or ())])

    def omega_rows(self, layer: int) -> int:
        """Number of rows of omega per key head of one layer."""
        rows = 1 if self.feature_map == "auto" else FEATURE_MAPS[self.feature_map].rows
        return self.features_of(layer) * rows

    def converts_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (in the order in which the model calls them) becomes RFA."""
        if self.layers == "all":
            return True
        if isinstance(self.layers, str):
            match = LAYER_RULE.fullmatch(self.layers)
            assert match is not None  # checked in `__post_init__`
            return (layer + 1) % int(match.group(1)) != 0
        return layer in self.layers

    def settled(self) -> "RFAConfig":
        """The same config with the default number of kept keys as a number, which another default does not change."""
        return self if self.kept_keys == "auto" else dataclasses.replace(self, kept_keys=self.usual_kept_keys)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of the `settled` config with the format version."""
        settled = self.settled()
        values = {field.name: plain(getattr(settled, field.name)) for field in dataclasses.fields(self)}
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RFAConfig":
        """The config that `to_dict` wrote. Raises `ConfigError` on a newer format or an unknown field."""
        values = dict(values)
        version = values.pop("format_version", None)
        if not is_int(version) or version < 1:
            raise ConfigError(
                f"`format_version` must be a positive integer. Got {version!r}. The config is damaged: save it again."
            )
        if version > FORMAT_VERSION:
            raise ConfigError(
                f"The saved conversion has format version {version}; this hf_rfa reads up to {FORMAT_VERSION}. "
                "Upgrade with `pip install -U hf_rfa`."
            )
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"Unknown fields in the saved config: {unknown}. Known ones: {sorted(known)}. Remove them or save "
                "the model again."
            )
        return cls(**{"kept_keys": 0, **values})  # files of versions before kept keys do not name them
