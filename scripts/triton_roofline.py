"""Launches, operations and bytes of a layer in PyTorch and in the Triton kernels, and what an H100 could do at best.

    python scripts/triton_roofline.py
    python scripts/triton_roofline.py --kept_keys 128
    python scripts/triton_roofline.py --heads 8 --key_heads 8 --lengths 4096 16384

Needs no GPU: nothing is timed. The launches are those of one layer, counted while it runs on the CPU: operations of
PyTorch that are no views and make no empty tensors, and kernels, which are noted instead of run. (On a GPU a few of
PyTorch's operations take several launches, and others are fused: the figures are near, not exact.) Operations and
bytes of the kernels follow from what each of them reads, multiplies and writes; those of PyTorch's operations around
them are counted. The roofline is that of an H100 SXM: each kernel takes as long as its operations at the rate of the
tensor cores or its bytes at that of the memory, whichever is longer; and since a program runs on one processor, no
less than its own operations and bytes take there. All times are PREDICTED, and lower bounds; so is FlashAttention's.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton_resources import KERNELS, Recorder

from hf_rfa.features.omega import draw_omega
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.causal.chunked import chunked_causal
from hf_rfa.ops.decode import Decoder
from hf_rfa.ops.state import RFAState
from hf_rfa.ops.triton import decoding
from hf_rfa.ops.triton.causal import triton_causal

#: Of an H100 SXM: bfloat16 operations and bytes a second, processors, and bytes a second that one of them takes in (64
#: in each cycle of 1.755 GHz).
FLOPS, BANDWIDTH, PROCESSORS, OF_PROCESSOR = 989e12, 3.35e12, 132, 64 * 1.755e9
#: Bytes of the tokens' numbers (bfloat16), and of everything else.
NARROW, WIDE = 2, 4
#: Operations of PyTorch that make a tensor without a launch.
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "alias", "lift_fresh")
#: Tokens of the call whose launches are counted, and chunks per program of the kernels.
COUNTED, BLOCK = 1024, 8


@dataclasses.dataclass
class Cost:
    """Operations and bytes of one kernel, and those of its longest program."""

    flops: float
    size: float
    alone: float = 0.0
    read_alone: float = 0.0

    @property
    def seconds(self) -> float:
        """At best, on the device."""
        program = max(self.alone / (FLOPS / PROCESSORS), self.read_alone / OF_PROCESSOR)
        return max(self.flops / FLOPS, self.size / BANDWIDTH, program)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key_heads", type=int, default=8)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--kept_keys", type=int, default=0)
    parser.add_argument("--num_features", type=int, default=64)
    parser.add_argument("--sink_tokens", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    options = parser.parse_args(arguments)
    around = print_launches(options)
    print_costs(options, around)
    print_times(options, around)


class Counter(TorchDispatchMode):
    """Launches of PyTorch's operations, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches, self.size, self.waits = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.waits += name in ("_local_scalar_dense", "nonzero")
        if not func.is_view and name not in EMPTY and name != "_local_scalar_dense":
            self.launches += 1
            tensors = [
                x for x in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)
            ]
            self.size += sum(x.numel() * x.element_size() for x in tensors)
        return result


class Quiet(Recorder):
    """A kernel that is noted, not run, whatever runs around it."""

    def __getitem__(self, grid: Any) -> Any:
        note = super().__getitem__(grid)

        def launch(*arguments: Any, **settings: Any) -> None:
            with _disable_current_modes():
                note(*arguments, **settings)

        return launch


@contextlib.contextmanager
def counting() -> Iterator[tuple[Counter, list[Any]]]:
    """What PyTorch launches inside, and the kernels that are launched."""
    noted: list[Any] = []
    kernels = {(module, name): getattr(module, name) for module, names in KERNELS.items() for name in names}
    for (module, name), kernel in kernels.items():
        setattr(module, name, Quiet(kernel, noted))
    try:
        with Counter() as counter:
            yield counter, noted
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)


