"""The chunked causal form, with a backward pass that recomputes the forward pass."""
