"""The Triton kernels against the float64 definition: outputs, states and all gradients.

Where there is a GPU they run on it; elsewhere Triton's interpreter runs them on the CPU (see conftest.py).
"""

import os
import subprocess
import sys

import paths
import pytest
import torch
from operator_inputs import FEATURE_MAPS, assert_near, random_inputs, tokens, with_gradients

import hf_rfa

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-5  # float32 sums beside float64 ones
WINDOWS = {"window": {"window": 16, "sink_tokens": 3}, "pure": {"window": 0}}


@pytest.fixture(autouse=True)
def _one_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def small(length, **sizes):
    sizes = {"dim": 16, "value_dim": 16, "num_features": 8, "batch": 1, "dtype": torch.float32} | sizes
    return random_inputs(length, **sizes)


def parameters(inputs, feature_map, seed=0):
    """Everything that a calibrated far kernel has."""
    generator = torch.Generator().manual_seed(seed)
    heads, dim = inputs["key"].shape[1], inputs["key"].shape[-1]

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    omega = inputs["omega"]
    return {
        "omega": torch.cat([omega, omega.flip(2)], dim=1) if feature_map == "clustered" else omega,
        "alpha": 0.5 + 0.1 * draw(heads).abs(),
        "gamma": 0.5 + 0.1 * draw(heads).abs(),
        "query_center": 0.3 * draw(heads, dim),
        "key_center": 0.3 * draw(heads, dim),
        "query_transform": torch.eye(dim) + 0.1 * draw(heads, dim, dim),
        "key_transform": torch.eye(dim) + 0.1 * draw(heads, dim, dim),
        "query_radius": torch.full((heads,), dim**0.5),
        "key_radius": torch.full((heads,), dim**0.5),
    }


def compare(inputs, tolerance=TOLERANCE, **options):
    """Outputs and the gradients of all `inputs`, of the kernels and of the definition."""
    here = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    there = {name: tensor.double() for name, tensor in inputs.items()}
    placed = {name: o.to(DEVICE) if isinstance(o, torch.Tensor) else o for name, o in options.items()}
    got, got_gradients = with_gradients(hf_rfa.rfa_attention, here, backend="triton", **placed)
    want, want_gradients = with_gradients(hf_rfa.rfa_attention_reference, there, **options)
    assert_near(got.cpu(), want, tolerance)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name].cpu(), gradient, tolerance, name)


@pytest.mark.parametrize("near", WINDOWS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_every_map_with_all_its_parameters(feature_map, near):
    # Of ordinary tokens, sines and cosines alone may leave next to nothing to divide by.
    inputs = small(50, size=0.4 if feature_map == "trigonometric" and near == "pure" else 1.0)
    inputs |= parameters(inputs, feature_map)
    if near == "pure":  # it cancels there: its gradient is nothing but rounding
        del inputs["gamma"]
    compare(inputs, feature_map=feature_map, **WINDOWS[near])


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100])
def test_lengths(length):
    # One token alone is a decoding step, which is never the kernels'; two documents make it theirs.
    segment_ids = torch.zeros(1, length, dtype=torch.int64)
    compare(small(length), feature_map="hyperbolic", window=64, sink_tokens=4, alpha=0.4, segment_ids=segment_ids)


def test_several_blocks_of_chunks():
    inputs = small(330, heads=2, key_heads=1)
    compare(inputs, feature_map="hyperbolic", window=16, sink_tokens=3, alpha=0.4)


@pytest.mark.parametrize(("dim", "value_dim", "heads", "key_heads"), [(32, 48, 2, 2), (64, 16, 4, 1), (10, 6, 6, 2)])
def test_head_dims_and_shared_key_heads(dim, value_dim, heads, key_heads):
    inputs = small(40, dim=dim, value_dim=value_dim, heads=heads, key_heads=key_heads)
    compare(inputs, feature_map="hyperbolic", window=16, sink_tokens=3, alpha=0.4)


@pytest.mark.parametrize("near", WINDOWS)
def test_padding_and_packed_documents(near):
    token_mask = torch.ones(2, 70, dtype=torch.bool)
    token_mask[0, :11] = token_mask[1, 40:43] = False
    segment_ids = (torch.arange(70) >= torch.tensor([[25], [37]])).long()
    options = {"token_mask": token_mask, "segment_ids": segment_ids, "alpha": 0.4}
    compare(small(70, batch=2), feature_map="hyperbolic", **options, **WINDOWS[near])


