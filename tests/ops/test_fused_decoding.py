"""Decoding in two launches a layer: against the definition, and nothing of it waits for the device.

As in `test_triton`, on a GPU where there is one, else in Triton's interpreter.
"""

import dataclasses

import pytest
import torch
from operator_inputs import FEATURE_MAPS, assert_near, random_inputs
from operator_states import assert_equal_states
from torch.utils._python_dispatch import TorchDispatchMode

import hf_rfa
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.combine import FarStatistics
from hf_rfa.ops.decode import Decoder
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.state import RFAState

pytest.importorskip("triton")
from test_triton import DEVICE, TOLERANCE, _one_precision, parameters  # noqa: F401

#: A window of 4 fills a chunk at 4, 8, ...; what is kept is chosen anew at each of them from 8 on.
OPTIONS = {"feature_map": "hyperbolic", "window": 4, "sink_tokens": 2, "alpha": 0.4, "kept_keys": 3}
N = 23


def small(length=N, **sizes):
    sizes = {"dim": 16, "value_dim": 12, "num_features": 4, "batch": 1, "heads": 2, "key_heads": 1} | sizes
    return random_inputs(length, dtype=torch.float32, **sizes)


def qkv(inputs, part):
    return [inputs[name][:, :, part] for name in ("query", "key", "value")]


def decoder_at(inputs, start, token_mask=None, backend="triton", **options):
    """A decoder behind the first tokens, which the chunked form reads."""
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    options = OPTIONS | options | {"omega": inputs["omega"]}
    options |= {name: x for name, x in inputs.items() if name not in ("query", "key", "value")}
    state = None
    if start:
        mask = None if token_mask is None else token_mask[:, :start].to(DEVICE)
        _, state = hf_rfa.rfa_attention(
            *qkv(inputs, slice(start)), **options, token_mask=mask, backend="chunked", output_final_state=True
        )
    kernel, settings, _ = operator_arguments(*qkv(inputs, slice(1)), **options, backend=backend)
    return Decoder(*qkv(inputs, slice(start, start + 1)), kernel, settings, state)


def decode(decoder, inputs, start, stop=N, token_mask=None, statistics=None):
    outputs = []
    for place in range(start, stop):
        part = slice(place, place + 1)
        layout = TokenLayout(None if token_mask is None else token_mask[:, part])
        tokens = [x.to(DEVICE) for x in qkv(inputs, part)]
        outputs.append(decoder.step(*tokens, layout, statistics))
    return torch.cat(outputs, dim=2)


def compare(inputs, start, tolerance=TOLERANCE, token_mask=None, **options):
    """Outputs and the last state, with those of the definition for the whole text."""
    decoder = decoder_at(inputs, start, token_mask, **options)
    assert decoder._fused is not None
    got = decode(decoder, inputs, start, token_mask=token_mask)
    wide = OPTIONS | options | {name: x.double() for name, x in inputs.items()}
    # The definition has no exact heads.
    definition = hf_rfa.rfa_attention if "softmax_heads" in options else hf_rfa.rfa_attention_reference
    want, state = definition(**wide, token_mask=token_mask, output_final_state=True)
    assert_near(got.cpu(), want[:, :, start:], tolerance)
    found = decoder.state()
    assert_equal_states(found.to(torch.device("cpu")), narrowed(state, found), tolerance)


def narrowed(state: RFAState, like: RFAState) -> RFAState:
    """The definition's state in the dtypes of another."""
    fields = (field.name for field in dataclasses.fields(RFAState) if field.name != "beside")
    pairs = ((name, getattr(state, name), getattr(like, name)) for name in fields)
    cast = {name: x.to(other.dtype) for name, x, other in pairs if isinstance(x, torch.Tensor)}
    beside = tuple(narrowed(x, other) for x, other in zip(state.beside, like.beside, strict=True))
    return dataclasses.replace(state, **cast, beside=beside)


@pytest.mark.parametrize("sinks", [False, True])
def test_the_limit_of_the_far_part(sinks):
    inputs = small(heads=4, key_heads=2) | {"gamma": torch.full((2,), 3.0)}
    if sinks:
        inputs["sink_logits"] = torch.linspace(-1, 1, 4)
    limit = torch.tensor([0.02, 0.0])
    compare(inputs, 9, far_limit=limit)
    free = hf_rfa.rfa_attention(**inputs, **OPTIONS)
    limited = hf_rfa.rfa_attention(**inputs, **OPTIONS, far_limit=limit)
    assert (free - limited)[:, :2, 9:].abs().max() > 1e-3  # it has something to do


@pytest.mark.parametrize("start", [0, 1, 7, 8, 13, 16])
def test_from_any_state_on(start):
    compare(small(), start)


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_every_map_with_all_its_parameters(feature_map):
    inputs = small(heads=4, key_heads=2, batch=2)
    compare(inputs | parameters(inputs, feature_map), 11, feature_map=feature_map)


@pytest.mark.parametrize("kept_keys", [0, 1, 30])
def test_numbers_of_kept_keys(kept_keys):
    compare(small(), 9, kept_keys=kept_keys)


