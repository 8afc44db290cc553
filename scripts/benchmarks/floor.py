"""The least that RFA can take on a machine, counted as the table in `scripts/benchmark.py` says."""

from benchmarks.setting import DTYPES, Setting

PURE_CHUNK = 64  # tokens of the own chunk, which pure RFA computes pair by pair


def floor_seconds(which: str, setting: Setting, length: int, machine: dict[str, float]) -> float:
    """Seconds below which nothing that does this work can come: operations or bytes, whichever takes longer."""
    s = setting
    dim = value_dim = s.head_dim
    shared = s.key_heads / s.heads  # what is done once a key head, per query head
    projection = 2 * s.num_features * dim * (1 + shared)
    sums = 2 * s.components * (value_dim + 1) * (1 + shared)
    if s.window:
        near = 2 * (2 * s.window + s.sinks + s.kept_keys) * (dim + value_dim)
    else:
        near = 2 * PURE_CHUNK * (s.components + value_dim + 1)
    operations = projection + sums + near
    numbers = 2 * dim * (1 + shared)  # q and the output, k and v
    if which != "forward":
        operations += 3 * (projection + sums) + near / 2 + 2 * near
        numbers *= 3  # once more, and all gradients
    moved = numbers * DTYPES[s.dtype].itemsize
    return s.heads * length * max(operations / machine["matmul_flops"], moved / machine["copy_bytes"])


def floor_bytes(which: str, setting: Setting, length: int) -> int:
    """Bytes that a pass must hold at its end, beside its inputs: the output, and the gradients of q, k and v."""
    s = setting
    numbers = s.heads * s.head_dim
    if which != "forward":
        numbers += (s.heads + 2 * s.key_heads) * s.head_dim
    return numbers * length * DTYPES[s.dtype].itemsize
