"""The causal form in chunks, with a backward pass that recomputes."""
