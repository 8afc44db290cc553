"""The pages of one linear key head as vLLM's cache manager sees them: a state of constant size for each sequence."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import (
    LinearAttentionBackend,
    LinearAttentionMetadata,
    LinearAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MambaSpec

from hf_rfa.vllm.conversion import ServedConversion
from hf_rfa.vllm.linear_heads import Step
from hf_rfa.vllm.pages import HeadPages, PageLayout


class StatePages(MambaBase):
    """The pages of one linear key head.

    Each head is a layer to the cache manager, and so is each exact head: all pages then have the same number of bytes
    whatever the mixture in a layer, which vLLM's cache manager needs.

    Attributes:
        owner: The attention module that the head belongs to.
        pages: There once vLLM has allocated them.
    """

    pages: HeadPages

    def __init__(
        self, vllm_config: VllmConfig, conversion: ServedConversion, layout: PageLayout, name: str, owner: Any
    ) -> None:  # fmt: skip
        self.owner, self.name, self._layout = owner, name, layout
        self._words, self._beside_exact = conversion.page_words, conversion.has_exact_heads
        self.kv_cache = (torch.tensor([]),)
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise ValueError(f"Two layers are named {name!r}.")
        layers[name] = self

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the pages that vLLM has allocated."""
        super().bind_kv_cache(kv_cache)
        self.pages = HeadPages(self.kv_cache[0], self._layout)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """The kind of recurrent layer whose metadata vLLM prepares."""
        return MambaAttentionBackendEnum.LINEAR

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """One row of words."""
        return ((self._words,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Of the row."""
        return (torch.float32,)

    def get_attn_backend(self) -> type[LinearAttentionBackend]:
        """That which prepares `PageMetadata`."""
        return PageBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """The page, as long as a block of an exact head."""
        cache, model = vllm_config.cache_config, vllm_config.model_config
        padded = None
        if self._beside_exact:
            dtype = kv_cache_dtype_str_to_dtype(cache.cache_dtype, model)
            padded = FullAttentionSpec(
                block_size=cache.block_size, num_kv_heads=1, head_size=self._layout.dim, dtype=dtype
            ).page_size_bytes
        return MambaSpec(
            shapes=self.get_state_shape(),
            dtypes=self.get_state_dtype(),
            block_size=cache.mamba_block_size,
            page_size_padded=padded,
            mamba_type=self.mamba_type,
            mamba_cache_mode=cache.mamba_cache_mode,
        )


@dataclass
class PageMetadata(LinearAttentionMetadata):
    """Which page each sequence has, and what the step does, as Python numbers.

    Attributes:
        places: (sequences,) int64.
    """

    step: Step
    places: torch.Tensor


class PageMetadataBuilder(LinearAttentionMetadataBuilder):
    """Reads each step's numbers once for all layers of a group."""

    _cudagraph_support = AttentionCGSupport.NEVER  # a graph would record the numbers

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PageMetadata:  # fmt: skip
        """The metadata of a step."""
        found = super().build(common_prefix_len, common_attn_metadata, fast_build)
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        lengths = [stop - start for start, stop in pairwise(starts)]
        totals = common_attn_metadata.seq_lens.tolist()
        seen = [total - length for total, length in zip(totals, lengths, strict=True)]
        places = found.state_indices_tensor[: len(lengths)].long()
        return PageMetadata(**vars(found), step=Step(starts[:-1], lengths, seen), places=places)


class PageBackend(LinearAttentionBackend):
    """vLLM's backend of linear attention, with metadata that hold Python numbers too."""

    @staticmethod
    def get_builder_cls() -> type[PageMetadataBuilder]:
        """The builder of `PageMetadata`."""
        return PageMetadataBuilder
