"""The causal operator in Triton kernels, forward and backward: features are never written to device memory.

`causal` is the entry point; `forward` and `flows` describe the kernels of the two passes.
"""
