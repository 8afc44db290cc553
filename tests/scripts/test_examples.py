"""The examples run as they are written, to their end, from a folder of their own."""

import importlib.util
import re

import pytest
import torch
from processes import ROOT, launch
from transformers import AutoModelForCausalLM

import hf_rfa
from hf_rfa.evaluation.compare import default_model


@pytest.mark.parametrize("name", ["trainer", "trl_sft"])
def test_an_example_trains_and_its_result_loads(name, tmp_path):
    if name == "trl_sft" and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed: `pip install trl`")
    script = str(ROOT / "examples" / f"{name}.py")
    options = ["--data", str(tmp_path / "data"), "--steps", "2", "--context", "256", "--output", str(tmp_path / "run")]
    (tmp_path / "data").mkdir()
    source = (ROOT / "hf_rfa" / "features" / "maps.py").read_text()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.txt").write_text(source)
    shown = launch([script, *options]).stdout
    evaluations = [line for line in shown.splitlines() if line.startswith("{'eval_loss'")]
    assert len(evaluations) >= 2
    assert evaluations[0].split(",")[0] != evaluations[-1].split(",")[0]
    assert "kept as" in shown  # the calibration report of the model that was loaded again
    trained = hf_rfa.from_pretrained(tmp_path / "run" / "final").lm_head.weight
    assert not torch.equal(trained, AutoModelForCausalLM.from_pretrained(default_model()).lm_head.weight)


def test_a_converted_encoder_goes_on_searching_its_old_index(encoder_folder):
    for name in ("sentence_transformers", "faiss"):
        pytest.importorskip(name)
    script = str(ROOT / "examples" / "embeddings.py")
    shown = launch([script, "--model", str(encoder_folder), "--texts", "40", "--window", "4"]).stdout
    assert re.search(r"converted: R@1 \d\.\d{3} on the old index of 20 texts", shown)
    assert "of 20 queries" in shown
