"""Where the time of one layer goes on a GPU: milliseconds of each Triton kernel, and of PyTorch's operations.

    python scripts/profile_kernels.py
    python scripts/profile_kernels.py --kept-keys 128 --key-heads 8 --passes forward

One batch row, 32 heads of dim 128, bfloat16, causal, window 64, 4 sink tokens, 64 features, by the backend `triton`;
`softmax` is FlashAttention of `scaled_dot_product_attention`. The times are those of the GPU's own clock, without the
gaps in which it waits for the host.
"""

import argparse
from collections.abc import Callable

import torch
from benchmarks.device import Meter
from benchmarks.methods import pass_call
from benchmarks.setting import PASSES, Setting
from torch.profiler import ProfilerActivity, profile

#: What the names of kernels contain that are not ours.
OF_PYTORCH = ("::", "Mem", "cutlass", "gemm", "gemv")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="tokens N")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--kept-keys", type=int, default=0, help="far keys per key head that stay exact")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    parser.add_argument("--repeats", type=int, default=3, help="calls that are averaged")
    options = parser.parse_args(arguments)
    heads = f"{options.heads} heads, {options.key_heads} key heads of {options.head_dim}"
    print(f"{Meter('cuda').name()}, {options.length:,} tokens, {heads}, {options.kept_keys} kept keys")
    setting = Setting(
        heads=options.heads, key_heads=options.key_heads, head_dim=options.head_dim, kept_keys=options.kept_keys,
        dtype="bfloat16", device="cuda",
    )  # fmt: skip
    for which in options.passes:
        tensors = setting.tensors(options.length, backward=which != "forward")
        for method in ("softmax", "rfa-triton"):
            times = kernel_times(pass_call(which, method, setting, tensors), options.repeats)
            print(f"\n{which}, {method}: {sum(times.values()):.3f} ms")
            for name, milliseconds in sorted(times.items(), key=lambda item: -item[1]):
                print(f"  {milliseconds:8.3f}  {name}")


def kernel_times(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds of each Triton kernel in one call, and of all that PyTorch launches, averaged over some calls."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found: dict[str, float] = {}
    for event in profiler.key_averages():
        name = "PyTorch's operations" if any(part in event.key for part in OF_PYTORCH) else event.key
        if event.device_time_total:
            found[name] = found.get(name, 0.0) + event.device_time_total / 1e3 / repeats
    return found


if __name__ == "__main__":
    main()