def test_heads_of_two_maps_that_keep_different_numbers_with_learned_sinks():
    inputs = small(heads=6, key_heads=3) | {"sink_logits": torch.linspace(-1, 1, 6)}
    maps = ("trigonometric", "hyperbolic", "hyperbolic")
    compare(inputs, 10, feature_map=maps, kept_keys=(3, 0, 3), gamma=torch.tensor([1.0, 0.5, 0.0]))


def test_beside_exact_heads():
    inputs = small(heads=6, key_heads=3)
    compare(inputs, 10, softmax_heads=(1,))


@pytest.mark.parametrize("dim", [10, 40])
def test_sizes_that_are_no_powers_of_two(dim):
    compare(small(dim=dim, value_dim=24, num_features=5), 9, window=5, kept_keys=6)


def test_rows_of_different_lengths_and_padding():
    mask = torch.ones(3, N, dtype=torch.bool)
    mask[0, :5] = mask[1, :12] = mask[2, 15:17] = False
    compare(small(batch=3), 13, token_mask=mask)


def test_half_precision_differs_by_its_rounding():
    inputs = {name: x.half() if name != "omega" else x for name, x in small().items()}
    compare(inputs, 11, 0.005)


def test_the_choice_is_that_of_the_recurrent_form_on_ties_and_with_a_nan():
    inputs = small()
    inputs["value"] *= 0.0  # every score is 0: of equal ones the later key stays
    inputs["value"][0, 0, 9, 3] = torch.nan
    found = []
    for backend in ("triton", "chunked"):
        decoder = decoder_at(inputs, 6, backend=backend)
        decode(decoder, inputs, 6)
        found.append(decoder.state().kept_position.tolist())
    assert found[0] == found[1]


def test_states_continue_in_other_forms_and_never_change():
    inputs = small()
    decoder = decoder_at(inputs, 5)
    decode(decoder, inputs, 5, 14)
    state = decoder.state()
    before = state.map(torch.clone)
    decode(decoder, inputs, 14)
    assert_equal_states(state, before, 0)
    options = {**OPTIONS, "omega": inputs["omega"].to(DEVICE), "initial_state": state, "backend": "chunked"}
    rest = [x.to(DEVICE) for x in qkv(inputs, slice(14, N))]
    _, want = hf_rfa.rfa_attention(*rest, **options, output_final_state=True)
    assert_equal_states(decoder.state(), want, TOLERANCE)


def test_rows_can_be_chosen():
    inputs = small(batch=3)
    rows = torch.tensor([2, 0, 2])
    decoder = decoder_at(inputs, 7)
    decoder.select_rows(rows)
    chosen = {name: x[rows] if name != "omega" else x for name, x in inputs.items()}
    want = decode(decoder_at(inputs, 7, backend="chunked"), inputs, 7)[rows.to(DEVICE)]
    assert_near(decode(decoder, chosen, 7), want, TOLERANCE)


def test_dropped_far_parts_are_counted_as_the_recurrent_form_counts_them():
    inputs, counts = small(size=2.0), []
    for backend in ("triton", "chunked"):
        statistics = FarStatistics()
        decoder = decoder_at(inputs, 12, feature_map="trigonometric", alpha=1.0, backend=backend)
        decode(decoder, inputs, 12, statistics=statistics)
        counts.append(statistics.counts().tolist())
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


class Operations(TorchDispatchMode):
    """The names of PyTorch's operations inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_is_two_launches_and_waits_for_nothing(monkeypatch):
    """The same launches at every step, also at a chunk's end; besides, nothing but the output is made, and seen."""
    from hf_rfa.ops.triton import decoding

    launches = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def run(*tensors, **settings):
                with torch.utils._python_dispatch._disable_current_modes():
                    launches.append((self.kernel.__name__, grid, tuple(settings.items())))
                    return self.kernel[grid](*tensors, **settings)

            return run

    inputs = small()
    decoder = decoder_at(inputs, 6)
    for name in ("decode_step", "end_of_chunk"):
        monkeypatch.setattr(decoding, name, Counted(getattr(decoding, name)))
    tokens = [[x.to(DEVICE) for x in qkv(inputs, slice(place, place + 1))] for place in range(6, 13)]
    watched = Operations()
    with watched:
        for token in tokens:
            decoder.step(*token)
    assert len(launches) == 2 * 7
    assert len(set(launches)) == 2
    assert set(watched.names) <= {
        "slice",
        "view",
        "_unsafe_view",
        "unflatten",
        "new_empty",
        "empty",
        "detach",
        "alias",
    }


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    inputs = {name: x.cuda() for name, x in small().items()}
    decoder, plain = (decoder_at(inputs, 6) for _ in range(2))
    place = [x.clone() for x in qkv(inputs, slice(6, 7))]
    decoder.step(*place)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = decoder.step(*place)
    plain.step(*place)
    for number in range(7, N):
        for old, new in zip(place, qkv(inputs, slice(number, number + 1)), strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(output, plain.step(*place))
