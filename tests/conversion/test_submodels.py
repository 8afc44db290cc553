"""`submodels`: the parts of a composite model that are converted."""

import pytest
import torch
from families import SHORT, build
from transformers import CLIPConfig, CLIPModel

import hf_rfa
from hf_rfa import ConfigError
from hf_rfa.runtime.adapters import named_adapters

_SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def clip():
    text = {**_SIZE, "vocab_size": 99, "max_position_embeddings": 80, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**_SIZE, "image_size": 32, "patch_size": 4}
    return build(lambda: CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))


def towers(model):
    return {name.split(".")[0] for name, _, _ in named_adapters(model)}


def test_only_the_named_submodels_are_converted():
    assert towers(hf_rfa.convert(clip(), SHORT, calibrate=False)) == {"text_model", "vision_model"}
    model = hf_rfa.convert(clip(), SHORT, calibrate=False, submodels=["text_config"])
    assert towers(model) == {"text_model"}
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = clip().vision_model(pixels).last_hidden_state
        assert torch.equal(model.vision_model(pixels).last_hidden_state, want)


def test_a_saved_model_remembers_them(tmp_path):
    hf_rfa.save_pretrained(hf_rfa.convert(clip(), SHORT, calibrate=False, submodels=["vision_config"]), tmp_path)
    assert towers(hf_rfa.from_pretrained(tmp_path)) == {"vision_model"}


@pytest.mark.parametrize("wrong", [["audio_config"], [], "text_config"])
def test_what_is_no_list_of_submodels_is_refused(wrong):
    with pytest.raises(ConfigError, match="`submodels` must list sub-configs"):
        hf_rfa.convert(clip(), SHORT, calibrate=False, submodels=wrong)


def test_the_old_name_warns():
    with pytest.warns(FutureWarning, match="called `submodels` now"):
        model = hf_rfa.convert(clip(), SHORT, calibrate=False, parts=["text_config"])
    assert towers(model) == {"text_model"}
    with pytest.raises(ConfigError, match="old name"):
        hf_rfa.convert(clip(), SHORT, calibrate=False, parts=["text_config"], submodels=["text_config"])
