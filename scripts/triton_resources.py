"""Resources that the Triton kernels need on a GPU, from compiling them ahead of time, without one.

    python scripts/triton_resources.py
    python scripts/triton_resources.py --kept_keys 128
    python scripts/triton_resources.py --kept_keys 128 --decode
    python scripts/triton_resources.py --capability 80 --head_dim 64 --dtype float16 --window 0

Needs triton, whose wheel brings the compiler and the tool that reads its output. Prints a Markdown table: registers of
a thread (at most 255), bytes that did not fit into them and are kept in local memory (spills cost time), shared memory
of a program (an H100 or H200 has 227 KiB, an A100 163), and how many programs fit on a processor at once, with the
share of its warps that they are (occupancy). The kernels are those that a forward and a backward pass launch, or with
`--decode` those of a decoding step.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_rfa.features.omega import draw_omega
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.state import RFAState
from hf_rfa.ops.triton import causal, decoding, fold_tokens, forward, kept, launch_exact, launch_gradients

HEADS, KEY_HEADS, LENGTH, NUM_FEATURES, SINKS = 8, 8, 1024, 64, 4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
         torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8"}  # fmt: skip
KERNELS = {
    fold_tokens: ("token_numbers", "token_gradients"),
    kept: ("choose",),
    launch_exact: ("exact_outputs", "exact_query_gradients", "exact_key_gradients"),
    forward: ("block_sums", "scan_sums", "block_outputs"),
    launch_gradients: ("inner_products", "block_flows", "scan_flows", "query_gradients", "key_gradients"),
    decoding: ("decode_step", "end_of_chunk"),
}
#: Of a processor: registers, warps, programs, and KiB of shared memory by compute capability, 1 of which each program
#: needs for the system.
REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, {80: 164, 86: 100, 89: 100, 90: 228}
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU: 90 for H100 and H200")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--kept_keys", type=int, default=0)
    parser.add_argument("--feature_map", default="hyperbolic")
    parser.add_argument("--decode", action="store_true", help="the kernels of a decoding step")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    options = parser.parse_args()
    target = GPUTarget("cuda", options.capability, 32)
    titles = ("kernel", "warps", "registers", "spilled bytes", "shared memory (KiB)", "programs at once", "occupancy")
    print(f"| {' | '.join(titles)} |\n|---|{'---:|' * (len(titles) - 1)}")
    printed = set()
    for kernel, arguments, settings in launches(options):
        if kernel.__name__ in printed:  # for queries and for keys
            continue
        printed.add(kernel.__name__)
        compiled = triton.compile(source(kernel, arguments, settings), target=target, options=warps(settings))
        registers, spilled = usage(compiled.asm["cubin"])
        shared, count = compiled.metadata.shared / 1024, settings.get("num_warps", 4)
        programs = at_once(registers, count, shared, SHARED.get(options.capability, 100))
        cells = (
            kernel.__name__,
            count,
            registers,
            spilled,
            f"{shared:.0f}",
            programs,
            f"{programs * count / WARPS:.0%}",
        )
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def at_once(registers: int, warps_of_program: int, shared: float, available: int) -> int:
    """Programs that a processor runs at once: registers are given out by 256 a warp, shared memory by KiB."""
    of_warp = -(-registers * 32 // 256) * 256
    return min(
        REGISTERS // (of_warp * warps_of_program), WARPS // warps_of_program, PROGRAMS, int(available // (shared + 1))
    )


class Recorder:
    """Replaces a kernel and records the arguments of its launches."""

    def __init__(self, kernel: Any, noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **settings: self.noted.append((self.kernel, arguments, settings))


def launches(options: argparse.Namespace) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, settings) of the launches of one forward and backward pass, or of one decoding step."""
    dtype, dim = DTYPES[options.dtype], options.head_dim
    tensors = [torch.randn(1, heads, LENGTH, dim, dtype=dtype) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    omega = draw_omega(KEY_HEADS, NUM_FEATURES, dim, kind="sphere", seed=0, layer=0, draw=0)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    objects = operator_arguments(
        *tensors, omega=omega, feature_map=options.feature_map, window=options.window,
        sink_tokens=SINKS if options.window else 0, kept_keys=options.kept_keys, alpha=0.25,
    )  # fmt: skip
    call = OperatorCall.of(*tensors, *objects)
    wide = call.to(torch.float32)
    noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    kernels = {(module, name): getattr(module, name) for module, names in KERNELS.items() for name in names}
    for (module, name), kernel in kernels.items():
        setattr(module, name, Recorder(kernel, noted))
    try:
        if options.decode:
            query, key, value = (x.detach()[..., :1, :] for x in (call.query, call.key, call.value))
            state = RFAState.empty(1, key, value, call.far.num_components, call.window, SINKS, call.kept_keys)
            heads = decoding.FusedHeads([(list(range(KEY_HEADS)), wide.replace(state=state))])
            heads.step(query, key, value, None, None)
        else:
            causal.triton_causal(call)[0].sum().backward()
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)
    return noted


def source(kernel: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> ASTSource:
    """A kernel with the types of its arguments, pointers and sizes taken as multiples of 16 where they are."""
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | settings
    fixed = {name for name, parameter in zip(kernel.arg_names, kernel.params, strict=True) if parameter.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in fixed or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def warps(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("num_warps", "num_stages") if name in settings}


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (int(re.findall(rf"{name}:(\d+)", text.stdout)[-1]) for name in ("REG", "STACK"))
    return registers, stack


if __name__ == "__main__":
    main()
