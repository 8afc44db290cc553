"""The models that serve converted folders: vLLM's own, with another attention in each layer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncCalculator
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from hf_rfa.errors import ConfigError
from hf_rfa.runtime.adapter import ADAPTER_NAME
from hf_rfa.vllm.attention import replace_attention
from hf_rfa.vllm.conversion import ServedConversion


class Served:
    """What the served models have in common. vLLM calls a model with pages of constant size hybrid."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.speculative_config is not None:
            raise ConfigError(
                "The states of linear heads cannot take tokens back, which speculative decoding needs. Got a "
                "speculative config. Leave it out."
            )
        if vllm_config.cache_config.cache_dtype.startswith(("fp8", "int", "nvfp4")):
            raise ConfigError(
                "The exact heads' cache is kept in the model's dtype. Got "
                f"kv_cache_dtype={vllm_config.cache_config.cache_dtype!r}. Leave it 'auto'."
            )
        recorded = vllm_config.compilation_config.cudagraph_mode
        if recorded not in (None, CUDAGraphMode.NONE) and vllm_config.device_config.device_type != "cpu":
            raise ConfigError(
                "The work of linear heads depends on the length of each sequence, and a CUDA graph would record one. "
                f"Got cudagraph_mode={recorded.name}. Pass --enforce-eager."
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        assert isinstance(self, nn.Module)
        replace_attention(self, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load the model's weights; the conversion's tensors, which lie beside them, are there already."""
        own = ((name, tensor) for name, tensor in weights if f".{ADAPTER_NAME}." not in name)
        return super().load_weights(own)  # type: ignore[misc]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """Where vLLM takes the size of a block of tokens from: the pages of as many heads as it thinks a layer has.

        A block of an exact head is then as long as a page.
        """
        model = vllm_config.model_config
        heads = model.get_num_kv_heads(vllm_config.parallel_config)
        return ((heads * ServedConversion.of(vllm_config).page_words,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Of a page."""
        return (torch.float32,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        """For prefix caching: a page is copied whole."""
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()


class RFALlamaForCausalLM(Served, LlamaForCausalLM, HasInnerState, IsHybrid):
    """Llama, SmolLM."""


class RFAMistralForCausalLM(Served, MistralForCausalLM, HasInnerState, IsHybrid):
    """Mistral from version 0.2 on."""


class RFAQwen2ForCausalLM(Served, Qwen2ForCausalLM, HasInnerState, IsHybrid):
    """Qwen2 and Qwen2.5."""


class RFAQwen3ForCausalLM(Served, Qwen3ForCausalLM, HasInnerState, IsHybrid):
    """Qwen3."""
