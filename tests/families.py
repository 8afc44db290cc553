"""Tiny models of unlike families, with random weights that are large enough for greedy tokens to mean something."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from transformers import PreTrainedModel

from hf_rfa import RFAConfig

#: The name of the cache among the arguments of the models of Transformers.
CACHE = "cache" if hasattr(T.modeling_outputs.BaseModelOutputWithPast, "cache") else "past_key_values"
VOCABULARY = 99
_TOKENS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {**_SHAPE, "intermediate_size": 48, **_TOKENS}
_LLAMA = {**_ENCODER, "num_key_value_heads": 2, "max_position_embeddings": 256}
_LOCAL_GLOBAL = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_DEEPSEEK = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16,
}  # fmt: skip
_BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 256,
    "decoder_start_token_id": 1, "forced_eos_token_id": None, "dropout": 0.0,
}  # fmt: skip
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "dropout": 0.0}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, **_TOKENS}
_VIT = {"image_size": 64, "patch_size": 8}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}

Builder = Callable[[], PreTrainedModel]

CAUSAL: dict[str, Builder] = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**_LLAMA)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**_LLAMA, head_dim=16)),
    "gemma": lambda: T.GemmaForCausalLM(T.GemmaConfig(**_LLAMA, head_dim=16)),
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(**_GPT2, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**_ENCODER, max_position_embeddings=256)),
    "opt": lambda: T.OPTForCausalLM(T.OPTConfig(**_SHAPE, **_OPT, **_TOKENS)),
    "phi": lambda: T.PhiForCausalLM(T.PhiConfig(**_LLAMA)),
    "olmo2": lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**_LLAMA)),
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**_LLAMA, logit_scale=1.0)),
    "stablelm": lambda: T.StableLmForCausalLM(T.StableLmConfig(**_LLAMA)),
    # One layer with a sliding window of its own, one without.
    "gemma3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**_LLAMA, head_dim=16, **_LOCAL_GLOBAL)),
    # Learned attention sinks, and the same two kinds of layers.
    "gpt_oss": lambda: T.GptOssForCausalLM(
        T.GptOssConfig(
            **_LLAMA, head_dim=16, num_local_experts=2, num_experts_per_tok=1, **_LOCAL_GLOBAL, rope_parameters=_YARN
        )
    ),
    # Values of another dim than keys.
    "deepseek_v3": lambda: T.DeepseekV3ForCausalLM(
        T.DeepseekV3Config(**{**_LLAMA, "num_key_value_heads": 4}, **_DEEPSEEK)
    ),
    # A recurrent layer, then attention.
    "jamba": lambda: T.JambaForCausalLM(
        T.JambaConfig(
            **_LLAMA, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4
        )
    ),
}

OTHERS: dict[str, Builder] = {
    "bert": lambda: T.BertForMaskedLM(
        T.BertConfig(
            **_ENCODER, max_position_embeddings=256, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
    ),
    "vit": lambda: T.ViTModel(T.ViTConfig(**_SHAPE, intermediate_size=48, **_VIT)),
    "bart": lambda: T.BartForConditionalGeneration(T.BartConfig(**_BART, **_TOKENS)),
    # One layer without a window, one whose window lies on both sides.
    "modernbert": lambda: T.ModernBertForMaskedLM(
        T.ModernBertConfig(**_ENCODER, max_position_embeddings=256, cls_token_id=0, sep_token_id=1, local_attention=16)
    ),
}

SUPPORTED = {**CAUSAL, **OTHERS}

#: Families that must be refused, and a word of the reason that the message has to give.
REFUSED: dict[str, tuple[Builder, str]] = {
    "gemma2": (lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**_LLAMA, head_dim=16)), "soft-capping"),
    "bloom": (
        lambda: T.BloomForCausalLM(T.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **_TOKENS)),
        "attention of its own",
    ),
    "mpt": (
        lambda: T.MptForCausalLM(T.MptConfig(d_model=32, n_heads=4, n_layers=2, **_TOKENS)),
        "attention of its own",
    ),
    "t5": (
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=2, **_TOKENS)
        ),
        "position bias",
    ),
    "mamba": (
        lambda: T.MambaForCausalLM(T.MambaConfig(hidden_size=32, num_hidden_layers=2, **_TOKENS)),
        "attention of its own",
    ),
}

#: A window short enough for a test's text to be far longer.
SHORT = RFAConfig(window=8, num_features=16, sink_tokens=2)


def build(builder: str | Builder, dtype: torch.dtype = torch.float32, *, gain: float = 4) -> PreTrainedModel:
    """The same model every time, in evaluation mode; the caller's random state stays as it was.

    `gain` is what every matrix is multiplied by: random weights as they are drawn hardly look at the text.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = (SUPPORTED[builder] if isinstance(builder, str) else builder)().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    return never_ending(model).to(dtype)


def llama(model_class: type[PreTrainedModel] = T.LlamaForCausalLM, *, gain: float = 4, **changes: Any) -> Any:
    """The Llama of `CAUSAL` with `changes` to its config, or another class on that config."""
    return build(lambda: model_class(model_class.config_class(**{**_LLAMA, **changes})), gain=gain)


#: The longest text of `short_llama`, and so what it is calibrated on if it calibrates itself: tests are fast.
LONGEST = 120


def short_llama() -> T.LlamaForCausalLM:
    """A Llama of texts of at most `LONGEST` tokens."""
    return llama(max_position_embeddings=LONGEST)


def never_ending(model: PreTrainedModel) -> PreTrainedModel:
    """The model, for which the end of a text is a token like any other: generation runs to its length."""
    if model.can_generate():
        model.generation_config.eos_token_id = None
    return model


def token_ids(batch: int = 2, length: int = 70, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Ordinary tokens (batch, length), none of them special."""
    return torch.randint(5, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs_for(model: PreTrainedModel, batch: int = 2, length: int = 70, seed: int = 0) -> dict[str, Any]:
    """A batch of two texts (or images of 65 patches), longer than two windows of `SHORT`."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator, dtype=model.dtype)}
    inputs: dict[str, Any] = {"input_ids": token_ids(batch, length, seed)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(batch, length - 10, seed=1)
    if model.can_generate():
        inputs["use_cache"] = False
    return inputs


def outputs_of(model: PreTrainedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head; no gradients."""
    with torch.no_grad():
        return model(**inputs)[0]


def attention_modules(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The modules that hold an adapter, in the model's order."""
    return [module for module in model.modules() if "rfa" in module._modules]


def checkpoint_activations(model: PreTrainedModel, *, use_reentrant: bool) -> None:
    """Turn activation checkpointing on, under whichever name this Transformers has for it."""
    options = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


PEFT_ASKS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT itself does


#: Where each family projects its queries, and its keys or values.
LORA_TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "gemma3": ["q_proj", "k_proj", "v_proj"],
    "gpt_oss": ["q_proj", "v_proj"],
    "deepseek_v3": ["q_b_proj", "kv_b_proj"],
    "jamba": ["q_proj", "in_proj"],
    "bert": ["query", "value"],
}


def wrap(model: PreTrainedModel, config: Any) -> Any:
    """A PEFT model around this one, the same every time; in evaluation mode. Mark the test with `PEFT_ASKS`."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()


def lora(model: PreTrainedModel, family: str = "llama", task: str | None = "CAUSAL_LM") -> Any:
    """`wrap` with a LoRA that is not zero."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=LORA_TARGETS[family], init_lora_weights=False, task_type=task,
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    return wrap(model, config)
