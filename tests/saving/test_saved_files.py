"""A folder that is used again, and saves that are interrupted: what loads is what was saved last, or a clear error."""

import json
import os
import shutil

import pytest
import torch
from conversions import redrawn, same_outputs
from families import PEFT_ASKS, lora, outputs_of, token_ids
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import hf_rfa
from hf_rfa import CheckpointError
from hf_rfa.saving.plain import plain_loading

INPUTS = {"input_ids": token_ids(), "use_cache": False}
PAIR = {"rfa_config.json", "rfa_model.safetensors"}
LORA = {"adapter_config.json", "adapter_model.safetensors"}
STALE = "saved over it later|changed after the conversion was saved"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "used again"


def scaled(model, by=1.5):
    """The same model with other weights."""
    with torch.no_grad():
        model.model.norm.weight.mul_(by)
    return model


def files(folder):
    return {path.name for path in folder.iterdir()}


# --- what was saved last ---------------------------------------------------------------------------------------------


@PEFT_ASKS
def test_a_lora_saved_beside_another_full_model(base, folder):
    scaled(base()).save_pretrained(folder)
    model = lora(redrawn(base()))
    hf_rfa.save_pretrained(model, folder)
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


@PEFT_ASKS
def test_a_lora_saved_beside_another_converted_model(base, folder):
    redrawn(scaled(base()), draw=7).save_pretrained(folder)
    model = lora(redrawn(base()))
    model.save_pretrained(folder)
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


@PEFT_ASKS
@pytest.mark.parametrize("save", [hf_rfa.save_pretrained, LlamaForCausalLM.save_pretrained.__name__])
def test_a_merged_model_saved_over_its_lora(save, base, folder):
    model = lora(redrawn(base()))
    hf_rfa.save_pretrained(model, folder)
    merged = model.merge_and_unload()
    if save is hf_rfa.save_pretrained:
        save(merged, folder)
    else:
        getattr(merged, save)(folder)
    assert not LORA & files(folder)
    assert same_outputs(hf_rfa.from_pretrained(folder), merged)


@PEFT_ASKS
def test_a_lora_saved_into_the_folder_of_its_own_converted_base(base, folder):
    redrawn(base()).save_pretrained(folder)
    model = lora(hf_rfa.from_pretrained(folder))
    hf_rfa.resample(model, draw=8)
    hf_rfa.save_pretrained(model, folder)
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


def test_a_conversion_alone_beside_the_weights_of_its_base(base, tmp_path):
    model = redrawn(base())
    hf_rfa.save_pretrained(model, tmp_path / "base", adapter_only=True)
    assert same_outputs(hf_rfa.from_pretrained(tmp_path / "base"), model)
    shutil.move(tmp_path / "base", tmp_path / "moved")
    assert same_outputs(hf_rfa.from_pretrained(tmp_path / "moved"), model)


def test_a_conversion_alone_beside_another_model(base, folder):
    scaled(base()).save_pretrained(folder)
    model = redrawn(base())
    hf_rfa.save_pretrained(model, folder, adapter_only=True)
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


def test_a_whole_model_over_a_conversion_alone(base, folder):
    hf_rfa.save_pretrained(redrawn(base(), draw=9), folder, adapter_only=True)
    model = redrawn(scaled(base()))
    hf_rfa.save_pretrained(model, folder)
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


def test_a_config_that_the_converted_model_writes_again_belongs_to_it(base, folder):
    model = redrawn(base())
    model.save_pretrained(folder)
    model.config.save_pretrained(folder)
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


def test_a_config_that_was_edited_is_still_the_models(base, folder):
    model = redrawn(base())
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"use_cache": False, "note": "edited"}))
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


# --- what was saved over it without a word to us ---------------------------------------------------------------------


def test_a_reverted_model_saved_over_its_conversion(base, folder):
    model = redrawn(base())
    model.save_pretrained(folder)
    hf_rfa.revert(model).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=STALE):
        hf_rfa.from_pretrained(folder)
    assert torch.equal(outputs_of(LlamaForCausalLM.from_pretrained(folder).eval(), INPUTS), outputs_of(base(), INPUTS))


def test_a_model_trained_as_softmax_saved_over_its_conversion(base, folder):
    """Who insists on softmax where hf_rfa is not imported; the config still names the conversion."""
    redrawn(base()).save_pretrained(folder)
    with plain_loading():
        plain = LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    scaled(plain).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=STALE):
        hf_rfa.from_pretrained(folder)


@pytest.mark.parametrize("adapter_only", [True, False])
@PEFT_ASKS
def test_a_plain_model_saved_over_what_had_no_weights(adapter_only, base, folder):
    model = redrawn(base()) if adapter_only else lora(redrawn(base()))
    hf_rfa.save_pretrained(model, folder, adapter_only=adapter_only)
    scaled(base()).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"(?s)config\.json.*{STALE}"):
        hf_rfa.from_pretrained(folder)


@PEFT_ASKS
def test_a_lora_of_a_reverted_model_saved_over_its_conversion(base, folder):
    model = lora(redrawn(base()))
    hf_rfa.save_pretrained(model, folder)
    hf_rfa.revert(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.mul_(2)
    model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match=rf"(?s)adapter_model\.safetensors.*{STALE}"):
        hf_rfa.from_pretrained(folder)


