"""The conversion in a folder, as the parts of a served model need it."""

import functools
import re
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig

from hf_rfa.config import RFAConfig
from hf_rfa.errors import CheckpointError, UnsupportedModelError
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import ADAPTER_NAME, RFAAdapter
from hf_rfa.saving.conversion_files import read_conversion
from hf_rfa.saving.source import Source
from hf_rfa.vllm.linear_part import LinearPart
from hf_rfa.vllm.pages import PageLayout

_LAYER = re.compile(rf"(.+\.layers\.(\d+)\..+)\.{ADAPTER_NAME}\.(\w+)")


@dataclass(frozen=True)
class ServedConversion:
    """A conversion, and the model's sizes that decide how long pages are.

    Attributes:
        adapters: By the number of the layer.
        groups: G, query heads for each key head.
        dtype: The model's.
    """

    config: RFAConfig
    adapters: dict[int, RFAAdapter]
    groups: int
    dtype: torch.dtype

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> "ServedConversion":
        """That of the folder which vLLM serves.

        Raises:
            CheckpointError: It is missing or damaged, or the weights lie elsewhere.
        """
        model = vllm_config.model_config
        text = model.hf_text_config
        groups = text.num_attention_heads // text.num_key_value_heads
        return _read(model.model, model.revision, groups, model.dtype)

    def exact_heads(self, layer: int) -> tuple[int, ...]:
        """The key heads of a layer that are softmax."""
        return self.adapters[layer].softmax_heads

    def linear_parts(self, layer: int, heads: range, scaling: float) -> list[LinearPart]:
        """The linear ones of some key heads of a layer, by the number of keys that they keep."""
        adapter = self.adapters[layer]
        linear = [head for head in adapter.linear_heads if head in heads]
        numbers = {head: self._kept(adapter, head) for head in linear}
        parts = []
        for kept in sorted(set(numbers.values())):
            chosen = [head for head in linear if numbers[head] == kept]
            settings = AttentionSettings(
                window=self.config.window, sink_tokens=self.config.sink_tokens, kept_keys=kept, scaling=scaling
            )
            kernel = adapter.kernel.select(chosen)
            detached = FarKernel(kernel.feature_maps, **{k: t.detach() for k, t in kernel.tensors().items()})
            parts.append(
                LinearPart([head - heads.start for head in chosen], detached, settings, self._layout(adapter, kept))
            )
        return parts

    @property
    def page_words(self) -> int:
        """The length of every head's page: that of the longest, so that all are alike; 0 without linear heads."""
        layouts = {
            self._layout(adapter, self._kept(adapter, head))
            for adapter in self.adapters.values()
            for head in adapter.linear_heads
        }
        # An even number of words: pages lie behind each other, and torch views their bytes as other types.
        return max((layout.words + layout.words % 2 for layout in layouts), default=0)

    @property
    def has_exact_heads(self) -> bool:
        """Whether any head of any layer is softmax."""
        return any(adapter.softmax_heads for adapter in self.adapters.values())

    def _kept(self, adapter: RFAAdapter, head: int) -> int:
        kept = adapter.kept_keys
        return kept if isinstance(kept, int) else kept[head]

    def _layout(self, adapter: RFAAdapter, kept: int) -> PageLayout:
        config, dim = self.config, adapter.omega.shape[2]
        sinks = config.sink_tokens if config.window else 0
        components = adapter.kernel.num_components
        return PageLayout(components, dim, dim, config.window, sinks, kept, self.groups, self.dtype)


@functools.lru_cache(maxsize=4)
def _read(name: str, revision: str | None, groups: int, dtype: torch.dtype) -> ServedConversion:
    saved, source = read_conversion(Source.of(name, {"revision": revision}))
    if saved.base is not None:
        raise CheckpointError(
            f"{source} holds a conversion without the model's weights, and vLLM loads whole folders. Load it with "
            "`hf_rfa.from_pretrained` and save it with `hf_rfa.save_pretrained`."
        )
    if not saved.is_whole:
        raise CheckpointError(
            f"The two files of the conversion in {source} are of different saves, or damaged. Copy both again, or "
            "save the model again."
        )
    tensors: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in saved.tensors.items():
        found = _LAYER.fullmatch(key)
        if found is None:
            raise UnsupportedModelError(
                f"The vLLM plugin serves models whose attention lies in `layers`. Got the adapter {key!r} in "
                f"{source}. Serve the folder with `hf-rfa serve`."
            )
        tensors.setdefault(int(found[2]), {})[found[3]] = tensor
    adapters = {}
    with torch.device("cpu"), torch.inference_mode(False):
        for layer, own in sorted(tensors.items()):
            heads, _, dim = own["omega"].shape
            converted = saved.config.converts_layer(layer)
            adapter = RFAAdapter(saved.config, layer, heads, dim, converted=converted)
            adapter.load_state_dict(own)
            adapters[layer] = adapter
    return ServedConversion(saved.config, adapters, groups, dtype)
