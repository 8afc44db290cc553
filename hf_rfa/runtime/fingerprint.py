"""A digest of everything that decides what the state of a layer means."""

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hf_rfa.runtime.adapter import RFAAdapter


@torch.compiler.disable  # a graph that breaks here would trace what follows, which it cannot
def digest_of(adapter: "RFAAdapter") -> str:
    """Hash of an adapter's tensors, window, sinks, kept keys and layer, the same in every process."""
    digest = hashlib.blake2b(digest_size=12)
    config = adapter.config
    digest.update(
        repr((config.window, config.sink_tokens, adapter.kept_keys, adapter.converted, adapter.layer)).encode()
    )
    for name, tensor in adapter.state_dict().items():
        if name != "draw":  # what was drawn counts, not how often
            numbers = tensor.detach().cpu().reshape(-1).view(torch.uint8)
            plain = torch.func.debug_unwrap(numbers)  # inside a transform of `torch.func` every tensor is wrapped
            data = plain.numpy().tobytes() if plain is numbers else bytes(plain.tolist())
            digest.update(name.encode() + data)
    return digest.hexdigest()
