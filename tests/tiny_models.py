"""Tiny random models of any Transformers class, from its config class alone.

`SIZES` says what each field of a config becomes, by the field's name; the config's own defaults and validation do the
rest. `OVERRIDES` holds what a family needs besides, by model type. A composite config is shrunk part by part.
"""

import dataclasses
from typing import Any

import torch
import transformers
from families import VOCABULARY, never_ending, token_ids
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

#: Layers that a tiny model has: enough that a pattern of layer kinds shows each kind.
LAYERS = 2

#: What a field of a config becomes in a tiny one, wherever a config class declares it.
SIZES: dict[str, Any] = {
    **dict.fromkeys("hidden_size d_model n_embd dim emb_dim word_embed_proj_dim embedding_size".split(), 32),
    **dict.fromkeys(
        "encoder_hidden_size decoder_hidden_size cross_attention_hidden_size hidden_size_global".split(), 32
    ),
    **dict.fromkeys("num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers".split(), LAYERS),
    **dict.fromkeys("depth num_encoder_layers num_decoder_layers text_encoder_layers".split(), LAYERS),
    **dict.fromkeys("speech_encoder_layers text_decoder_layers t2u_encoder_layers t2u_decoder_layers".split(), 1),
    **dict.fromkeys("num_attention_heads n_head n_heads num_heads encoder_attention_heads".split(), 4),
    **dict.fromkeys("decoder_attention_heads speech_encoder_attention_heads".split(), 4),
    **dict.fromkeys("text_encoder_attention_heads text_decoder_attention_heads".split(), 4),
    **dict.fromkeys("intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff hidden_dim n_inner".split(), 48),
    **dict.fromkeys("ffn_hidden_size shared_intermediate_size dense_intermediate_size".split(), 48),
    **dict.fromkeys("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size".split(), 16),
    **dict.fromkeys("moe_shared_expert_intermediate_size expert_intermediate_size".split(), 16),
    **dict.fromkeys("speech_encoder_intermediate_size".split(), 48),
    **dict.fromkeys("num_local_experts num_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok num_experts_per_token top_k moe_topk moe_k".split(), 2),
    **dict.fromkeys("n_group topk_group num_expert_group".split(), 1),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "kv_channels": 8,
    "attention_head_dim": 8,
    "vocab_size": VOCABULARY,
    **dict.fromkeys("sliding_window sliding_window_size local_attention attention_window_size".split(), 16),
    "keep_window_size": 16,
    "attention_chunk_size": 16,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_source_positions": 512,
    "max_target_positions": 512,
    "image_size": 64,
    "patch_size": 8,
    "num_channels": 3,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "first_k_dense_layers": 1,
    **dict.fromkeys("linear_key_head_dim linear_value_head_dim linear_head_dim".split(), 8),
    **dict.fromkeys("linear_num_value_heads linear_num_heads".split(), 4),
    "linear_num_key_heads": 2,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "num_mel_bins": 16,
    "input_feat_per_channel": 16,
    "conv_channels": 32,
    "num_frames": 4,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "encoder_hash_byte_group_vocab": 97,
    # A layer that a training step leaves out gives its parameters no gradient. (Dropout stays as published.)
    **dict.fromkeys(
        "encoder_layerdrop decoder_layerdrop layerdrop drop_path_rate speech_encoder_layerdrop".split(), 0.0
    ),
}

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {**_ROPE, "mrope_section": [2, 1, 1]}
#: That of DeepSeek's own checkpoints, which changes the scale of the scores too.
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
#: Six layers, the last two of which attend to the keys and values of the third and the fourth.
_SHARING = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
}
#: Heads of another dim in the layers of full attention.
_GEMMA4 = {"global_head_dim": 16, "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0}
_VIBEVOICE = {"num_filters": 2, "depths": (1,) * 7}  # filters double at each depth

#: What a family needs besides, by model type: its own invariants, layers of each of its kinds, and what its published
#: checkpoints set where the config class has another default. Nothing that changes what a layer does is switched off.
OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 128, "patch_size": 16},
    "blip-2": {"image_token_index": VOCABULARY - 1, "num_query_tokens": 4},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {"n_shared_experts": 1},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "deepseek_v2": {"rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    "deepseek_v3": {"rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "gemma3n_text": {**_SHARING, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0], "laurel_rank": 8},
    "gemma4_text": {**_SHARING, **_GEMMA4, "use_double_wide_mlp": True},  # as E2B and E4B
    "gemma4_unified_text": {**_GEMMA4, "attention_k_eq_v": True},  # as the larger ones
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"num_hidden_layers": 4, "layer_types": None},  # one of four without chunks and rotary positions
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mistral": {"sliding_window": None},  # as from version 0.2 on; with one, no layer is left to convert
    "mllama_text_model": {"num_hidden_layers": 3, "cross_attention_layers": [1]},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "neomme": {"head_dim": 16},
    "qwen2_5_vl_text": {"rope_parameters": _MROPE},
    "qwen2_vl_text": {"rope_parameters": _MROPE},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "smollm3": {"num_hidden_layers": 4, "layer_types": None},  # one of four without rotary positions
    "swin": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    "timesformer": {"drop_path_rate": 0},  # the field wants a whole number
    "vibevoice_acoustic_tokenizer": _VIBEVOICE,
    "vibevoice_acoustic_tokenizer_encoder": _VIBEVOICE,
    "whisper": {"max_source_positions": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "chunk_size": 16,
        "mamba_d_state": 8,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}

