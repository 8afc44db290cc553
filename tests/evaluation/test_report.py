"""The written result says what was measured: tables, JSON, plots."""

import dataclasses
import json
import math

import pytest
from conversions import converted
from families import token_ids
from PIL import Image

import hf_rfa
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation import PositionBin, report
from hf_rfa.evaluation.measuring import with_far_recovery
from hf_rfa.evaluation.results import (
    EXACT,
    LINEAR,
    ORIGINAL,
    VARIANTS,
    WINDOW_ONLY,
    CompareSettings,
    Comparison,
    Quality,
    Training,
)
from hf_rfa.evaluation.speed import Speed

NLL = {ORIGINAL: 2.0, WINDOW_ONLY: 3.0, LINEAR: 2.5, EXACT: 2.25}


def quality(nll: float) -> Quality:
    return Quality(
        perplexity={512: math.exp(nll + 0.1), 1024: math.exp(nll)},
        bits_per_byte={512: 1.5, 1024: 1.25},
        by_position=[PositionBin(1, 64, 20.0), PositionBin(64, 1024, 10.0)],
        kl_to_original=nll - 2.0,
        far_recovery=None,
        copy_perplexity={300: 1.5},
        greedy_agreement=0.875,
    )


@pytest.fixture
def comparison(tmp_path) -> Comparison:
    folder = tmp_path / "private" / "my-model"
    folder.mkdir(parents=True)
    qualities = with_far_recovery({name: quality(NLL[name]) for name in VARIANTS}, 1024)
    return Comparison(
        settings=CompareSettings(model=str(folder), contexts=(512, 1024), steps=10),
        environment={"torch": "2.13.0", "threads": 2},
        parameters=3_500_000,
        key_heads=8,
        bytes_per_token=3.0,
        eval_tokens=8192,
        softmax_heads=[(3, 1)],
        calibration={"heads": [{"layer": 3, "key_head": 1, "alpha": 0.25, "softmax": True}]},
        calibrated=qualities,
        finetuned=qualities,
        training={name: Training(10, 40_960, 20.0, [3.0, 2.9]) for name in VARIANTS},
        speed={name: [Speed(n, n / 1000, 50.0, n * 2**20, None) for n in (512, 4096)] for name in VARIANTS},
        seconds=100.0,
    )


def row(table: list[list[str]], label: str) -> list[str]:
    return next(cells for cells in table if cells[0] == label)[1:]


def test_far_recovery_is_filled_in_from_the_longest_context(comparison):
    recovered = [comparison.calibrated[name].far_recovery for name in VARIANTS]
    assert recovered == pytest.approx([1.0, 0.0, 0.5, 0.75])


def test_quality_table(comparison):
    table = report.quality_table(comparison.calibrated)
    assert table[0] == ["", *VARIANTS]
    assert row(table, "perplexity @ 1024") == ["7.389", "20.086", "12.182", "9.488"]
    assert row(table, "bits per byte @ 512") == ["1.5000"] * 4
    assert row(table, "KL to original (nats/token)") == ["0.0000", "1.0000", "0.5000", "0.2500"]
    assert row(table, "far recovery") == ["100.0%", "0.0%", "50.0%", "75.0%"]
    assert row(table, "copy perplexity, gap 300") == ["1.50"] * 4
    assert row(table, "greedy agreement") == ["87.5%"] * 4


def test_cost_table_is_in_seconds_tokens_and_mebibytes(comparison):
    table = report.cost_table(comparison)
    assert row(table, "prefill @ 4096 (s)") == ["4.096"] * 4
    assert row(table, "decode @ 512 (tokens/s)") == ["50.0"] * 4
    assert row(table, "cache @ 512 (MiB)") == ["512.000"] * 4
    assert not any("peak" in cells[0] for cells in table)


def test_peak_memory_is_shown_where_it_was_measured(comparison):
    comparison.speed = {
        name: [dataclasses.replace(speed, peak_bytes=3 * 2**20) for speed in speeds]
        for name, speeds in comparison.speed.items()
    }
    assert row(report.cost_table(comparison), "peak memory @ 512 (MiB)") == ["3"] * 4


def test_position_table(comparison):
    assert report.position_table(comparison.calibrated)[2] == ["64 to 1023", "10.000", "10.000", "10.000", "10.000"]


