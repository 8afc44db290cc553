"""The patterns under examples/patterns fit their models, and do on any model what `convert(pattern=)` says."""

import json
import os
from pathlib import Path

import pytest
import torch
from paths import ROOT
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import hf_rfa
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.compare import default_model
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.record import conversion_config

PATTERNS = ROOT / "examples" / "patterns"
SMALL = {"hidden_size": 36, "intermediate_size": 8, "vocab_size": 32, "head_dim": 4}  # Llama's: a multiple of 9 heads


def like_smollm2():
    """A model with the layers and heads of SmolLM2-135M, and next to no weights."""
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, **SMALL))


def like_gemma():
    """The same for Gemma 3 270M, of whose layers every sixth sees everything."""
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1, sliding_window=512, **SMALL
        )
    )


MODELS = {"smollm2-135m": (like_smollm2, "HF_RFA_SMOLLM2"), "gemma-3-270m": (like_gemma, "HF_RFA_GEMMA")}
SHARED = sorted(path.stem for path in PATTERNS.glob("*.json"))


def test_every_pattern_is_tested():
    assert set(SHARED) <= set(MODELS)


@pytest.mark.parametrize("name", SHARED)
def test_a_pattern_fits_a_model_with_the_heads_of_its_own(name):
    _check(MODELS[name][0](), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_a_pattern_fits_its_model(name):
    variable = MODELS[name][1]
    if not os.environ.get(variable):
        pytest.skip(f"{variable} names no folder with the model")
    _check(AutoModelForCausalLM.from_pretrained(os.environ[variable]), name)


def _check(model, name: str) -> None:
    written = json.loads((PATTERNS / f"{name}.json").read_text())
    model = hf_rfa.convert(model, pattern=PATTERNS / f"{name}.json", calibrate=False)
    exact = {tuple(head) for head in written["softmax_heads"]}
    numbers = {tuple(head): number for head, number in written["head_kept_keys"]}
    assert not exact & set(numbers)
    assert len(exact) + len(numbers) == sum(written["key_heads"].values())
    for adapter in require_adapters(model):
        if adapter.converted:
            kept = adapter.kept_keys
            for head in range(adapter.key_heads):
                place = adapter.layer, head
                assert (head in adapter.softmax_heads) == (place in exact)
                number = kept if isinstance(kept, int) else kept[head]
                assert number == numbers.get(place, written["kept_keys"])
    with pytest.raises(ConfigError, match="is of another model"):
        hf_rfa.convert(_embedded(), pattern=PATTERNS / f"{name}.json", calibrate=False)


def _embedded():
    return AutoModelForCausalLM.from_pretrained(default_model()).eval()


def test_a_pattern_of_the_embedded_model_makes_another_copy_the_same(tmp_path: Path):
    config = hf_rfa.RFAConfig(budget=0.3, budget_context=2048)
    ids = torch.randint(3, 500, (1, 700), generator=torch.Generator().manual_seed(0))
    model = hf_rfa.convert(_embedded(), config, calibrate=ids)
    hf_rfa.save_pattern(model, tmp_path / "stdlib-llama.json")
    again = hf_rfa.convert(_embedded(), pattern=tmp_path / "stdlib-llama.json", calibrate=ids)
    mine, theirs = conversion_config(model), conversion_config(again)
    assert theirs.softmax_heads == mine.softmax_heads
    assert theirs.head_kept_keys == mine.head_kept_keys
    assert hf_rfa.calibration_report(again).curve == []  # no head was ranked
    assert len(hf_rfa.calibration_report(model).curve) > 1
