"""The benchmark's command at a length at which it costs nothing: what its tables and its file hold."""

import json
import runpy
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


def test_the_table_and_its_file_have_a_row_for_each_pass_and_length(tmp_path, monkeypatch, capsys):
    report = tmp_path / "benchmark.json"
    options = ["--lengths", "64", "130", "--repeats", "1", "--windows", "64", "0", "--output", str(report)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(report.read_text())["rows"]
    found = [(row["pass"], row["window"], row["length"]) for row in rows]
    passes = ("forward", "forward+backward")
    assert found == [(which, window, n) for which in passes for window in (64, 0) for n in (64, 130)]
    assert all(min(row["rfa_s"], row["softmax_s"], row["floor_s"]) > 0 for row in rows)
    # Twice the tokens take twice the work at best.
    assert all(b["floor_s"] / a["floor_s"] == 130 / 64 for a, b in zip(rows[::2], rows[1::2], strict=True))
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| forward")]
    assert len(table) == len(rows)