def call_of(options: argparse.Namespace, length: int) -> tuple[OperatorCall, Any, Any]:
    """A call of that layer, its far kernel and its settings."""
    shape = (length, options.head_dim)
    tensors = [
        torch.randn(1, heads, *shape, dtype=torch.bfloat16)
        for heads in (options.heads, options.key_heads, options.key_heads)
    ]
    omega = draw_omega(
        options.key_heads, options.num_features, options.head_dim, kind="sphere", seed=0, layer=0, draw=0
    )  # fmt: skip
    kernel, settings, layout = operator_arguments(
        *tensors, omega=omega, feature_map="hyperbolic", window=options.window, sink_tokens=options.sink_tokens,
        kept_keys=options.kept_keys, alpha=0.25,
    )  # fmt: skip
    return OperatorCall.of(*tensors, kernel, settings, layout), kernel, settings


def print_launches(options: argparse.Namespace) -> float:
    """A table of launches; returns the bytes a token of PyTorch's operations around the kernels of the prefill."""
    print(f"Launches of one layer, {COUNTED} tokens (kept keys: {options.kept_keys})\n")
    print("| | PyTorch's operations | kernels | all |\n|---|---:|---:|---:|")
    call, kernel, settings = call_of(options, COUNTED)
    found = {}
    with torch.no_grad():
        for name, form in (("in chunks", chunked_causal), ("Triton", triton_causal)):
            for _ in range(2):  # what is worked out once for a layout is no part of a layer
                with counting() as (counter, noted):
                    form(call)
            found[name] = counter.size
            print_row(f"prefill, {name}", counter, noted)
        query, key, value = (x[..., :1, :] for x in (call.query, call.key, call.value))
        state = RFAState.empty(
            1, key, value, call.far.num_components, call.window, call.sink_tokens, call.kept_keys, query.shape[2]
        )  # fmt: skip
        tokens = query.flatten(1, 2), key, value
        for name, backend in (("in PyTorch", "chunked"), ("Triton", "triton")):
            decoder = Decoder(*tokens, kernel, settings.replace(backend="chunked"), state)
            if backend == "triton":  # without a GPU or the interpreter no decoder takes them
                decoder._fused = decoding.FusedHeads([(list(range(call.key.shape[1])), call.to(torch.float32))])
            for step in range(3 * options.window):
                with counting() as (counter, noted):
                    decoder.step(*tokens)
                if step == 2 * options.window + 5:
                    print_row(f"decoding step, {name}", counter, noted)
            print_row(f"decoding step at a chunk's end, {name}", counter, noted)
    print()
    return found["Triton"] / COUNTED


def print_row(name: str, counter: Counter, noted: list[Any]) -> None:
    waits = f" (waits {counter.waits} times)" if counter.waits else ""
    print(f"| {name} | {counter.launches}{waits} | {len(noted)} | {counter.launches + len(noted)} |")


def costs(options: argparse.Namespace, length: int, around: float) -> dict[str, Cost]:
    """The kernels of a forward pass over `length` tokens, and PyTorch's operations around them."""
    H, G, D, P = options.key_heads, options.heads // options.key_heads, options.head_dim, options.num_features
    C, S, K, F = options.window, options.sink_tokens, options.kept_keys, 2 * P
    keys, queries, chunks = H * length, H * G * length, length / C
    blocks = H * max(1.0, chunks / BLOCK)
    state = F * (D + 1) * WIDE
    psi, fold, read = 2 * D * P, 2 * F * (D + 1), 2 * F * (D + 1)  # of a token
    token, sides = 2 * D * NARROW, 2 * WIDE  # a key and its value; r and the log-scale
    found = {"PyTorch around them": Cost(0, around * length)}
    found["token_numbers"] = Cost(
        8 * D * (keys + queries), (keys + queries) * (D * NARROW + 2 * WIDE)
    )  # the distance to one centre and the product with the other
    found["block_sums"] = Cost(keys * (psi + fold), keys * (token + sides) + blocks * state)
    found["scan_sums"] = Cost(2 * blocks * state / WIDE, 2 * blocks * state)
    exact = 4 * D * (2 * C + S + K)  # of a query: scores and values
    far = Cost(keys * (psi + fold) + queries * (psi + read), 0)
    far.size = keys * (token + sides) + queries * (2 * D * NARROW + 4 * WIDE) + blocks * state
    if K:
        found["choose"] = Cost(
            queries * exact / 2, keys * D * NARROW + queries * D * NARROW, alone=G * length * exact / 2
        )  # scores, no values; with more kept keys than fit into the registers twice
        lists = chunks * (S + K)
        found["exact_outputs"] = Cost(
            queries * exact, queries * D * (NARROW + WIDE) + H * G * (2 * length + lists) * token
        )
        far.size += queries * D * WIDE
    else:
        far.flops += queries * exact
        far.size += keys * token
    found["block_outputs"] = far
    return found


