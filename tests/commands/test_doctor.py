"""`hf-rfa doctor` on a small layer, with Triton's interpreter in the place of a GPU."""

import importlib.util

import pytest
import torch
from typer.testing import CliRunner

from hf_rfa import cli
from hf_rfa.commands import doctor
from hf_rfa.ops.first_use.check import chunked_form
from hf_rfa.ops.first_use.verdicts import Verdict

SIZES = "--device cpu --heads 2 --head-dim 16 --num-features 4 --window 4 --kept-keys 3 --length 40"


def run(*more):
    return CliRunner().invoke(cli.app, ["doctor", *SIZES.split(), *more], catch_exceptions=False)


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """The kinds of calls whose kernels are checked; their verdicts are made up."""
    found = []
    verdict = Verdict(error=2e-3, speed=6.1)
    monkeypatch.setattr(doctor, "check", lambda kind, call: found.append(kind) or verdict)
    monkeypatch.setattr(doctor, "why_not_triton", lambda *arguments: None)
    monkeypatch.setattr(doctor.VerdictFolder, "path", tmp_path)
    return found


def test_it_says_what_there_is_and_that_it_is_right(checked, tmp_path):
    result = run()
    assert result.exit_code == 0, result.stdout
    for text in (
        f"torch {torch.__version__}", "CPU:", "in chunks, 3 kept keys, float32, beside the definition: ", "softmax",
        "decoding, 3 kept keys: used: error 2e-03, 6.1 times the form in PyTorch", "Every check has passed",
    ):  # fmt: skip
        assert text in result.stdout
    assert [(kind.task, kind.kept_keys) for kind in checked] == [
        ("causal", 0), ("decode", 0), ("causal", 3), ("decode", 3),
    ]  # fmt: skip
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_a_form_that_is_wrong_fails(checked, monkeypatch):
    monkeypatch.setattr(doctor, "chunked_form", lambda call: chunked_form(call) * 1.001)
    result = run()
    assert result.exit_code == 1
    assert "in chunks, float32, beside the definition: FAILED, output: relative error 1.0e-03" in result.stdout
    assert "A check has FAILED" in result.stdout


def test_kernels_that_are_wrong_fail(checked, monkeypatch):
    monkeypatch.setattr(doctor, "check", lambda kind, call: Verdict("compiling", "no compiler"))
    result = run()
    assert result.exit_code == 1
    assert "prefill and training: FAILED, compiling: no compiler" in result.stdout


def test_without_a_gpu_it_says_why_there_are_no_kernels_and_what_to_install(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else there(name, *rest)
    )
    result = run()
    assert result.exit_code == 0
    assert "not used: " in result.stdout
    assert "for LoRA: pip install 'hf_rfa[train]'" in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """The definition is computed on the CPU, whatever the device of the call."""
    result = CliRunner().invoke(cli.app, ["doctor", "--device", "cuda", "--length", "512"], catch_exceptions=False)
    assert result.exit_code == 0, result.stdout
    assert "Every check has passed" in result.stdout
