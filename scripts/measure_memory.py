"""Peak memory of random-feature attention beside softmax attention, forward alone and with the backward pass.

    python scripts/measure_memory.py
    python scripts/measure_memory.py --lengths 4096 16384 --passes forward

Prints a Markdown table, in MiB, with the growth per doubling of N (2 is linear, 4 quadratic). One batch row, 8 query
heads, 2 key heads, head_dim 64, float32, one thread, causal; RFA with window 64, 4 sink tokens and 64 positive
features. The inputs are not counted: the figures are the growth of the resident set above what the process held when
they were ready, that is the output, the gradients and everything in between.

Each measurement runs in a process of its own, so that no allocation of an earlier one is reused. Linux only: the peak
is read from /proc/self/status. Softmax attention is torch's `scaled_dot_product_attention`, whose CPU kernel holds no
N x N matrix either: RFA's gain over it is time, and the cache of decoding.
"""

import argparse
import math
import subprocess
import sys
from pathlib import Path

LENGTHS = (4096, 16384, 65536)
METHODS = ("rfa", "softmax")
PASSES = ("forward", "forward+backward")
HEADS, KEY_HEADS, DIM, WINDOW, NUM_FEATURES = 8, 2, 64, 64, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens N, ascending")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "PASS", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        method, which, length = arguments.one
        print(measure(method, which, int(length)))
        return
    titles = [f"{method}, {which}" for which in arguments.passes for method in METHODS]
    print("| N | " + " | ".join(f"{title} (MiB) | growth" for title in titles) + " |")
    print("|---:" * (1 + 2 * len(titles)) + "|")
    before: dict[tuple[str, str], tuple[int, float]] = {}
    for length in arguments.lengths:
        cells = []
        for which in arguments.passes:
            for method in METHODS:
                mebibytes = measure_in_subprocess(method, which, length)
                cells.append(f"{mebibytes:,.1f}")
                cells.append(growth(before.get((method, which)), length, mebibytes))
                before[method, which] = (length, mebibytes)
        print(f"| {length:,} | " + " | ".join(cells) + " |", flush=True)


def growth(before: tuple[int, float] | None, length: int, mebibytes: float) -> str:
    """Factor per doubling of N: 2 is linear, 4 quadratic."""
    if before is None:
        return ""
    return f"{(mebibytes / before[1]) ** (1 / math.log2(length / before[0])):.2f}"


def measure_in_subprocess(method: str, which: str, length: int) -> float:
    command = [sys.executable, __file__, "--one", method, which, str(length)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{method}, {which}, N = {length} failed:\n{finished.stderr}")
    return float(finished.stdout)


def measure(method: str, which: str, length: int) -> float:
    """Growth of the resident set at its peak, MiB, in this process."""
    import torch
    import torch.nn.functional as F

    import hf_rfa
    from hf_rfa.omega import draw_omega

    torch.set_num_threads(1)
    omega = draw_omega(KEY_HEADS, NUM_FEATURES, DIM, kind="orthogonal", seed=0, layer=0, draw=0)

    def inputs(tokens: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randn(1, heads, tokens, DIM, generator=generator, requires_grad=which != "forward")
            for heads in (HEADS, KEY_HEADS, KEY_HEADS)
        ]

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if method == "rfa":
            output = hf_rfa.rfa_attention(query, key, value, omega=omega, window=WINDOW, alpha=0.25)
        else:
            output = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        if which != "forward":
            output.backward(torch.ones_like(output))

    run(*inputs(256))  # libraries and kernels are loaded on first use
    tensors = inputs(length)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _resident("VmRSS")
    run(*tensors)
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    """A field of /proc/self/status, KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {field}: this script needs Linux.")


if __name__ == "__main__":
    main()
