"""The roofline's command: launches are counted, the sums are right, and nothing predicted passes for measured."""

import pytest

pytest.importorskip("triton")


@pytest.fixture
def printed(imported, capsys, monkeypatch):
    """The tables by their first cell, and the whole text, of a small layer."""
    script = imported("triton_roofline")
    monkeypatch.setattr(script, "COUNTED", 96)

    def run(kept_keys):
        sizes = "--heads 2 --key_heads 1 --head_dim 16 --num_features 8 --window 16 --lengths 4096 8192"
        script.main([*sizes.split(), "--kept_keys", str(kept_keys)])
        text = capsys.readouterr().out
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
        return {row[0]: row[1:] for row in rows}, text

    return run


@pytest.mark.parametrize(("kept_keys", "kernels"), [(0, "5"), (8, "8")])
def test_the_tables(printed, kept_keys, kernels):
    rows, text = printed(kept_keys)
    assert rows["prefill, in chunks"][1] == "0"
    assert rows["prefill, Triton"][1] == kernels
    for name in ("decoding step", "decoding step at a chunk's end"):
        assert rows[f"{name}, Triton"] == ["0", "2", "2"]
        assert int(rows[f"{name}, in PyTorch"][2]) > 20
    assert ("choose" in rows) == bool(kept_keys)
    assert text.count("PREDICTED") == 2


def test_the_longest_program_bounds_the_time(imported):
    script = imported("triton_roofline")
    assert script.Cost(script.FLOPS, 0).seconds == 1
    assert script.Cost(0, script.BANDWIDTH).seconds == 1
    assert script.Cost(script.FLOPS / 2, 0, alone=script.FLOPS / 2).seconds == script.PROCESSORS / 2
    assert script.Cost(0, 1.0, read_alone=script.OF_PROCESSOR).seconds == 1
