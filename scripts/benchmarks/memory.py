"""Peak memory of a pass above its inputs: the output, the gradients and everything in between.

On a CPU it is the growth of the resident set, and each measurement runs in a process of its own, so that no allocation
of an earlier one is reused; Linux only, since the peak is read from /proc/self/status. On a GPU it is what the
allocator handed out at most.
"""

import ctypes
import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import gpu_peak_bytes
from benchmarks.floor import floor_bytes
from benchmarks.methods import pass_call
from benchmarks.setting import Setting
from benchmarks.table import MIB, Panel, Result, Table

_FAILED_ALLOCATION = ("can't allocate memory", "Cannot allocate memory", "CUDA out of memory")
#: name in the registry -> title in the table.
CONTESTANTS = {"rfa": "RFA", "softmax": "softmax"}


def memory(setting: Setting, *, passes: Sequence[str], lengths: Sequence[int], longest_softmax: int) -> Result:
    """One row for each pass and length, with the growth per doubling of N (2 is linear, 4 quadratic)."""
    titles = [column for title in CONTESTANTS.values() for column in (f"{title} (MiB)", "growth")]
    table = Table("pass", "N", *titles, "RFA / softmax", "goal", "floor (MiB)", text=1)
    rows: list[dict[str, Any]] = []
    before: dict[tuple[str, str], tuple[int, int]] = {}
    for which in passes:
        for length in lengths:
            peaks: dict[str, int | None] = {}
            cells: list[str] = []
            for name, title in CONTESTANTS.items():
                wanted = name == "rfa" or length <= longest_softmax
                peak = peak_bytes(name, setting, which, length) if wanted else None
                peaks[title] = peak
                cells += (
                    ["-", ""]
                    if peak is None
                    else [f"{peak / MIB:,.1f}", growth(before.get((name, which)), length, peak)]
                )
                if peak is not None:
                    before[name, which] = (length, peak)
            least = floor_bytes(which, setting, length)
            rows.append({"pass": which, "length": length, "peak_bytes": peaks, "floor_bytes": least})
            ratio = f"{peaks['RFA'] / peaks['softmax']:.2f}" if peaks["RFA"] and peaks["softmax"] else ""
            table.add(which, length, *cells, ratio, _goal(setting, which, length), f"{least / MIB:,.1f}")
    panels = [Panel(which, "N (tokens)", "MiB above the inputs", _series(rows, which)) for which in passes]
    return Result(rows, table.lines, panels)


def _series(rows: Sequence[dict[str, Any]], which: str) -> dict[str, list[tuple[float, float]]]:
    """A log-log plot has no place for what is too small to be seen, nor for what was not measured."""
    series = {
        title: [
            (row["length"], row["peak_bytes"][title] / MIB)
            for row in rows
            if row["pass"] == which and row["peak_bytes"][title]
        ]
        for title in CONTESTANTS.values()
    }
    series["floor"] = [(row["length"], row["floor_bytes"] / MIB) for row in rows if row["pass"] == which]
    return {title: points for title, points in series.items() if points}


def _goal(setting: Setting, which: str, length: int) -> str:
    return "≤ 1.5" if (setting, which, length) == (Setting(), "forward+backward", 32768) else ""


def growth(before: tuple[int, int] | None, length: int, peak: int) -> str:
    """Factor per doubling of N."""
    if before is None or not before[1]:
        return ""
    return f"{(peak / before[1]) ** (1 / math.log2(length / before[0])):.2f}"


def peak_bytes(name: str, setting: Setting, which: str, length: int, limit: float | None = None) -> int | None:
    """Bytes at the peak of a pass; None if it needs more than `limit` GiB (or than the GPU has)."""
    if setting.device == "cuda":
        call = pass_call(which, name, setting, setting.tensors(256, backward=which != "forward"))
        call()  # libraries and kernels are loaded on first use
        try:
            return gpu_peak_bytes(
                pass_call(which, name, setting, setting.tensors(length, backward=which != "forward"))
            )
        except torch.cuda.OutOfMemoryError:
            return None
    job = json.dumps([name, dataclasses.asdict(setting), which, length, limit])
    scripts = str(Path(__file__).parents[1])
    path = os.pathsep.join([scripts, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.memory", job]
    finished = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    if finished.returncode == 0:
        return int(finished.stdout.splitlines()[-1])
    if limit is not None and any(words in finished.stderr for words in _FAILED_ALLOCATION):
        return None
    raise SystemExit(f"{name}, {which}, N = {length} failed in a process of its own:\n{finished.stderr}")


def _measure(name: str, setting: Setting, which: str, length: int, limit: float | None) -> int:
    """Growth of the resident set at its peak, bytes, in this process."""
    torch.set_num_threads(1)
    backward = which != "forward"
    pass_call(which, name, setting, setting.tensors(256, backward=backward))()
    tensors = setting.tensors(length, backward=backward)
    if limit is not None:
        most = resident("VmData") + int(limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    call = pass_call(which, name, setting, tensors)
    # glibc keeps what was freed, and what is reused would not count.
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = resident("VmRSS")
    call()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: memory on a CPU is measured on Linux alone.")


if __name__ == "__main__":
    _name, _setting, _which, _length, _limit = json.loads(sys.argv[1])
    print(_measure(_name, Setting(**_setting), _which, _length, _limit))
