"""The tiny models have what published checkpoints have, and what other published settings of a family come to."""

import dataclasses
from typing import Any

import pytest
import torch
from decoding import continue_greedily, generate
from families import SHORT
from matrix_checks import PASSED, check_model, inputs_for, outputs_of
from tiny_models import Case, all_cases, ordinary_ids, tiny_config, tiny_model
from transformers import AutoConfig, PreTrainedConfig

import hf_rfa
from hf_rfa import UnsupportedModelError

#: Fields that may be 0 or None in a tiny model where the default is something, and why.
OFF = {
    # Layers that a training step leaves out at random.
    "encoder_layerdrop", "decoder_layerdrop", "speech_encoder_layerdrop", "layerdrop", "drop_path_rate",
    # Token 0.
    "bos_token_id", "decoder_start_token_id",
    # Mistral's, as from version 0.2 on.
    "sliding_window",
}  # fmt: skip


def parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config and those inside it."""
    inner = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(part for one in inner if isinstance(one, PreTrainedConfig) for part in parts(one))]


def switched_off(config: PreTrainedConfig) -> set[str]:
    """The fields that hold nothing where their default is something."""
    return {
        f"{config.model_type}.{field.name}"
        for field in dataclasses.fields(config)
        if field.name not in OFF
        and field.default is not dataclasses.MISSING
        and field.default
        and field.name in vars(config)  # else it differs from layer to layer
        and not vars(config)[field.name]
    }


def test_no_tiny_model_has_a_feature_of_its_family_switched_off():
    found: set[str] = set()
    for kind in sorted({case.model_type for case in all_cases()}):
        try:
            config = tiny_config(type(AutoConfig.for_model(kind)))
        except Exception:  # no tiny model of it, as its row of the matrix says
            continue
        found |= set().union(*(switched_off(part) for part in parts(config)))
    assert not found


def config_of(kind: str) -> Any:
    return tiny_config(type(AutoConfig.for_model(kind)))


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
def test_layers_of_both_kinds_share_keys_and_not_with_their_neighbour(kind):
    config = config_of(kind)
    assert config.num_kv_shared_layers == 2
    assert config.layer_types[:4] + config.layer_types[4:] == ["sliding_attention", "full_attention"] * 3


def test_published_features_show():
    assert set(config_of("gemma3n_text").activation_sparsity_pattern) == {0.0, 0.95}
    assert config_of("gemma4_text").use_double_wide_mlp
    assert config_of("gemma4_text").hidden_size_per_layer_input
    assert config_of("gemma4_unified_text").attention_k_eq_v
    assert config_of("gemma2").attn_logit_softcapping == 50
    assert config_of("gpt_oss").rope_parameters["rope_type"] == "yarn"
    assert config_of("deepseek_v3").rope_parameters["mscale_all_dim"] == 1
    assert config_of("llama4_text").no_rope_layers == config_of("smollm3").no_rope_layers == [1, 1, 1, 0]
    assert set(config_of("qwen3_next").layer_types) == {"linear_attention", "full_attention"}
    assert config_of("modernbert").local_attention < 40
    assert config_of("bert").attention_probs_dropout_prob == 0.1


# --- other published settings of the same classes --------------------------------------------------------------------

GEMMA4 = Case("causal_lm", "gemma4_text", "Gemma4ForCausalLM")
_LARGE = {
    "num_kv_shared_layers": 0, "use_double_wide_mlp": False, "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True, "global_head_dim": 16, "num_global_key_value_heads": 1,
}  # fmt: skip
CONVERTS = {
    "Gemma 4 31B": (GEMMA4, _LARGE),
    "Gemma 4 26B-A4B": (
        GEMMA4,
        {**_LARGE, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    "Qwen2 with windows": (
        Case("causal_lm", "qwen2", "Qwen2ForCausalLM"),
        {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None},
    ),
    "Granite": (
        Case("causal_lm", "granite", "GraniteForCausalLM"),
        {"attention_multiplier": 0.0156, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    ),
}
_WINDOW = {"sliding_window": 16}
#: Models whose class converts, but not with a window or a mask of its own on each layer.
ALL_LOCAL: dict[str, tuple[Case, dict[str, Any]]] = {
    "Mistral 0.1": (Case("causal_lm", "mistral", "MistralForCausalLM"), _WINDOW),
    "Phi-3 mini": (Case("causal_lm", "phi3", "Phi3ForCausalLM"), _WINDOW),
    "StarCoder2": (Case("causal_lm", "starcoder2", "Starcoder2ForCausalLM"), _WINDOW),
    # Its layers without a window see both sides by a function that could be any.
    "EmbeddingGemma": (Case("encoder", "gemma3_text", "Gemma3TextModel"), {"use_bidirectional_attention": True}),
}


@pytest.mark.parametrize("name", CONVERTS)
def test_other_published_settings_do_everything_too(name):
    case, settings = CONVERTS[name]
    endings = check_model(tiny_model(case, **settings))
    refused = {stage: ending for stage, ending in endings.items() if ending not in (PASSED, "-")}
    assert set(refused) <= {"padding"}, refused  # a window counts the padding within
    assert endings["convert"] == PASSED


@pytest.mark.parametrize("name", ALL_LOCAL)
def test_a_window_on_each_layer_leaves_nothing_to_convert(name):
    case, settings = ALL_LOCAL[name]
    model = tiny_model(case, **settings)
    with pytest.raises(UnsupportedModelError, match="all have a sliding window"):
        hf_rfa.convert(model, SHORT, calibrate=False)


def test_llama4_whose_scores_grow_with_the_position():
    """In its layers without rotary positions, from position 8,192 on; here from 8 on."""
    case = Case("causal_lm", "llama4_text", "Llama4ForCausalLM")
    model = tiny_model(case, floor_scale=8)
    ids = ordinary_ids(2, 40)
    assert not torch.equal(outputs_of(model, inputs_for(model)), outputs_of(tiny_model(case), inputs_for(model)))
    hf_rfa.convert(model, SHORT, calibrate=False)
    assert torch.equal(generate(model, ids, 12), continue_greedily(model, ids, 12))