#: Classes that are tried besides those of Transformers' own tables of language models.
ENCODERS = """
    ASTModel BeitModel Blip2Model ClapModel CLIPModel CLIPVisionModel Data2VecVisionModel DeiTModel DetrModel
    Dinov2Model DINOv3ViTModel Gemma3Model HubertModel Idefics3Model LlavaModel PaliGemmaModel Qwen2_5_VLModel
    Qwen2VLModel Qwen3VLModel SamModel SeamlessM4TModel SiglipModel Speech2TextModel SwinModel TimesformerModel
    VideoMAEModel ViTModel Wav2Vec2Model WhisperModel
""".split()
_TABLES = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")


@dataclasses.dataclass(frozen=True, order=True)
class Case:
    """A model class beside one of the config classes that it takes."""

    table: str
    model_type: str
    class_name: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.class_name}"


def all_cases() -> list[Case]:
    """Every language model class of Transformers' tables with each of its config types, and `ENCODERS`."""
    cases = []
    for table in _TABLES:
        names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        cases += [Case(table.lower(), kind, name) for kind, name in names.items() if isinstance(name, str)]
    kinds = {name: kind for kind, name in modeling_auto.MODEL_MAPPING_NAMES.items() if isinstance(name, str)}
    return cases + [Case("encoder", kinds[name], name) for name in ENCODERS]


def tiny_config(config_class: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """The config class with its sizes made tiny; `more` goes before every rule."""
    declared = {field.name: field for field in dataclasses.fields(config_class)}
    values: dict[str, Any] = {}
    for name, size in SIZES.items():
        field = declared.get(config_class.attribute_map.get(name, name)) or declared.get(name)
        if field is not None and not _is_pattern(field):
            values[field.name] = size
    if declared.keys() & {"kv_lora_rank", "q_lora_rank"} and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention expands to one for each
    values |= _layers_of_each_kind(config_class, declared)
    local = "sliding_attention" in values.get("layer_types", ())
    for name in ("sliding_window", "attention_chunk_size"):
        if name in values and declared[name].default is None and not local:
            del values[name]
    overrides = OVERRIDES.get(config_class.model_type, {})
    whole = None
    for name, part in config_class.sub_configs.items():
        if name in more or name in overrides:
            continue
        part = getattr(part, "config_class", part)  # since Transformers 5.24, beside a model type
        if part is AutoConfig:
            whole = config_class() if whole is None else whole
            part = type(getattr(whole, name))
        if isinstance(part, type) and issubclass(part, PreTrainedConfig):
            values[name] = tiny_config(part)
    values |= overrides | more
    return config_class(**values)


def _layers_of_each_kind(config_class: type[PreTrainedConfig], declared: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind that the config class's own defaults have, and at least one of full attention."""
    name = config_class.attribute_map.get("layer_types", "layer_types")
    number = config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if name not in declared or number not in declared or name in OVERRIDES.get(config_class.model_type, {}):
        return {}
    kinds = list(dict.fromkeys(getattr(config_class(), name) or ()))
    if kinds == ["sliding_attention"]:
        kinds.append("full_attention")
    kinds = kinds if len(kinds) > 1 else kinds * LAYERS
    return {name: kinds, number: len(kinds)} if kinds else {}


def _is_pattern(field: dataclasses.Field) -> bool:
    """Whether the field lists one value a layer or a stage, which no single number can stand for."""
    return isinstance(field.default, (list, tuple)) or (
        field.default_factory is not dataclasses.MISSING and isinstance(field.default_factory(), (list, tuple))
    )


def tiny_model(case: Case, **more: Any) -> PreTrainedModel:
    """The same random model every time, in evaluation mode, `more` in its config; the caller's random state stays."""
    model_class = getattr(transformers, case.class_name)
    config_class = type(AutoConfig.for_model(case.model_type))
    if not issubclass(config_class, model_class.config_class):
        config_class = model_class.config_class
    config = tiny_config(config_class, **more)
    if case.table == "causal_lm" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).eval()
        fixed = {id(p) for m in model.modules() if "Sinusoidal" in type(m).__name__ for p in m.parameters()}
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)  # as if it had been trained
            elif parameter.dim() > 1 and parameter.requires_grad and id(parameter) not in fixed:
                parameter.mul_(4)
    return never_ending(model)


def ordinary_ids(batch: int = 1, length: int = 50, seed: int = 0) -> torch.Tensor:
    """`token_ids` that no model of these takes for anything but text: composite ones keep places for images above."""
    return token_ids(batch, length, seed, vocabulary=60)
