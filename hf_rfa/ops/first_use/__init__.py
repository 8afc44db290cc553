"""Whether a GPU's Triton kernels are right and fast enough to be used unasked: tried at first use, and remembered.

`kind` says what a verdict holds for, `problems` and `check` come to it, `verdicts` keeps it on disk, and `decision`
answers a call.
"""