def decoding_costs(options: argparse.Namespace) -> dict[str, Cost]:
    """The kernels of a decoding step; the end of a chunk counts as the C-th part of one."""
    H, G, D, P = options.key_heads, options.heads // options.key_heads, options.head_dim, options.num_features
    C, S, K, F = options.window, options.sink_tokens, options.kept_keys, 2 * P
    exact, state = 1.5 * C + S + K, F * (D + 1) * WIDE  # on average over a chunk's steps
    flops, of_head = 4 * D * exact + 2 * D * P + 2 * F * D, exact * 2 * D * NARROW + state + P * D * WIDE
    step = Cost(H * G * flops, H * of_head, flops, of_head)
    # What a chunk's end adds is shared by its steps.
    flops, of_head = C * (2 * D * P + 2 * F * D) / C, (2 * state + C * 4 * D * NARROW + P * D * WIDE) / C
    return {"decode_step": step, "end_of_chunk": Cost(H * flops, H * of_head, flops, of_head)}


def print_costs(options: argparse.Namespace, around: float) -> None:
    """Operations and bytes a token."""
    length = max(options.lengths)
    print(f"Operations and bytes a token: {options.heads} query heads, {options.key_heads} key heads of "
          f"{options.head_dim}, bfloat16\n")  # fmt: skip
    print("| kernel | thousand operations | KiB |\n|---|---:|---:|")
    rows = {name: Cost(c.flops / length, c.size / length) for name, c in costs(options, length, around).items()}
    for name, cost in (rows | decoding_costs(options)).items():
        print(f"| {name} | {cost.flops / 1e3:.0f} | {cost.size / 1024:.1f} |")
    print()


def flash(options: argparse.Namespace, length: int) -> Cost:
    """FlashAttention's forward pass over `length` tokens."""
    tokens = length * options.head_dim * NARROW
    flops = 2.0 * options.heads * options.head_dim * length**2  # 4 D a pair, of which half are masked
    return Cost(flops, 2 * tokens * (options.heads + options.key_heads))


def print_times(options: argparse.Namespace, around: float) -> None:
    """Predicted times."""
    print("PREDICTED milliseconds on an H100, at best: the roofline of one layer's forward pass, one row\n")
    names = list(costs(options, options.lengths[0], around))
    print(f"| tokens | {' | '.join(names)} | all | without PyTorch's | FlashAttention | times as fast |")
    print(f"|---:|{'---:|' * (len(names) + 4)}")
    for length in options.lengths:
        times = {name: cost.seconds * 1e3 for name, cost in costs(options, length, around).items()}
        whole, softmax = sum(times.values()), flash(options, length).seconds * 1e3
        kernels = whole - times[names[0]]
        cells = [*(f"{t:.3f}" for t in times.values()), f"{whole:.3f}", f"{kernels:.3f}", f"{softmax:.3f}",
                 f"{softmax / whole:.1f} to {softmax / kernels:.1f}"]  # fmt: skip
        print(f"| {length} | {' | '.join(cells)} |")
    print("\nPREDICTED microseconds of a decoding step, one row, at best\n")
    step = sum(cost.seconds for cost in decoding_costs(options).values()) * 1e6
    print("| tokens before | Triton | softmax (reads its cache once) |\n|---:|---:|---:|")
    for length in options.lengths:
        size = 2 * length * options.key_heads * options.head_dim * NARROW
        print(f"| {length} | {step:.1f} | {size / BANDWIDTH * 1e6:.1f} |")


if __name__ == "__main__":
    main()
