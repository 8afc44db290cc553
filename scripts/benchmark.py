"""Time of random-feature attention beside softmax attention and beside what the machine could do at best.

    python scripts/benchmark.py
    python scripts/benchmark.py --lengths 1024 4096 --passes forward --output benchmark.json
    python scripts/benchmark.py --decode

One batch row, 8 heads, head_dim 64, float32, one thread, causal; RFA with window 64, 4 sink tokens and 64 features of
omega (128 components). `softmax` is torch's `scaled_dot_product_attention(is_causal=True)`. Both are timed in turn;
a figure is the median of the repeats. On a machine that others use too, --clock cpu counts the thread's own time.

The floor of a path is the larger of its operations / the measured rate of a matrix product and its bytes / the
measured rate of a copy. Counted per token and head, D = head_dim, M = value dim, m features, F = 2m components, C =
window, s sinks, a multiplication and an addition being two operations:

| product                                    | forward           | backward                                       |
|--------------------------------------------|-------------------|------------------------------------------------|
| q, k times omega                           | 2 * 2 m D         | once more, and twice for its gradients         |
| far sums: added to, read from              | 2 * 2 F (M + 1)   | once more, and twice for its gradients         |
| near keys: scores, values                  | 2 (2C + s)(D + M) | scores once more, and twice for all gradients  |

Exponentials, maxima and the masked half of the own chunk's scores are not counted as work that must be done. Bytes are
those of q, k, v and the output, in the backward pass also of all gradients, each moved once.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import hf_rfa
from hf_rfa.omega import draw_omega

HEADS, DIM, WINDOW, SINKS, NUM_FEATURES = 8, 64, 64, 4, 64
PASSES = ("forward", "forward+backward")
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
CONTEXTS = (1_000, 2_000, 4_000, 16_000, 64_000, 100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=(1024, 4096, 16384, 32768), help="tokens N")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--windows", type=int, nargs="+", default=(WINDOW,), help="0 = pure RFA, no exact part")
    parser.add_argument("--maps", nargs="+", default=("hyperbolic",), help="feature maps of two components")
    parser.add_argument("--repeats", type=int, default=5, help="odd, so that the median is one of them")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--decode", action="store_true", help="time per decoded token instead")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    clock = CLOCKS[options.clock]
    if options.decode:
        rows = decode_table(options.repeats, clock)
        machine = {}
    else:
        machine = {"matmul_flops": matmul_rate(clock), "copy_bytes": copy_rate(clock)}
        print(
            f"matrix product {machine['matmul_flops'] / 1e9:.0f} Gflop/s, "
            f"copy {machine['copy_bytes'] / 1e9:.1f} GB/s\n"
        )
        rows = prefill_table(options, machine, clock)
    if options.output is not None:
        report = {"torch": torch.__version__, "clock": options.clock, "machine": machine, "rows": rows}
        options.output.write_text(json.dumps(report, indent=2))


def prefill_table(options: argparse.Namespace, machine: dict[str, float], clock: Callable[[], float]) -> list[Any]:
    """Whole sequences: one row for each pass, map, window and length."""
    print("| pass | map | window | N | softmax (ms) | RFA (ms) | softmax / RFA | floor (ms) | RFA / floor |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    rows = []
    for which in options.passes:
        for feature_map in options.maps:
            for window in options.windows:
                for length in options.lengths:
                    contest = contestants(which, feature_map, window, length)
                    softmax, rfa = medians(contest, options.repeats, clock)
                    least = floor(which, window, length, machine)
                    row = {"pass": which, "map": feature_map, "window": window, "length": length}
                    rows.append(row | {"softmax_s": softmax, "rfa_s": rfa, "floor_s": least})
                    cells = (*row.values(), f"{softmax * 1e3:,.1f}", f"{rfa * 1e3:,.1f}", f"{softmax / rfa:.1f}")
                    print("|", *_joined(*cells, f"{least * 1e3:,.1f}", f"{rfa / least:.2f}"), flush=True)
    return rows


def _joined(*cells: Any) -> list[str]:
    return [f"{cell} |" for cell in cells]


def floor(which: str, window: int, length: int, machine: dict[str, float]) -> float:
    """Seconds below which nothing that does this work can come, see the module's docstring."""
    components = 2 * NUM_FEATURES
    projection, sums = 4 * NUM_FEATURES * DIM, 4 * components * (DIM + 1)
    near_keys = 2 * window + SINKS if window else WINDOW  # pure RFA: the own chunk's features, products, values
    near = 2 * near_keys * (DIM + DIM if window else components + DIM + 1)
    operations = projection + sums + near
    numbers = 4 * DIM
    if which != "forward":
        operations += 3 * (projection + sums) + near // 2 + 2 * near
        numbers += 8 * DIM
    per_head = max(operations / machine["matmul_flops"], 4 * numbers / machine["copy_bytes"])
    return per_head * HEADS * length


