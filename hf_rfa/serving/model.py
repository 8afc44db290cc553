"""A model, converted or not, as the engine runs it: pieces of one prompt, or one token for each row of a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from hf_rfa.errors import ConfigError, UnsupportedModelError
from hf_rfa.runtime.arguments import accepts, cache_argument
from hf_rfa.runtime.record import base_model
from hf_rfa.runtime.stacking import keep_rows, stack_caches

#: Largest difference of a logit, relative to the largest logit, between a text alone and the same text in a batch.
#: Rounding is far below it in every dtype; padding that is seen, or positions that are wrong, are far above.
_TOLERANCE = 0.05


class ServedModel:
    """The forwards that a server needs.

    Attributes:
        max_length: Tokens of a prompt and its answer together.
        vocabulary: Number of token ids.
        ends: Tokens at which `model.generate` stops.
    """

    def __init__(self, model: nn.Module, max_length: int | None = None) -> None:
        """Raises `UnsupportedModelError` for models whose texts cannot share a batch, after trying it."""
        if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
            raise UnsupportedModelError(
                "A learned prompt (prefix or prompt tuning) would have to be put before every text. Got a PEFT model "
                "with one. Serve a model without, or with LoRA."
            )
        self.model: Any = base_model(model).eval()
        name, config = type(self.model).__name__, self.model.config.get_text_config()
        if not accepts(self.model, "position_ids") or self.model.config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"The server batches decoders whose forward takes `position_ids`. Got {name}. Use `model.generate`."
            )
        recurrent = [layer for layer in DynamicCache(config=config).layers if not isinstance(layer, DynamicLayer)]
        if recurrent:
            raise UnsupportedModelError(
                f"Texts of different lengths cannot share a batch in recurrent layers. Got {name}, which needs "
                f"{type(recurrent[0]).__name__} in its cache. Run its texts one by one, with `model.generate`."
            )
        positions = getattr(config, "max_position_embeddings", None)
        if max_length is not None and positions is not None and max_length > positions:
            raise ConfigError(
                f"`--max-length` cannot be more than the model's {positions} positions. Got {max_length}. Leave it "
                "out."
            )
        longest = max_length or positions
        if longest is None:
            raise ConfigError(f"The config of {name} does not say how long a text may be. Pass --max-length.")
        self.max_length = int(longest)
        self.vocabulary = self.model.get_input_embeddings().weight.shape[0]
        self.ends = _ends(self.model)
        self._cache_name = cache_argument(self.model)
        self._last_only = {"logits_to_keep": 1} if accepts(self.model, "logits_to_keep") else {}
        self._check()

    def new_cache(self) -> Cache:
        """An empty cache; a converted model puts its own layers into it."""
        return DynamicCache()

    @torch.inference_mode()
    def prefill(self, cache: Cache, tokens: Sequence[int], seen: int) -> torch.Tensor:
        """Logits (1, V) after the next `tokens` of one text, of which the cache holds `seen`."""
        positions = torch.arange(seen, seen + len(tokens), device=self.model.device)
        return self._forward(cache, [tokens], positions[None], None)

    @torch.inference_mode()
    def decode(self, cache: Cache, tokens: Sequence[int], seen: Sequence[int]) -> torch.Tensor:
        """Logits (B, V) after one more token for each row of a stacked cache; `seen` are those of each row before."""
        positions = torch.tensor(seen, device=self.model.device).unsqueeze(1)
        width, mask = max(seen), None
        if min(seen) < width:
            mask = (torch.arange(width + 1, device=positions.device) >= width - positions).long()
        return self._forward(cache, [[token] for token in tokens], positions, mask)

    @torch.inference_mode()
    def stack(self, caches: Sequence[Cache]) -> Cache:
        """See `stack_caches`."""
        return stack_caches(caches)

    @torch.inference_mode()
    def keep(self, cache: Cache, rows: Sequence[int], width: int) -> None:
        """See `keep_rows`."""
        keep_rows(cache, rows, width)

    def _forward(
        self, cache: Cache, tokens: Sequence[Sequence[int]], positions: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        ids = torch.tensor(tokens, device=self.model.device)
        options = {self._cache_name: cache, "use_cache": True, **self._last_only}
        logits: torch.Tensor = self.model(ids, position_ids=positions, attention_mask=mask, **options).logits
        return logits[:, -1]

    def _check(self) -> None:
        """Two texts of unlike lengths in a batch, against each alone: some models have their own way of counting."""
        generator = torch.Generator().manual_seed(0)
        short, long = 3, max(1, min(150, self.max_length - 2))
        texts = torch.randint(self.vocabulary, (2, long), generator=generator).tolist()
        texts[0] = texts[0][:short]
        alone, stacked = [], []
        for text in texts:
            caches = [self.new_cache(), self.new_cache()]
            for cache in caches:
                self.prefill(cache, text, 0)
            alone.append(self.decode(caches[0], [text[0]], [len(text)]))
            stacked.append(caches[1])
        together = self.decode(self.stack(stacked), [text[0] for text in texts], [len(text) for text in texts])
        expected = torch.cat(alone)
        if not bool(expected.isfinite().all()):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives logits that are not finite in {self.model.dtype}. Got a text of "
                "random tokens. Choose another --dtype."
            )
        difference = float((together - expected).abs().max() / expected.abs().max())
        if difference > _TOLERANCE:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} answers differently in a batch with a text of another length: logits "
                f"differ by {difference:.0%} of the largest. Run its texts one by one, with `model.generate`."
            )


def _ends(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    return frozenset([found] if isinstance(found, int) else found or ())
