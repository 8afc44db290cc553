"""The operator's largest tensor grows like N, never like N x N, in the forward and in the backward pass."""

import pytest
import torch
from operator_inputs import random_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_rfa import rfa_attention
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.softmax import exact_attention

SHORT, LONG = 1024, 2048
HEADS = 2


class LargestTensor(TorchDispatchMode):
    """Records the largest storage, in numbers, that any operation returns while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                # The storage, not the shape: an expanded view of one row costs one row.
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        self.operations += 1
        return result


def largest(length: int, **options) -> tuple[int, int]:
    """The largest tensor of the forward and of the backward pass."""
    inputs = random_inputs(length, batch=1, heads=HEADS, key_heads=1, dtype=torch.float32)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    if options.pop("padded", False):
        options["token_mask"] = torch.arange(length)[None] >= 5
    if options.pop("packed", False):
        options["segment_ids"] = torch.arange(length)[None] // 300
    with LargestTensor() as forward:
        output = rfa_attention(**leaves, **options)
    with LargestTensor() as backward:
        output.square().sum().backward()
    assert forward.operations > 10  # the recorder is awake, in the backward pass too
    assert backward.operations > 10
    return forward.numel, backward.numel


def test_the_recorder_sees_a_quadratic_operation():
    leaf = torch.randn(1, HEADS, 64, 8, requires_grad=True)
    with LargestTensor() as forward:
        output = (leaf @ leaf.mT).softmax(-1) @ leaf
    with LargestTensor() as backward:
        output.sum().backward()
    assert forward.numel == backward.numel == HEADS * 64 * 64


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 16},
        {"window": 0},
        {"window": 16, "feature_map": "trigonometric"},
        {"window": 16, "padded": True},
        {"window": 16, "packed": True},
        {"window": 16, "kept_keys": 32},
        {"window": 16, "kept_keys": 32, "padded": True, "packed": True},
        {"window": 16, "padded": True, "softmax_heads": [0]},
        {"window": 16, "packed": True, "softmax_heads": [0]},
        {"window": 16, "softmax_heads": [0], "sliding_window": 64},
        {"window": 16, "softmax_heads": [0], "sink_logits": torch.zeros(HEADS)},
    ],
    ids=lambda options: "-".join(options) + (f"-{options['window']}" if len(options) == 1 else ""),
)
def test_no_tensor_is_quadratic(options, causal):
    if "sliding_window" in options and not causal:
        pytest.skip("sliding windows are causal")
    short = largest(SHORT, causal=causal, **options)
    long = largest(LONG, causal=causal, **options)
    for before, after in zip(short, long, strict=True):
        assert after < 2.2 * before  # linear would be 2, quadratic 4
        assert after < HEADS * LONG * LONG / 4
    if "softmax_heads" not in options:
        # An encoder asks a fixed number of queries, a sixteenth of these tokens, which far keys matter.
        assert max(long) <= HEADS * LONG * LONG / 16


def test_softmax_heads_without_a_mask_make_no_scores():
    # Causal SDPA without a mask: nothing larger than what goes in and comes out.
    assert max(largest(LONG, window=16, softmax_heads=[0])) <= HEADS * LONG * 8


@pytest.mark.parametrize("kept_keys", [0, 32])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_the_final_state_costs_nothing_quadratic(causal, kept_keys):
    options, sizes = {"window": 16, "causal": causal, "kept_keys": kept_keys}, []
    for length in (SHORT, LONG):
        inputs = random_inputs(length, batch=1, heads=HEADS, key_heads=1, dtype=torch.float32)
        with LargestTensor() as recorder:
            _, state = rfa_attention(**inputs, **options, output_final_state=True)
            rfa_attention(**inputs, **options, initial_state=state)
        sizes.append(recorder.numel)
    assert sizes[1] < 2.2 * sizes[0]


@pytest.mark.parametrize("options", [{}, {"padded": True}, {"packed": True}], ids=["past", "padded", "packed"])
def test_what_softmax_heads_keep_for_the_backward_pass_is_linear(options):
    kept = []
    for length in (SHORT, LONG):
        inputs = random_inputs(length, batch=1, heads=HEADS, key_heads=1, dtype=torch.float32)
        given = dict(options)
        if given.pop("padded", False):
            given["token_mask"] = torch.arange(length)[None] >= 5
        if given.pop("packed", False):
            given["segment_ids"] = torch.arange(length)[None] // 300
        if not options:
            _, given["initial_state"] = rfa_attention(**inputs, window=16, softmax_heads=[0], output_final_state=True)
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        saved = {}

        def keep(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rfa_attention(**leaves, window=16, softmax_heads=[0], **given)
        kept.append(sum(saved.values()))
    assert kept[1] < 2.2 * kept[0]
    assert kept[1] < LONG * LONG / 8


def test_a_token_after_many_copies_no_keys_of_softmax_heads():
    query, key = torch.randn(1, HEADS, 1, 8), torch.randn(1, 1, LONG, 8)
    with LargestTensor() as forward, torch.no_grad():
        exact_attention(query, key, key, scaling=1.0, causal=True, layout=TokenLayout())
    assert 0 < forward.numel < key.numel()
