"""Random-feature attention beside softmax attention, beside its peers, and beside what the machine could do at best.

    python scripts/benchmark.py                                    time of whole sequences
    python scripts/benchmark.py --dtype bfloat16 --clock cpu --output figures
    python scripts/benchmark.py --memory                           peak memory, to 256k tokens
    python scripts/benchmark.py --decode --key-heads 2             time per token of one layer
    python scripts/benchmark.py --generate                         time per token of a whole model
    python scripts/benchmark.py --packed                           documents packed into a row
    python scripts/benchmark.py --peers                            all peers that can run here
    python scripts/benchmark.py --peers performer --lengths 1024   `pip install performer-pytorch==1.1.4` first
    python scripts/benchmark.py --device cuda                      Triton and chunked beside FlashAttention and fla

One batch row, 8 heads, head_dim 64, float32, one thread, causal; RFA with window 64, 4 sink tokens and 64 features of
omega (128 components). On a GPU: 32 heads, head_dim 128, bfloat16; fla is `pip install "fla-core[cuda]"`. `softmax` is
torch's `scaled_dot_product_attention(is_causal=True)`, FlashAttention on GPUs. What is compared is timed in turn; a
figure is the median of the repeats. On a machine that others use too, --clock cpu counts the thread's own time. With
--output FOLDER each table is written there as JSON, Markdown and a plot.

The floor of a path is the larger of its operations / the measured rate of a matrix product in the dtype of the tensors
and its bytes / the measured rate of a copy. Counted per token and query head, D = head_dim, M = value dim, m features,
F = 2m components, C = window, s sinks, r = key heads / query heads, a multiplication and an addition being two
operations:

| product                                    | forward             | backward                                       |
|--------------------------------------------|---------------------|------------------------------------------------|
| q, k times omega                           | (1 + r) 2 m D       | once more, and twice for its gradients         |
| far sums: read from, added to              | (1 + r) 2 F (M + 1) | once more, and twice for its gradients         |
| near keys: scores, values                  | 2 (2C + s)(D + M)   | scores once more, and twice for all gradients  |

Exponentials, maxima and the masked half of the own chunk's scores are not counted as work that must be done. Bytes are
those of q, k, v and the output, in the backward pass also of all gradients, each moved once. The floor of memory is
what a pass must hold at its end beside its inputs: the output, and the gradients of q, k and v.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from benchmarks.decode import decode
from benchmarks.device import Meter, machine_rates
from benchmarks.generate import generate
from benchmarks.memory import memory
from benchmarks.options import Options, parse
from benchmarks.packed import packed
from benchmarks.peers.operators import chosen_peers, peers
from benchmarks.prefill import prefill
from benchmarks.setting import DTYPES, Setting
from benchmarks.table import Result, write


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments, description=__doc__)
    torch.set_num_threads(1)
    setting = _setting(options)
    meter = Meter(options.device, options.clock or "wall")
    facts: dict[str, Any] = {"device": meter.name(), "dtype": setting.dtype, "torch": torch.__version__}
    if options.clock is not None and options.device == "cpu":
        facts["clock"] = options.clock
    result = _run(options, setting, meter, facts)
    if options.output is not None:
        command = shlex.join(["python", "scripts/benchmark.py", *arguments])
        write(result, options.output, options.mode, facts, command)


def _run(options: Options, setting: Setting, meter: Meter, facts: dict[str, Any]) -> Result:
    if options.mode == "time":
        return _time(options, setting, meter, facts)
    if options.mode == "memory":
        return memory(setting, passes=options.passes, lengths=options.lengths, longest_softmax=options.longest_softmax)
    if options.mode == "peers":
        return peers(
            meter, setting, chosen_peers(options.peers, setting),
            lengths=options.lengths, repeats=options.repeats, limit=options.memory_limit,
        )  # fmt: skip
    if options.mode == "packed":
        return packed(
            meter, setting, passes=options.passes, lengths=options.lengths, documents=options.documents,
            repeats=options.repeats,
        )  # fmt: skip
    mode = decode if options.mode == "decode" else generate
    return mode(
        meter, setting, batches=options.batches, contexts=options.contexts, repeats=options.repeats,
        limit=options.memory_limit,
    )  # fmt: skip


def _time(options: Options, setting: Setting, meter: Meter, facts: dict[str, Any]) -> Result:
    beside = options.beside
    if beside or options.device == "cuda":  # on a GPU fla is asked for without being named
        beside = chosen_peers(beside, setting, among=("fla-linear", "fla-gla"))
    machine = machine_rates(meter, DTYPES[setting.dtype])
    facts["matrix product"] = f"{machine['matmul_flops'] / 1e9:,.0f} Gflop/s"
    facts["copy"] = f"{machine['copy_bytes'] / 1e9:,.1f} GB/s"
    print(f"{setting.dtype}: matrix product {facts['matrix product']}, copy {facts['copy']}\n")
    return prefill(
        meter, machine,
        [replace(setting, feature_map=name, window=window) for name in options.maps for window in options.windows],
        passes=options.passes, lengths=options.lengths, backends=options.backends, beside=beside,
        repeats=options.repeats,
    )  # fmt: skip


def _setting(options: Options) -> Setting:
    """The shape of the calls; the models of --generate and --packed are the same everywhere, with few key heads as is
    usual today."""
    model = options.mode in ("generate", "packed")
    wide = options.device == "cuda" and not model
    heads = options.heads or (32 if wide else 8)
    few = model and heads % 4 == 0
    return Setting(
        heads=heads,
        key_heads=options.key_heads or (heads // 4 if few else heads),
        head_dim=options.head_dim or (128 if wide else 64),
        kept_keys=options.kept_keys or 0,
        dtype=options.dtype or ("bfloat16" if options.device == "cuda" else "float32"),
        device=options.device,
    )


if __name__ == "__main__":
    main()