def test_the_report_is_written_and_carries_no_path(comparison, tmp_path):
    paths = report.write_report(comparison, tmp_path / "out")
    assert [path.name for path in paths] == ["report.md", "report.json", "perplexity.png", "cost.png"]
    text = paths[0].read_text()
    assert "my-model (3,500,000 parameters) on stdlib" in text
    assert "| far recovery | 100.0% | 0.0% | 50.0% | 75.0% |" in text
    assert "After 10 steps of fine-tuning (40,960 tokens, the same for every column)" in text
    assert "original, same tuning" in text
    assert "all key heads but 1 of 8" in text
    assert "| layer | key head | alpha | softmax |" in text
    assert "| 3 | 1 | 0.25 | True |" in text
    values = json.loads(paths[1].read_text())
    assert values["calibrated"][EXACT]["perplexity"]["1024"] == pytest.approx(math.exp(2.25))
    assert values["speed"][ORIGINAL][1]["cache_bytes"] == 4096 * 2**20
    assert values["report_version"] == 1
    assert "private" not in paths[0].read_text() + paths[1].read_text()
    for path in paths[2:]:
        with Image.open(path) as image:
            assert image.width > 600
            assert len(image.convert("RGB").getcolors(2**24)) > 10  # not a blank page


def test_without_fine_tuning_the_report_says_so(comparison, tmp_path):
    comparison.finetuned, comparison.training = {}, {}
    report.write_report(comparison, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Nothing was fine-tuned" in text
    assert "same tuning" not in text
    assert "kept_tokens.png" not in text
    assert "adds the far keys through" in text


CURVE = [
    {"bytes": 2**20, "nats": 0.5, "layer": None, "key_head": None, "kept_keys": None},
    {"bytes": 2**21, "nats": 0.25, "layer": 0, "key_head": 1, "kept_keys": 64},
    {"bytes": 2**22, "nats": 0.004, "layer": 3, "key_head": 1, "kept_keys": None},
]


def test_the_curve_joins_the_report(comparison, tmp_path):
    comparison.calibration |= {"curve": CURVE, "unit": "nats/token", "kept_keys": 64}
    paths = report.write_report(comparison, tmp_path)
    text = paths[0].read_text()
    assert "| 1.000 | 0.50000 |  |" in text
    assert "| 2.000 | 0.25000 | 64 kept keys in 1 head |" in text
    assert "| 4.000 | 0.00400 | exact: 3.1 |" in text
    assert "until 0.005 nats/token were measured" in text
    assert "(curve.png)" in text
    assert "keeps up to 64 far keys" in text
    assert paths[-1].name == "curve.png"
    with Image.open(paths[-1]) as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 10
    assert json.loads(paths[1].read_text())["calibration"]["curve"] == CURVE


def test_without_a_choice_of_heads_there_is_no_curve(comparison, tmp_path):
    paths = report.write_report(comparison, tmp_path)
    assert "bytes bought" not in paths[0].read_text()
    assert not (tmp_path / "curve.png").exists()


def test_kept_keys_join_the_report(comparison, tmp_path):
    comparison.kept = hf_rfa.kept_tokens(converted(kept_keys=3), token_ids())
    settings = comparison.settings
    conversion = dataclasses.replace(settings.conversion, kept_keys=3)
    comparison.settings = dataclasses.replace(settings, conversion=conversion)
    paths = report.write_report(comparison, tmp_path)
    text = paths[0].read_text()
    assert "keeps up to 3 far keys per key head and adds the other far keys through" in text
    assert "(kept_tokens.png)" in text
    assert paths[-1].name == "kept_tokens.png"
    with Image.open(paths[-1]) as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 10
    assert "kept" not in json.loads(paths[1].read_text())


def test_a_figure_that_is_no_number_is_not_written(comparison, tmp_path):
    comparison.seconds = math.nan
    with pytest.raises(ValueError, match="JSON"):
        report.write_report(comparison, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contexts": (500, 1024)}, "must divide the longest"),
        ({"contexts": ()}, "must divide the longest"),
        ({"speed_contexts": (0,)}, "`speed_contexts`"),
        ({"window": 0}, "`window`"),
        ({"steps": -1}, "`steps`"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"threads": 0}, "`threads`"),
        ({"mixed_precision": "fp8"}, "`mixed_precision`"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ConfigError, match=message):
        CompareSettings.from_dict({"model": "m", **settings})