def matmul_rate(clock: Callable[[], float], size: int = 1024) -> float:
    """Operations per second of a float32 matrix product."""
    left, right, out = (torch.randn(size, size) for _ in range(3))
    (seconds,) = medians([lambda: torch.mm(left, right, out=out)], 15, clock)
    return 2 * size**3 / seconds


def copy_rate(clock: Callable[[], float], numbers: int = 2**24) -> float:
    """Bytes per second that a copy moves, those read and those written."""
    source, target = torch.randn(numbers), torch.empty(numbers)
    (seconds,) = medians([lambda: target.copy_(source)], 15, clock)
    return 2 * 4 * numbers / seconds


def contestants(which: str, feature_map: str, window: int, length: int) -> list[Callable[[], Any]]:
    """Softmax and RFA on the same tensors."""
    generator = torch.Generator().manual_seed(0)
    backward = which != "forward"
    tensors = [torch.randn(1, HEADS, length, DIM, generator=generator, requires_grad=backward) for _ in range(3)]
    gradient = torch.randn(1, HEADS, length, DIM, generator=generator)
    omega = draw_omega(HEADS, NUM_FEATURES, DIM, kind="sphere", seed=0, layer=0, draw=0)

    def rfa() -> Any:
        return hf_rfa.rfa_attention(
            *tensors,
            omega=omega,
            feature_map=feature_map,
            window=window,
            sink_tokens=SINKS if window else 0,
            alpha=0.25,
        )

    def softmax() -> Any:
        return F.scaled_dot_product_attention(*tensors, is_causal=True)

    def both(forward: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), tensors, gradient)

    return [both(softmax), both(rfa)] if backward else [softmax, rfa]


def medians(functions: list[Callable[[], Any]], repeats: int, clock: Callable[[], float]) -> list[float]:
    """Median seconds of each function, run in turn, after one round that is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for number in range(repeats + 1):
        for function, seconds in zip(functions, times, strict=True):
            start = clock()
            function()
            if number:
                seconds.append(clock() - start)
    return [statistics.median(seconds) for seconds in times]


def decode_table(repeats: int, clock: Callable[[], float], steps: int = 64) -> list[Any]:
    """One token at a time, one layer: attention and its cache, which softmax concatenates as `DynamicCache` does."""
    print("| batch | context | softmax (us/token) | RFA (us/token) | softmax / RFA | RFA to its time at 1k |")
    print("|---:|---:|---:|---:|---:|---:|")
    rows = []
    for batch in (1,):
        first = None
        for context in CONTEXTS:
            softmax, rfa = (seconds / steps for seconds in medians(decoders(batch, context, steps), repeats, clock))
            first = first or rfa
            rows.append({"batch": batch, "context": context, "softmax_s": softmax, "rfa_s": rfa})
            cells = (f"{softmax * 1e6:,.0f}", f"{rfa * 1e6:,.0f}", f"{softmax / rfa:.1f}", f"{rfa / first:.2f}")
            print("|", *_joined(batch, f"{context:,}", *cells), flush=True)
    return rows


def decoders(batch: int, context: int, steps: int) -> list[Callable[[], Any]]:
    """Softmax and RFA that each decode `steps` tokens after a context."""
    generator = torch.Generator().manual_seed(0)
    omega = draw_omega(HEADS, NUM_FEATURES, DIM, kind="sphere", seed=0, layer=0, draw=0)
    options: dict[str, Any] = {"omega": omega, "feature_map": "hyperbolic", "alpha": 0.25, "output_final_state": True}
    past = [torch.randn(batch, HEADS, context, DIM, generator=generator) for _ in range(2)]
    new = [torch.randn(batch, HEADS, 1, DIM, generator=generator) for _ in range(3)]
    with torch.no_grad():
        _, start = hf_rfa.rfa_attention(past[0], *past, **options)

    @torch.no_grad()
    def rfa() -> None:
        state = start
        for _ in range(steps):
            _, state = hf_rfa.rfa_attention(*new, initial_state=state, **options)

    @torch.no_grad()
    def softmax() -> None:
        key, value = past
        for _ in range(steps):
            key, value = torch.cat([key, new[1]], dim=2), torch.cat([value, new[2]], dim=2)
            F.scaled_dot_product_attention(new[0], key, value)

    return [softmax, rfa]


if __name__ == "__main__":
    main()
