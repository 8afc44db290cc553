"""Whole sequences: RFA beside softmax attention and beside the floor."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from benchmarks.device import Meter
from benchmarks.floor import floor_seconds
from benchmarks.methods import BACKENDS, pass_call
from benchmarks.setting import Setting
from benchmarks.table import Panel, Result, Table, milliseconds

#: device -> pass -> N -> how many times softmax's speed is asked for, with window 64 and 64 features.
GOALS: dict[str, dict[str, dict[int, float]]] = {
    "cpu": {
        "forward": {1024: 1, 4096: 4, 16384: 14, 32768: 28},
        "forward+backward": {1024: 1, 4096: 4, 16384: 14, 32768: 28},
    },
    "cuda": {
        "forward": {2048: 1, 16384: 12, 65536: 40},
        "forward+backward": {2048: 1, 16384: 10},
    },
}
#: N -> the same on a CPU with 128 kept keys, either pass.
KEPT_GOALS, KEPT = {2048: 1, 16384: 8, 32768: 16}, 128
#: device -> (N, at most so many times the floor).
FLOOR_GOALS = {"cpu": (16384, 1.5), "cuda": (16384, 2.5)}
#: The calls that the goals are for, with any map; on a CPU in bfloat16, too.
_GOAL_SETTINGS = {
    "cpu": Setting(),
    "cuda": Setting(heads=32, key_heads=32, head_dim=128, dtype="bfloat16", device="cuda"),
}


def prefill(
    meter: Meter,
    machine: dict[str, float],
    settings: Sequence[Setting],
    *,
    passes: Sequence[str],
    lengths: Sequence[int],
    backends: Sequence[str],
    beside: Sequence[str],
    repeats: int,
) -> Result:
    """One row for each pass, setting and length. The first of `backends` is the one that ratios and goals are for."""
    titles = {name: f"RFA {name}" if len(backends) > 1 or name != BACKENDS[0] else "RFA" for name in backends}
    first = titles[backends[0]]
    rivals = ("softmax", *beside)
    table = Table(
        "pass", "map", "window", "N", *(f"{name} (ms)" for name in (*rivals, *titles.values())),
        *(f"{name} / {first}" for name in rivals), "goal", "floor (ms)", f"{first} / floor", "goal", text=2,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for which in passes:
        for setting in settings:
            for length in lengths:
                tensors = setting.tensors(length, backward=which != "forward")
                names = [*rivals, *(f"rfa-{name}" for name in backends)]
                calls = [pass_call(which, name, setting, tensors) for name in names]
                seconds = dict(zip((*rivals, *titles.values()), meter.medians(calls, repeats), strict=True))
                least = floor_seconds(which, setting, length, machine)
                row = {
                    "pass": which, "map": setting.feature_map, "window": setting.window, "length": length,
                    "seconds": seconds, "floor_seconds": least,
                }  # fmt: skip
                rows.append(row)
                speedup, to_floor = goals(meter.device, which, setting, length)
                table.add(
                    which, setting.feature_map, setting.window, length, *map(milliseconds, seconds.values()),
                    *(f"{seconds[name] / seconds[first]:.1f}" for name in rivals), speedup,
                    milliseconds(least), f"{seconds[first] / least:.2f}", to_floor,
                )  # fmt: skip
    return Result(rows, table.lines, _panels(rows, settings, passes, first))


def goals(device: str, which: str, setting: Setting, length: int) -> tuple[str, str]:
    """The goals for this row: (times softmax's speed, times the floor); empty if there are none."""
    asked = _GOAL_SETTINGS[device]
    if device == "cpu" and setting == dataclasses.replace(asked, feature_map=setting.feature_map, kept_keys=KEPT):
        speedup = KEPT_GOALS.get(length)
        return "" if speedup is None else f"≥ {speedup:g}", ""
    dtypes = ("float32", "bfloat16") if device == "cpu" else ("bfloat16",)
    if dataclasses.replace(setting, feature_map=asked.feature_map, dtype=asked.dtype) != asked:
        return "", ""
    if setting.dtype not in dtypes:
        return "", ""
    speedup = GOALS[device][which].get(length)
    at, most = FLOOR_GOALS[device]
    floor = f"≤ {most}" if length == at else ""
    return "" if speedup is None else f"≥ {speedup:g}", floor


def _panels(rows: list[dict[str, Any]], settings: Sequence[Setting], passes: Sequence[str], rfa: str) -> list[Panel]:
    panels = []
    for which in passes:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in (row for row in rows if row["pass"] == which):
            several = f", {row['map']}, window {row['window']}" if len(settings) > 1 else ""
            for name, seconds in row["seconds"].items():
                own = name.startswith("RFA")
                if own or (row["map"], row["window"]) == (settings[0].feature_map, settings[0].window):
                    series.setdefault(name + several * own, []).append((row["length"], seconds * 1e3))
            if (row["map"], row["window"]) == (settings[0].feature_map, settings[0].window):
                series.setdefault("floor", []).append((row["length"], row["floor_seconds"] * 1e3))
        panels.append(Panel(which, "N (tokens)", "ms", series))
    return panels