def test_heads_of_two_maps_and_learned_sinks():
    inputs = small(50) | {"sink_logits": torch.tensor([0.3, -0.2, 1.0, 0.5])}
    maps = ("trigonometric", "hyperbolic")
    compare(inputs, feature_map=maps, window=16, sink_tokens=3, alpha=0.4, gamma=torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("near", WINDOWS)
def test_pieces_equal_the_whole_with_gradients_through_the_state(near):
    inputs = small(75)

    def in_pieces(**given):
        outputs, state = [], None
        for part in (slice(0, 21), slice(21, 48), slice(48, 75)):
            options = {"feature_map": "hyperbolic", "alpha": 0.4, "backend": "triton", "initial_state": state}
            got = hf_rfa.rfa_attention(**tokens(given, part), output_final_state=True, **options, **WINDOWS[near])
            outputs.append(got[0])
            state = got[1]
        return torch.cat(outputs, dim=2)

    here = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    got, got_gradients = with_gradients(in_pieces, here)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    options = {"feature_map": "hyperbolic", "alpha": 0.4, **WINDOWS[near]}
    want, want_gradients = with_gradients(hf_rfa.rfa_attention_reference, wide, **options)
    assert_near(got.cpu(), want, TOLERANCE)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name].cpu(), gradient, TOLERANCE, name)


def test_its_state_is_that_of_the_chunked_form():
    inputs = {name: tensor.to(DEVICE) for name, tensor in small(45).items()}
    options = {"feature_map": "hyperbolic", "alpha": 0.4, "output_final_state": True, **WINDOWS["window"]}
    _, got = hf_rfa.rfa_attention(**inputs, backend="triton", **options)
    _, want = hf_rfa.rfa_attention(**inputs, backend="chunked", **options)
    sums = [state.kv_state * state.log_max.exp()[..., None, None] for state in (got, want)]
    assert_near(sums[0], sums[1], TOLERANCE)
    for name in ("near_key", "near_value", "sink_key", "sink_value", "count"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


# The interpreter multiplies the bits of bfloat16 as if they were integers: these need a GPU.
ON_A_GPU = (pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_definition_takes_and_gives_tensors_of_a_gpu():
    inputs = {name: tensor.to(DEVICE) for name, tensor in small(40).items()}
    options = {"window": 8, "sink_tokens": 2, "kept_keys": 3, "output_final_state": True}
    output, state = hf_rfa.rfa_attention_reference(**inputs, **options)
    assert output.device == state.kv_state.device == inputs["query"].device
    want, _ = hf_rfa.rfa_attention_reference(**{name: tensor.cpu() for name, tensor in inputs.items()}, **options)
    assert torch.equal(output.cpu(), want)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [pytest.param(torch.bfloat16, 0.03, marks=ON_A_GPU), (torch.float16, 0.005)]
)
def test_narrow_types_differ_by_their_rounding(dtype, tolerance):
    inputs = {name: tensor.to(dtype) if name != "omega" else tensor for name, tensor in small(50).items()}
    compare(inputs, tolerance, feature_map="hyperbolic", window=16, sink_tokens=3, alpha=0.4)


@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ("--kept_keys 0", 10),
        ("--kept_keys 128", 14),
        ("--kept_keys 300 --window 16 --head_dim 96", 14),
        ("--window 0 --head_dim 64 --feature_map trigonometric --dtype float32", 10),
        ("--kept_keys 128 --decode", 2),
    ],
)
def test_the_kernels_compile_for_a_gpu_that_is_not_there(options, kernels):
    """The interpreter lets pass what the compiler refuses, and does not count shared memory."""
    script = paths.SCRIPTS / "triton_resources.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, *options.split()]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:-1] for line in printed.stdout.splitlines()[2:]]
    assert len(rows) == kernels
    assert all(float(row[4]) <= 227 for row in rows)  # KiB that a program may have on an H100
    assert all(int(row[5]) >= 1 for row in rows)


def test_dropped_far_parts_are_counted_as_the_chunked_form_counts_them():
    inputs = {name: tensor.to(DEVICE) for name, tensor in small(90, size=2.0).items()}
    counts = []
    for backend in ("triton", "chunked"):
        statistics = hf_rfa.ops.combine.FarStatistics()
        options = {"feature_map": "trigonometric", "backend": backend, "statistics": statistics}
        hf_rfa.rfa_attention(**inputs, **options, **WINDOWS["window"])
        counts.append(statistics.counts().tolist())
    assert counts[0] == counts[1]
    assert counts[0][0] > 0
