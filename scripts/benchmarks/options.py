"""The options of the benchmark: one mode per run, each with the options that it reads."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device import CLOCKS
from benchmarks.methods import BACKENDS, PEERS
from benchmarks.setting import DTYPES, PASSES

CONTEXTS = (1_000, 2_000, 4_000, 16_000, 64_000, 100_000)
_DECODING = {"batches": (1, 32), "contexts": CONTEXTS, "repeats": 5, "clock": "wall", "memory_limit": 10.0}
#: mode -> the options that it reads beside the shape of the call, with their defaults.
MODES: dict[str, dict[str, Any]] = {
    "time": {
        "lengths": (1024, 4096, 16384, 32768), "passes": PASSES, "windows": (64,), "maps": ("hyperbolic",),
        "repeats": 5, "clock": "wall", "backends": ("chunked",), "beside": (),
    },
    "memory": {
        "lengths": (4096, 16384, 32768, 65536, 131072, 262144), "passes": PASSES, "longest_softmax": 32768,
    },
    "peers": {"lengths": (1024, 4096, 16384), "repeats": 3, "clock": "wall", "memory_limit": 8.0},
    "decode": _DECODING,
    "generate": _DECODING,
    "packed": {
        "lengths": (4096,), "documents": (4, 16, 64, 256, 1024, 4096), "passes": PASSES, "repeats": 5, "clock": "wall",
    },
}  # fmt: skip
#: Those that differ on a GPU.
ON_GPU: dict[str, dict[str, Any]] = {
    "time": {"lengths": (1024, 2048, 4096, 8192, 16384, 65536), "backends": ("triton", "chunked")},
}


@dataclass
class Options(argparse.Namespace):
    """The options given; those that the mode does not read are None (or empty: `beside`, `peers`)."""

    mode: str = "time"
    device: str = "cpu"
    dtype: str | None = None
    heads: int | None = None
    key_heads: int | None = None
    head_dim: int | None = None
    kept_keys: int | None = None
    output: Path | None = None
    peers: Sequence[str] | None = None
    lengths: Any = None
    contexts: Any = None
    batches: Any = None
    documents: Any = None
    passes: Any = None
    windows: Any = None
    maps: Any = None
    backends: Any = None
    beside: Any = None
    repeats: Any = None
    clock: Any = None
    memory_limit: Any = None
    longest_softmax: Any = None


def parse(arguments: Sequence[str], description: str | None) -> Options:
    """The options with the defaults of their mode; one that the mode does not read is an error."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_mutually_exclusive_group()
    for name, text in (
        ("memory", "peak memory of a pass, Linux"),
        ("decode", "time per decoded token, one layer"),
        ("generate", "time per decoded token, whole model"),
        ("packed", "time of documents packed into a row, attention and whole model"),
    ):
        modes.add_argument(f"--{name}", dest="mode", action="store_const", const=name, default="time", help=text)
    modes.add_argument("--peers", nargs="*", choices=PEERS, help="other attentions; no names = all that can run here")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens N, ascending")
    parser.add_argument("--contexts", type=int, nargs="+", help="tokens before those that are decoded, ascending")
    parser.add_argument("--batches", type=int, nargs="+", help="rows that decode at once")
    parser.add_argument("--documents", type=int, nargs="+", help="tokens of each packed document, ascending")
    parser.add_argument("--passes", nargs="+", choices=PASSES)
    parser.add_argument("--windows", type=int, nargs="+", help="0 = pure RFA, no exact part")
    parser.add_argument("--maps", nargs="+", help="feature maps of two components")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="forms of RFA; ratios are for the first")
    parser.add_argument("--beside", nargs="+", choices=PEERS, help="peers as further columns of the table of times")
    parser.add_argument("--repeats", type=int, help="odd, so that the median is one of them")
    parser.add_argument("--clock", choices=CLOCKS, help="of the CPU; a GPU is timed by its events")
    parser.add_argument("--memory-limit", type=float, help="GiB; what needs more is left out, and the table says so")
    parser.add_argument("--longest-softmax", type=int, help="N up to which --memory runs softmax, in quadratic time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--key-heads", type=int, help="a divisor of --heads")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--kept-keys", type=int, help="far keys per key head that stay exact")
    parser.add_argument("--output", type=Path, help="folder for JSON, Markdown and plot")
    options = parser.parse_args(arguments, namespace=Options())
    if options.peers is not None:
        options.mode = "peers"
    _check(options, parser.error)
    return options


def _check(options: Options, error: Any) -> None:
    """Fill in the defaults of the mode, and end the program where something is asked for that cannot be."""
    reads = MODES[options.mode]
    for name in sorted({name for mode in MODES.values() for name in mode}):
        if name not in reads and getattr(options, name) is not None:
            error(f"{_flag(name)} says nothing to the mode {options.mode!r}, which reads {_flags(reads)}.")
    if options.device == "cuda" and options.clock is not None:
        error("--clock is of the CPU; on a GPU its events are the clock. Drop it.")
    for name, default in {**reads, **(ON_GPU.get(options.mode, {}) if options.device == "cuda" else {})}.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    for name in (
        "lengths",
        "contexts",
        "batches",
        "documents",
        "repeats",
        "heads",
        "key_heads",
        "head_dim",
        "kept_keys",
        "longest_softmax",
    ):
        value = getattr(options, name)
        values = value if isinstance(value, list | tuple) else [value]
        if any(number is not None and number < 1 for number in values):
            error(f"{_flag(name)} takes numbers from 1 on. Got {' '.join(map(str, values))}.")
    for name in ("lengths", "contexts", "documents"):
        if getattr(options, name) is not None and list(getattr(options, name)) != sorted(set(getattr(options, name))):
            error(f"{_flag(name)} must ascend. Got {' '.join(map(str, getattr(options, name)))}.")
    if options.documents is not None and max(options.documents) > max(options.lengths):
        got = (" ".join(map(str, numbers)) for numbers in (options.documents, options.lengths))
        error(f"--documents must fit into --lengths. Got {' and '.join(got)}.")
    if options.heads is not None or options.key_heads is not None:
        heads, key_heads = options.heads or 8, options.key_heads or 1
        if heads % key_heads:
            error(f"--key-heads must divide --heads. Got {key_heads} and {heads}.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _flags(names: Any) -> str:
    return ", ".join(map(_flag, names))