@PEFT_ASKS
def test_a_lora_saved_over_a_whole_converted_model_by_somebody_else(base, folder):
    redrawn(base()).save_pretrained(folder)
    lora(base()).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=STALE):
        hf_rfa.from_pretrained(folder)


@PEFT_ASKS
def test_a_conversion_alone_is_not_put_beside_a_lora(base, folder):
    hf_rfa.save_pretrained(lora(redrawn(base())), folder)
    before = files(folder)
    with pytest.raises(CheckpointError, match="holds a LoRA"):
        hf_rfa.save_pretrained(redrawn(base()), folder, adapter_only=True)
    assert files(folder) == before


def test_the_two_files_of_different_saves(base, folder, tmp_path):
    redrawn(base()).save_pretrained(folder)
    redrawn(base(), draw=9).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "rfa_model.safetensors", folder)
    with pytest.raises(CheckpointError, match="different saves"):
        hf_rfa.from_pretrained(folder)


def test_a_conversion_of_another_model(base, folder, tmp_path):
    redrawn(base()).save_pretrained(folder)
    redrawn(base(), draw=9).save_pretrained(tmp_path / "other")
    for name in PAIR:
        shutil.copy(tmp_path / "other" / name, folder)
    with pytest.raises(CheckpointError, match=STALE):
        hf_rfa.from_pretrained(folder)


# --- interrupted -----------------------------------------------------------------------------------------------------


@PEFT_ASKS
@pytest.mark.parametrize("kind", ["whole", "lora", "alone"])
def test_a_save_that_is_interrupted_anywhere_leaves_the_old_state_or_no_conversion(kind, base, folder, monkeypatch):
    """The disk is full at the first, the second, ... write of ours: never a mixture of old and new."""

    def save(model):
        hf_rfa.save_pretrained(lora(model) if kind == "lora" else model, folder, adapter_only=kind == "alone")

    save(redrawn(base()))
    replace, room = os.replace, []

    def limited(*paths):
        if not room:
            raise OSError("no space left")
        room.pop()
        replace(*paths)

    writes = 2 if kind == "alone" else 3  # the two files, and the mark in config.json or adapter_config.json
    with monkeypatch.context() as patch:
        patch.setattr("hf_rfa.saving.saved_files.os.replace", limited)
        for allowed in range(writes):
            room[:] = [None] * allowed
            with pytest.raises(CheckpointError, match="no space left"):
                save(scaled(redrawn(base(), draw=9)))
            assert not list(folder.glob("*.partial"))
            with pytest.raises(CheckpointError, match="holds no conversion"):
                hf_rfa.from_pretrained(folder)
        room[:] = [None] * writes
        save(scaled(redrawn(base(), draw=9)))
    assert {a.draw_number for a in hf_rfa.runtime.adapters.require_adapters(hf_rfa.from_pretrained(folder))} == {9}


def test_a_save_that_transformers_does_not_finish_leaves_no_conversion(base, folder, monkeypatch):
    model = redrawn(base())
    model.save_pretrained(folder)

    def fails(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder)
    with pytest.raises(CheckpointError, match="holds no conversion"):
        hf_rfa.from_pretrained(folder)


# --- folders of the first format -------------------------------------------------------------------------------------


def as_format_1(folder, name_or_path=None):
    """Rewrite a folder as the first release wrote it."""
    path = folder / "rfa_config.json"
    values = json.loads(path.read_text())
    values["rfa"]["format_version"] = 1
    old = {key: values[key] for key in ("rfa", "architecture", "calibration", "scope")}
    path.write_text(json.dumps({"format_version": 1, "base_model_name_or_path": name_or_path, **old}))
    tensors = load_file(folder / "rfa_model.safetensors")
    save_file(tensors, folder / "rfa_model.safetensors", metadata={"format": "pt"})
    if (folder / "config.json").exists():
        config = json.loads((folder / "config.json").read_text())
        del config["attn_implementation"]
        config["rfa_config"] = values["rfa"]
        (folder / "config.json").write_text(json.dumps(config))


def test_an_old_folder_with_weights_loads(base, folder):
    model = redrawn(base())
    hf_rfa.save_pretrained(model, folder)
    as_format_1(folder)
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


def test_an_old_conversion_alone_loads(base, folder, tmp_path):
    model = redrawn(base())
    hf_rfa.save_pretrained(model, folder, adapter_only=True)
    as_format_1(folder, str(tmp_path / "base"))
    assert same_outputs(hf_rfa.from_pretrained(folder), model)
    shutil.copytree(tmp_path / "base", folder, dirs_exist_ok=True)  # beside the weights, as was possible too
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


@PEFT_ASKS
def test_an_old_lora_loads(base, folder, tmp_path):
    model = lora(redrawn(base()))
    hf_rfa.save_pretrained(model, folder)
    as_format_1(folder, str(tmp_path / "base"))
    assert same_outputs(hf_rfa.from_pretrained(folder), model)


def test_an_old_folder_that_another_conversion_was_saved_over_is_refused(base, folder):
    hf_rfa.save_pretrained(redrawn(base()), folder)
    as_format_1(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rfa_config"]["seed"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=STALE):
        hf_rfa.from_pretrained(folder)
