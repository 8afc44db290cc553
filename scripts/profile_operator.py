"""Where the operator's time goes on a CPU: milliseconds of each of PyTorch's operations inside one call.

    python scripts/profile_operator.py
    python scripts/profile_operator.py --length 32768 --passes forward+backward --rows 20
    python scripts/profile_operator.py --kept-keys 128

The call is that of `benchmark.py`: one batch row, 8 heads, head_dim 64, float32, one thread, causal, window 64, 4 sink
tokens, 64 features. Operations are told apart by what they do and by the shapes of their tensors, the same block after
block; each is timed by the thread's own clock where it runs, between all others, so that it finds the caches as they
are. Products are counted as two operations a multiplication and addition, and their rate is given beside that of a
large product. Fused attention counts its two products (five in the backward pass) over all near keys, masked or not.
"""

import argparse
import math
import time
import unittest.mock
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.device import Meter, machine_rates
from benchmarks.setting import PASSES, Setting
from torch.utils._python_dispatch import TorchDispatchMode

import hf_rfa
from hf_rfa.ops.causal import exact_pass

#: Products of the operations that have any.
PRODUCTS = {
    "mm": 1, "bmm": 1, "addmm": 1, "baddbmm": 1, "baddbmm_": 1,
    "_scaled_dot_product_flash_attention_for_cpu": 2, "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens N")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--kept-keys", type=int, default=0, help="far keys per key head that stay exact")
    parser.add_argument("--repeats", type=int, default=3, help="calls that are averaged")
    parser.add_argument("--rows", type=int, default=14, help="operations that are named; the others are one row")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rate = machine_rates(Meter("cpu", "cpu"), torch.float32)["matmul_flops"]
    print(f"N = {options.length}; a large matrix product runs at {rate / 1e9:.0f} Gflop/s")
    for which in options.passes:
        if options.kept_keys:
            share = choosing(which, options.length, options.repeats, options.kept_keys)
            print(f"\n{which}: choosing which keys are kept takes {share:.0%} of the time")
        print_table(which, profile(which, options.length, options.repeats, options.kept_keys), options.rows)


class Stopwatch(TorchDispatchMode):
    """Calls, seconds and operations of every PyTorch operation inside, by name and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, tuple[torch.Size, ...]], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begun = time.thread_time()
        result = func(*args, **(kwargs or {}))
        seconds = time.thread_time() - begun
        name, shapes = func.overloadpacket.__name__, tuple(t.shape for t in args if isinstance(t, torch.Tensor))
        entry = self.found[name, shapes]
        entry[0] += 1
        entry[1] += seconds
        entry[2] += flops(name, shapes)
        return result


def flops(name: str, shapes: tuple[torch.Size, ...]) -> float:
    """Operations of the products of one call; 0 for all that is none."""
    products = PRODUCTS.get(name, 0)
    if not products:
        return 0.0
    if products == 1:
        left, right = shapes[-2:]
        return 2.0 * math.prod(left) * right[-1]
    query, key = shapes[:2] if products == 2 else shapes[1:3]  # the gradient of the output comes first
    return 2.0 * products * math.prod(query) * key[-2]


def profile(
    which: str, length: int, repeats: int, kept_keys: int = 0
) -> dict[tuple[str, tuple[torch.Size, ...]], list[float]]:
    """The operations of one call, as in `Stopwatch.found`, averaged over several calls."""
    call = call_of(which, length, kept_keys)
    call()
    stopwatch = Stopwatch()
    with stopwatch:
        for _ in range(repeats):
            call()
    return {name: [number / repeats for number in entry] for name, entry in stopwatch.found.items()}


def call_of(which: str, length: int, kept_keys: int) -> Callable[[], None]:
    """The call that is timed."""
    setting = Setting(kept_keys=kept_keys)
    backward = which != "forward"
    tensors, options = setting.tensors(length, backward=backward), setting.rfa_options()
    gradient = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))

    def call() -> None:
        output = hf_rfa.rfa_attention(*tensors, **options)
        if backward:
            torch.autograd.grad(output, tensors, gradient)

    return call


def choosing(which: str, length: int, repeats: int, kept_keys: int) -> float:
    """The share of a call that goes to the choice of kept keys: all but the attention to them."""
    spent = [0.0]
    chosen = exact_pass._ExactPass._advance

    def timed(*args: Any) -> Any:
        begun = time.thread_time()
        result = chosen(*args)
        spent[0] += time.thread_time() - begun
        return result

    call = call_of(which, length, kept_keys)
    call()
    with unittest.mock.patch.object(exact_pass._ExactPass, "_advance", timed):
        begun = time.thread_time()
        for _ in range(repeats):
            call()
    return spent[0] / (time.thread_time() - begun)


def print_table(which: str, found: dict[tuple[str, tuple[torch.Size, ...]], list[float]], rows: int) -> None:
    """The most expensive operations, then the rest, then all of them."""
    print(f"\n| {which}: operation | shapes | calls | ms | share | Gflop/s |\n|---|---|---:|---:|---:|---:|")
    ranked = sorted(found.items(), key=lambda item: -item[1][1])
    total = sum(entry[1] for entry in found.values())
    lines = [(name, " ".join("x".join(map(str, s)) for s in shapes), *entry) for (name, shapes), entry in ranked]
    rest = [[line[i] for line in lines[rows:]] for i in (2, 3, 4)]
    sums = [[line[i] for line in lines] for i in (2, 3, 4)]
    for name, shapes, calls, seconds, operations in [
        *lines[:rows], (f"{len(lines) - rows} others", "", *map(sum, rest)), ("all", "", *map(sum, sums)),
    ]:  # fmt: skip
        rate = f"{operations / seconds / 1e9:.0f}" if operations else ""
        print(f"| {name} | {shapes} | {calls:.0f} | {seconds * 1e3:.1f} | {seconds / total:.0%} | {rate} |")


if __name__ == "__main__":
    main()
