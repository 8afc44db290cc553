"""The causal operator in Triton kernels, forwards and backwards: features never touch the memory of the device.

See `causal` for the way that a call takes, `forward` and `flows` for the kernels of both passes.
"""
