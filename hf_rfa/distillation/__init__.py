"""Attention transfer: far kernels learn, layer by layer, from the softmax that they stand in for."""
