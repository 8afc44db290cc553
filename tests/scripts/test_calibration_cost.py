"""Calibration on paper: the formula's counts are those of the models, and its rates those of what was measured."""

import dataclasses
import json

import paths
import pytest
from families import build, llama

from hf_rfa.errors import ConfigError


@pytest.fixture
def cost(imported):
    return imported("calibration_cost", paths.SCRIPTS / "benchmarks")


def test_the_weights_are_counted(cost):
    for model in (llama(), build("qwen3"), llama(num_hidden_layers=3, tie_word_embeddings=True)):
        norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
        assert cost.Shape.of(model.config).weights == sum(p.numel() for p in model.parameters()) - norms
    assert cost.LLAMA_8B.weights == pytest.approx(8.03e9, rel=1e-3)
    assert cost.LLAMA_70B.weights == pytest.approx(70.55e9, rel=1e-3)


def test_layers_with_a_window_attend_to_less_and_have_no_candidates(cost):
    whole = cost.Shape(4, 4, 64, 128, 4, 2, 16, 100, tied=True)
    local = dataclasses.replace(whole, converted=1, sliding=128)
    assert local.attention(128) == whole.attention(128)
    assert local.attention(4096) < whole.attention(4096) / 2
    assert local.candidates(8) == whole.candidates(8) / 4


def test_a_measured_model_has_the_stages_of_the_formula_and_gives_its_rates(cost, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cost.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: llama())
    cost.main(["--measure", "tiny", "--texts", "2", "--tokens", "300", "--output", str(tmp_path / "tiny.json")])
    found = json.loads((tmp_path / "tiny.json").read_text())
    assert set(found["seconds"]) == set(cost.STAGES)
    assert all(seconds > 0 for seconds in found["seconds"].values())
    # The stages of another machine, to the formula: its own rates come back, and its own times.
    rates = {"products": 3e9, "candidates": 2e8}
    assert found["runs"] in (2, 3, 4)  # of two layers: both ways, and with one or both switched off
    work = cost.operations(cost.Shape(**found["shape"]), 2, 300, found["runs"])
    found["seconds"] = cost.seconds(work, rates)
    assert cost.rates_of(found) == pytest.approx(rates)
    (tmp_path / "other.json").write_text(json.dumps(found))
    capsys.readouterr()
    cost.main(["--rates", str(tmp_path / "other.json"), "--check", str(tmp_path / "other.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3.0 and 0.2 billion operations/s"
    for line in lines[1:]:
        predicted, measured = (part.split()[-3] for part in line.split(","))
        assert predicted == measured
    found["seconds"]["fitting"] = 1e-9
    with pytest.raises(ConfigError, match="less than its passes alone"):
        cost.rates_of(found)


def test_the_table_says_what_does_not_fit(cost, capsys):
    cost.main([])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[:2] for row in rows] == [
        ["Llama-3.1-8B", "1"], ["Llama-3.1-8B", "8"], ["Llama-3.1-70B", "1"], ["Llama-3.1-70B", "8"],
    ]  # fmt: skip
    assert ["does not fit" in row for row in rows] == [False, False, True, False]


def test_a_stage_that_comes_again_adds_up(cost, monkeypatch):
    times = iter([0.0, 0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(cost.time, "process_time", lambda: next(times))
    stages = cost.Stages()
    for name in ("statistics", "fitting", "statistics"):
        stages.stage(f"calibrating: {name}")
    stages.end()
    assert stages.seconds == {"statistics": 1 + 4, "fitting": 2}
