"""One token at a time in one layer: attention and its cache, which softmax concatenates as `DynamicCache` does.

Keys and values of the context are random numbers; RFA's state is really computed from them, in one row that all rows
of the batch repeat. Contexts and methods take turns, so that a machine that slows down for a while favours none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.device import Meter
from benchmarks.setting import DTYPES, Setting
from benchmarks.table import Panel, Result, Table
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.attention import attend
from hf_rfa.ops.decode import Decoder

Tokens = tuple[Tensor, Tensor, Tensor]

#: Steps that are timed at once: RFA's have one in which a chunk becomes far; all of softmax's are alike.
RFA_STEPS, SOFTMAX_STEPS = 64, 8
#: context -> at least so many times softmax's speed; and at most so many times RFA's own time at the first context.
SPEED_GOALS = {2_000: "> 1", 4_000: "> 1", 16_000: "> 1", 64_000: "≥ 10", 100_000: "≥ 10"}
FLAT_GOAL = (100_000, "≤ 1.05")


def decode(
    meter: Meter, setting: Setting, *, batches: Sequence[int], contexts: Sequence[int], repeats: int, limit: float
) -> Result:
    """One row for each batch and context; softmax is left out where it needs more than `limit` GiB."""
    first = contexts[0]
    table = Table(
        "batch", "context", "softmax (us/token)", "RFA (us/token)", "softmax / RFA", "goal",
        f"RFA to its time at {first:,}", "goal",
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for batch in batches:
        fitting = [n for n in contexts if not too_large(kv_bytes(setting, batch, n, layers=1), limit)]
        jobs: dict[tuple[str, int], Callable[[], Any]] = {}
        new = setting.tensors(1, batch=batch)
        past = random_context(setting, batch, max(fitting, default=1))
        row_of_states = random_context(setting, 1, max(contexts))
        for context in contexts:
            if context in fitting:
                jobs["softmax", context] = _softmax(new, *(t[:, :, :context] for t in past))
            jobs["RFA", context] = _rfa(setting, new, *(t[:, :, :context] for t in row_of_states))
        medians = dict(zip(jobs, meter.medians(list(jobs.values()), repeats), strict=True))
        for context in contexts:
            rfa = medians["RFA", context] / RFA_STEPS
            softmax = medians["softmax", context] / SOFTMAX_STEPS if context in fitting else None
            rows.append({"batch": batch, "context": context, "softmax_seconds": softmax, "rfa_seconds": rfa})
            table.add(
                batch, f"{context:,}", microseconds(softmax), microseconds(rfa),
                "-" if softmax is None else f"{softmax / rfa:.1f}", SPEED_GOALS.get(context, ""),
                f"{rfa / (medians['RFA', first] / RFA_STEPS):.2f}", FLAT_GOAL[1] if context == FLAT_GOAL[0] else "",
            )  # fmt: skip
    return Result(rows, table.lines, decode_panels(rows, 1e6, "us/token"))


def kv_bytes(setting: Setting, batch: int, context: int, layers: int) -> int:
    """Bytes of the keys and values of a context."""
    numbers = 2 * layers * batch * setting.key_heads * context * setting.head_dim
    return numbers * DTYPES[setting.dtype].itemsize


def too_large(cache_bytes: int, limit: float) -> bool:
    """Whether a cache, its concatenated copy and one half of it on the way need more than `limit` GiB."""
    return 2.5 * cache_bytes > limit * 2**30


def random_context(setting: Setting, batch: int, context: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, Hk, N, D)."""
    _, key, value = setting.tensors(context, batch=batch, query_length=1)
    return key, value


def _rfa(setting: Setting, new: Tokens, key: Tensor, value: Tensor) -> Callable[[], None]:
    """Steps of what a converted model's cache keeps; it goes on from call to call, and its time does not change."""
    kernel, settings, layout = operator_arguments(key, key, value, **setting.rfa_options())
    with torch.no_grad():  # which queries came before decides at most which keys are kept
        _, state = attend(key, key, value, kernel, settings, layout, output_final_state=True)
    assert state is not None
    decoder = Decoder(*new, kernel, settings, state.select_rows(torch.zeros(len(new[0]), dtype=torch.int64)))

    @torch.no_grad()
    def run() -> None:
        for _ in range(RFA_STEPS):
            decoder.step(*new)

    return run


def _softmax(new: Tokens, past_key: Tensor, past_value: Tensor) -> Callable[[], None]:
    grouped = new[0].shape[1] != new[1].shape[1]

    @torch.no_grad()
    def run() -> None:
        key, value = past_key, past_value
        for _ in range(SOFTMAX_STEPS):
            key, value = torch.cat([key, new[1]], dim=2), torch.cat([value, new[2]], dim=2)
            F.scaled_dot_product_attention(new[0], key, value, enable_gqa=grouped)

    return run


def decode_panels(rows: Sequence[dict[str, Any]], factor: float, unit: str) -> list[Panel]:
    """Time per token against context, one panel per batch size."""
    panels = []
    for batch in sorted({row["batch"] for row in rows}):
        own = [row for row in rows if row["batch"] == batch]
        series = {
            title: [(row["context"], row[field] * factor) for row in own if row[field] is not None]
            for title, field in (("softmax", "softmax_seconds"), ("RFA", "rfa_seconds"))
        }
        panels.append(
            Panel(
                f"batch {batch}", "context (tokens)", unit, {name: points for name, points in series.items() if points}
            )
        )
    return panels


def microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:,.0f}"
