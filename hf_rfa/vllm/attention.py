"""The attention of a served layer: its linear heads by random features, its exact heads by vLLM's own attention."""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import direct_register_custom_op

from hf_rfa.errors import UnsupportedModelError
from hf_rfa.vllm.conversion import ServedConversion
from hf_rfa.vllm.linear_heads import advance
from hf_rfa.vllm.state_pages import StatePages


class RFAAttention(nn.Module):
    """Takes the place of vLLM's `Attention` in a model: the same arguments and the same result.

    To the cache manager each key head is a layer of its own, see `StatePages`.
    """

    def __init__(self, original: Attention, conversion: ServedConversion, vllm_config: VllmConfig) -> None:
        super().__init__()
        name, heads, dim = original.layer_name, original.num_kv_heads, original.head_size
        layer = extract_layer_index(name)
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        whole = conversion.adapters[layer].key_heads
        if original.sliding_window is not None or heads * ranks != whole:
            raise UnsupportedModelError(
                "The vLLM plugin serves layers without a sliding window, on a number of ranks that divides their key "
                f"heads. Got sliding_window={original.sliding_window} and {ranks} ranks for {whole} key heads in "
                f"{name}. Use fewer ranks, or serve the folder with `hf-rfa serve`."
            )
        self.groups, self.dim, self.key_heads = original.num_heads // heads, dim, heads
        own = range(rank * heads, (rank + 1) * heads)
        scaling = original.impl.scale
        exact = [head - own.start for head in conversion.exact_heads(layer) if head in own]
        self.exact = nn.ModuleDict()
        for head in exact:
            self.exact[str(head)] = Attention(
                self.groups, dim, scaling, num_kv_heads=1, cache_config=vllm_config.cache_config,
                quant_config=vllm_config.quant_config, prefix=f"{name}.exact_head{own.start + head}",
            )  # fmt: skip
        device = vllm_config.device_config.device
        self.parts = [part.to(device) for part in conversion.linear_parts(layer, own, scaling)]
        self.pages = [
            [
                StatePages(vllm_config, conversion, part.layout, f"{name}.linear_head{own.start + head}", self)
                for head in part.heads
            ]
            for part in self.parts
        ]

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The output (T, H * D) for the tokens of a step: q (T, H * D), k and v (T, Hk * D)."""
        tokens = len(query)
        query = query.view(tokens, self.key_heads, self.groups, self.dim)
        key, value = (x.view(tokens, self.key_heads, self.dim) for x in (key, value))
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for head, attention in self.exact.items():
            number = int(head)
            answer = attention(*(x[:, number].contiguous() for x in (query, key, value)))
            output[:, number] = answer.view(tokens, self.groups, self.dim)
        if self.parts:
            torch.ops.vllm.rfa_linear_heads(query, key, value, output, self.pages[0][0].name)
        return output.view(tokens, -1)

    def run_linear_heads(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, metadata: Any
    ) -> None:
        """Write the linear heads' part of the output (T, Hk, G, D)."""
        for part, pages in zip(self.parts, self.pages, strict=True):
            found = [metadata[head.name] for head in pages]
            index = part.index
            tokens = query.index_select(1, index), key.index_select(1, index), value.index_select(1, index)
            answer = torch.zeros_like(tokens[0])
            places = [own.places for own in found]
            advance(part, tokens, answer, found[0].step, [head.pages for head in pages], places)
            output.index_copy_(1, index, answer)


def replace_attention(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Put `RFAAttention` in the place of each `Attention` of a model that vLLM has just built."""
    conversion = ServedConversion.of(vllm_config)
    layers = vllm_config.compilation_config.static_forward_context
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    for name, original in found:
        del layers[original.layer_name]  # the cache manager asks every layer that is listed there
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, RFAAttention(original, conversion, vllm_config))


def _rfa_linear_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    """One operation to torch.compile and CUDA graphs, whatever happens in it."""
    context = get_forward_context()
    if context.attn_metadata is None:  # vLLM measures the memory of a step
        return
    owner = context.no_compile_layers[layer_name].owner
    owner.run_linear_heads(query, key, value, output, context.attn_metadata)


def _rfa_linear_heads_fake(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, layer_name: str
) -> None:
    return


direct_register_custom_op(
    "rfa_linear_heads", _rfa_linear_heads, mutates_args=["output"], fake_impl=_rfa_linear_heads_fake
)
