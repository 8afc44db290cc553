"""Other attentions beside RFA: time, memory, and how far the output is from softmax with as many features."""

from collections.abc import Sequence
from typing import Any

from benchmarks.device import Meter
from benchmarks.memory import peak_bytes
from benchmarks.methods import PEERS, RFA_VARIANTS, pass_call, relative_error, why_not
from benchmarks.setting import PASSES, Setting
from benchmarks.table import MIB, Panel, Result, Table, milliseconds

#: Standard deviations of the logits at which the error is measured.
LOGIT_STDS = (1.0, 0.25)
_EXACT = ("softmax", "eager")


def chosen_peers(named: Sequence[str], setting: Setting, among: Sequence[str] = PEERS) -> list[str]:
    """The peers to run. One that is named and cannot run is an error; without names, a sentence says what is left out.

    Raises:
        SystemExit: A named peer cannot run here; the message says why and what to do.
    """
    reasons = {name: why_not(name, setting) for name in named or among}
    for name, reason in reasons.items():
        if reason is not None and named:
            raise SystemExit(f"{name} cannot run: {reason}.")
        if reason is not None:
            print(f"{name} is not in the table: {reason}.\n")
    return [name for name, reason in reasons.items() if reason is None]


def peers(
    meter: Meter, setting: Setting, names: Sequence[str], *, lengths: Sequence[int], repeats: int, limit: float
) -> Result:
    """One row for each length and method."""
    names = ["softmax", *RFA_VARIANTS, *names]
    errors = [f"error, logit std {std:g}" for std in LOGIT_STDS]
    timed = [column for which in PASSES for column in (f"{which} (ms)", "softmax / it")]
    table = Table("N", "method", "numbers of a key", *timed, *(f"{which} (MiB)" for which in PASSES), *errors)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        memory = {which: {name: peak_bytes(name, setting, which, length, limit) for name in names} for which in PASSES}
        seconds = {which: _seconds(meter, setting, which, length, memory[which], repeats) for which in PASSES}
        for name in names:
            row = {
                "length": length, "method": name, "components": None if name in _EXACT else setting.components,
                "seconds": {which: seconds[which].get(name) for which in PASSES},
                "peak_bytes": {which: memory[which][name] for which in PASSES},
                "error": {
                    str(std): relative_error(name, setting, length, std) if memory["forward"][name] else None
                    for std in LOGIT_STDS
                },
            }  # fmt: skip
            rows.append(row)
            table.add(*_cells(row, seconds, limit))
    return Result(rows, table.lines, _panels(rows, names))


def _seconds(
    meter: Meter, setting: Setting, which: str, length: int, memory: dict[str, int | None], repeats: int
) -> dict[str, float]:
    """Median seconds of the methods that have the memory, taking turns."""
    tensors = setting.tensors(length, backward=which != "forward")
    calls = {name: pass_call(which, name, setting, tensors) for name, peak in memory.items() if peak is not None}
    return dict(zip(calls, meter.medians(list(calls.values()), repeats), strict=True))


def _cells(row: dict[str, Any], seconds: dict[str, dict[str, float]], limit: float) -> list[object]:
    cells: list[object] = [row["length"], row["method"], row["components"] or "-"]
    for which, taken in row["seconds"].items():
        both = ["-", "-"] if taken is None else [milliseconds(taken), f"{seconds[which]['softmax'] / taken:.2f}"]
        cells += both
    cells += [
        f"> {limit * 1024:,.0f}" if peak is None else f"{peak / MIB:,.1f}" for peak in row["peak_bytes"].values()
    ]
    return [*cells, *("-" if error is None else f"{error:.3f}" for error in row["error"].values())]


def _panels(rows: list[dict[str, Any]], names: Sequence[str]) -> list[Panel]:
    def series(field: str, which: str, factor: float) -> dict[str, list[tuple[float, float]]]:
        points = {
            name: [(r["length"], r[field][which] * factor) for r in rows if r["method"] == name and r[field][which]]
            for name in names
        }
        return {name: found for name, found in points.items() if found}

    return [
        Panel(f"{which}: {title}", "N (tokens)", unit, series(field, which, factor))
        for field, title, unit, factor in (("seconds", "time", "ms", 1e3), ("peak_bytes", "memory", "MiB", 1 / MIB))
        for which in PASSES
    ]
