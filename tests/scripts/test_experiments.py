"""The study's command on the embedded model: every combination is a result, a table row, and run only once."""

import json
import sys

import paths
import pytest

import hf_rfa
from hf_rfa.runtime.adapters import require_adapters

pytest.importorskip("yaml")
SCRIPTS = paths.SCRIPTS / "experiments"

STUDY = """
settings: {contexts: [256], eval_windows: 1, copy_gaps: [300], calibration_batches: 1, batch_size: 1}
transfer_steps: 2
finetune_steps: 1
runs:
  - feature_map: [hyperbolic]
    num_features: [8]
    window: [32]
    softmax_heads: [null]
    stage: [calibrated, finetuned]
"""


@pytest.fixture
def study(imported):
    return imported("run", SCRIPTS)


def test_a_study_is_a_table_and_goes_on_where_it_was(study, tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(STUDY)
    output = tmp_path / "results"
    words = [str(tmp_path / "small.yaml"), "--output", str(output)]
    study.main(words)
    results = {r["run"]["stage"]: r for r in json.loads((output / "results.json").read_text())}
    assert sorted(results) == ["calibrated", "finetuned", "original", "window only"]
    assert results["original"]["kl_to_original"] == 0 < results["calibrated"]["kl_to_original"]
    assert results["original"]["copy_perplexity"]["300"] < results["window only"]["copy_perplexity"]["300"]
    assert 0 <= results["calibrated"]["passkey"] <= results["original"]["passkey"]
    assert results["calibrated"]["cache_bytes"] < results["original"]["cache_bytes"]
    assert set(results["finetuned"]["seconds"]) == {"calibrate", "transfer", "finetune", "all"}
    table = (output / "table.md").read_text().splitlines()
    assert len(table) == 2 + len(results)
    assert "0.00000" in table[2]
    assert (output / "features.png").stat().st_size > 1000 < (output / "budget.png").stat().st_size

    # The window alone is lost: it is the only thing that runs again, and the others stay as they were.
    others = [r for r in json.loads((output / "results.json").read_text()) if r["run"]["stage"] != "window only"]
    (output / "results.json").write_text(json.dumps(others))
    made = []
    monkeypatch.setattr(
        study, "make", lambda run, *rest, make=study.make: (made.append(run["stage"]), make(run, *rest))[1]
    )
    study.main(words)
    assert made == ["window only"]
    after = json.loads((output / "results.json").read_text())
    assert [r for r in after if r["run"]["stage"] != "window only"] == others
    assert len(after) == len(others) + 1


def test_a_group_with_a_missing_field_is_named(study):
    with pytest.raises(SystemExit, match="needs lists for"):
        list(study.all_runs([{"feature_map": ["hyperbolic"], "stage": ["calibrated"]}]))


def test_the_table_of_the_runs_with_every_head_linear_is_that_of_their_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import linear_heads_table

    results = SCRIPTS / "results" / "linear-heads"
    for path in results.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(sys, "argv", ["linear_heads_table.py", str(tmp_path)])
    try:
        linear_heads_table.main()
    finally:
        sys.modules.pop("linear_heads_table")
    assert (tmp_path / "table.md").read_text() == (results / "table.md").read_text()
    assert (tmp_path / "copies.png").stat().st_size > 1000


MEASURE = """
import torch, torch.nn.functional as F

def validation_ids(tokenizer):
    return torch.arange(3000) % 500

@torch.no_grad()
def perplexity(model, ids, length=1024, n=4):
    x = ids[None, :256]
    return F.cross_entropy(model(x).logits[0, :-1], x[0, 1:]).exp().item()

def copy_perplexity(model, ids, gap=300, n=6):
    return perplexity(model, ids)

def kl_divergence(original, model, ids, length=1024, n=4):
    return perplexity(model, ids) - perplexity(original, ids)
"""


@pytest.mark.slow
def test_every_head_linear_trained_within_a_budget(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import linear_heads

    (tmp_path / "measure.py").write_text(MEASURE)
    model = paths.ROOT / "examples" / "stdlib-llama"
    words = [
        "--model", str(model), "--data", "stdlib", "--measure", str(tmp_path / "measure.py"),
        "--output", str(tmp_path / "out"), "--layer_features", "1:96", "--transfer_steps", "2", "--budget", "30",
    ]  # fmt: skip
    try:
        linear_heads.main(words)
    finally:
        for name in ("linear_heads", "recipe", "goals"):
            sys.modules.pop(name, None)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["finetune_steps"] >= 1
    assert results["evaluations"][-1]["step"] == results["finetune_steps"]
    assert results["original"]["KL 1024"] == 0
    stages = ("calibrated", "transferred", "finetuned")
    assert len({results[stage]["perplexity 2048"] for stage in stages}) == len(stages)
    assert results["cpu_seconds"] >= sum(results[stage]["cpu_seconds"] for stage in stages)
    final = hf_rfa.from_pretrained(tmp_path / "out" / "final")
    assert [adapter.omega.shape[1] for adapter in require_adapters(final)][:2] == [2 * 64, 2 * 96]


def test_kept_keys_are_spent_where_they_save_most(imported):
    spend = imported("kept_keys", SCRIPTS).spend
    a, b, c = (0, 0), (0, 1), (1, 0)
    costs = {
        0: {a: 10.0, b: 4.0, c: 1.0},
        32: {a: 9.9, b: 2.0, c: 1.0},  # head a needs 64 before anything is saved
        64: {a: 1.0, b: 1.5, c: 1.0},
    }
    assert spend(costs, 32) == {a: 64, b: 32, c: 0}  # 96 in all
    assert spend(costs, 0) == {a: 0, b: 0, c: 0}
    assert spend(costs, 64) == {a: 64, b: 64, c: 0}  # head c has no use for any
