"""`Kind`: what the verdict on a kernel holds for. Calls of one kind run the same compiled kernels at similar sizes."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch

from hf_rfa.ops.call import OperatorCall

#: What is checked: the kernels for many tokens, with their backward pass, or those of a decoding step.
Task = Literal["causal", "decode"]
#: Sizes (rows x key heads x tokens) are told apart by powers of this, and from this one on not at all.
SIZE_STEP, LARGEST_SIZE = 4, 4**9
KERNELS = Path(__file__).parents[1] / "triton"


@dataclasses.dataclass(frozen=True)
class Kind:
    """Device, releases and shapes; whatever the kernels are compiled for is among them.

    Attributes:
        task: See `Task`.
        device: Name of the GPU, with its compute capability.
        versions: Of torch, triton and hf_rfa, and a digest of the kernels' source.
        dtype: Of the tokens.
        precision: Of products of float32 tensors, as `torch.set_float32_matmul_precision` sets it.
        head_dim, value_dim, rows: D, M, and the rows of omega per head.
        maps: The feature maps of the layer, each once.
        window, sink_tokens, kept_keys: As in the call; for decoding, the most that a head keeps.
        groups: Query heads per key head.
        sink_logits: Whether there are learned sink logits.
        options: The optional tensors of the far kernel that are there.
        learned: Whether a tensor of the far kernel has a gradient.
        size: Rows x key heads x tokens, up to the next power of `SIZE_STEP`.
    """

    task: Task
    device: str
    versions: tuple[str, ...]
    dtype: str
    precision: str
    head_dim: int
    value_dim: int
    rows: int
    maps: tuple[str, ...]
    window: int
    sink_tokens: int
    kept_keys: int
    groups: int
    sink_logits: bool
    options: tuple[str, ...]
    learned: bool
    size: int

    @classmethod
    def of(cls, call: OperatorCall, task: Task) -> "Kind":
        """The kind of a call, whose tensors are only asked for their shapes."""
        batch, heads, groups, length, dim = call.query.shape
        tensors = call.far.tensors()
        size = batch * heads * (1 if task == "decode" else length)
        return cls(
            task=task, device=device_name(call.query.device), versions=versions(),
            dtype=str(call.query.dtype).removeprefix("torch."), precision=torch.get_float32_matmul_precision(),
            head_dim=dim, value_dim=call.value.shape[-1], rows=call.far.omega.shape[1],
            maps=tuple(sorted(set(call.far.feature_maps))), window=call.window,
            sink_tokens=call.sink_tokens if call.window else 0, kept_keys=max(call.kept_of_heads, default=0),
            groups=groups, sink_logits=call.sink_logits is not None,
            options=tuple(sorted(name for name in tensors if name.endswith(("_transform", "_radius", "_limit")))),
            learned=any(tensor.requires_grad for tensor in tensors.values()), size=size_class(size),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them, with lists for tuples."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields

    @property
    def digest(self) -> str:
        """A name for files."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:32]

    def __str__(self) -> str:
        what = "decoding" if self.task == "decode" else "causal"
        kept = f", {self.kept_keys} kept keys" if self.kept_keys else ""
        return (
            f"{what}, {self.dtype}, head dim {self.head_dim}, {self.rows} rows of omega ({'/'.join(self.maps)}), "
            f"window {self.window}{kept}, {self.groups} query heads per key head, on {self.device}"
        )


def size_class(size: int) -> int:
    """`size` up to the next power of `SIZE_STEP`, at most `LARGEST_SIZE`."""
    return min(LARGEST_SIZE, SIZE_STEP ** math.ceil(math.log(max(1, size), SIZE_STEP) - 1e-9))


@functools.lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """Name and compute capability of a GPU; else the kind of device (Triton's interpreter runs on the CPU)."""
    if device.type != "cuda":
        return device.type + (" (Triton's interpreter)" if os.environ.get("TRITON_INTERPRET") == "1" else "")
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} ({major}.{minor})"


@functools.cache
def versions() -> tuple[str, ...]:
    """Of torch, triton and hf_rfa, and a digest of the kernels: whoever changes one of them is not told old news."""
    found = [f"torch {torch.__version__}"]
    for name in ("triton", "hf_rfa"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # builds of torch for other GPUs bring it by another name
            found.append(f"{name} of an unknown release")
    source = b"".join(path.read_bytes() for path in sorted(KERNELS.glob("*.py")))
    return *found, f"kernels {hashlib.sha256(source).hexdigest()[:16]}"
