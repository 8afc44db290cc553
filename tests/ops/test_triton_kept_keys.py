"""Layers that keep keys, computed by the Triton kernels: against the definition, and in what they keep.

As in `test_triton`, on a GPU where there is one, else in Triton's interpreter.
"""

import pytest
import torch
from operator_inputs import assert_near, with_gradients
from operator_states import run_in_pieces, true_sums

import hf_rfa

pytest.importorskip("triton")
from test_triton import DEVICE, TOLERANCE, _one_precision, compare, parameters, small  # noqa: F401

from hf_rfa.ops.triton import kept, launch_exact

OPTIONS = {"feature_map": "hyperbolic", "window": 8, "sink_tokens": 3, "alpha": 0.4}


def on_device(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def assert_same_choice(got, want):
    """States that keep the same tokens, whose attention, keys and sums are those of the definition."""
    for one, two in zip((got, *got.beside), (want, *want.beside), strict=True):
        assert torch.equal(one.kept_position.cpu(), two.kept_position)
        assert_near(true_sums(one).cpu(), true_sums(two), TOLERANCE, "sums")
        for name in ("kept_key", "kept_value", "mass", "near_key", "near_value", "sink_key", "sink_value"):
            assert_near(getattr(one, name).cpu(), getattr(two, name), TOLERANCE, name)


#: Fewer keys than a chunk has, and more than there are.
@pytest.mark.parametrize("kept_keys", [3, 40])
def test_everything_that_a_calibrated_layer_has(kept_keys):
    inputs = small(45, value_dim=12, heads=4, key_heads=2)
    inputs |= parameters(inputs, "hyperbolic") | {"sink_logits": torch.tensor([0.3, -0.2, 1.0, 0.5])}
    compare(inputs, feature_map="hyperbolic", window=8, sink_tokens=3, kept_keys=kept_keys)


@pytest.mark.parametrize("feature_map", ["trigonometric", "clustered"])
def test_maps_of_other_forms(feature_map):
    inputs = small(36, heads=1, key_heads=1)
    if feature_map == "clustered":
        inputs["omega"] = torch.cat([inputs["omega"], inputs["omega"].flip(2)], dim=1)
    compare(inputs, **{**OPTIONS, "feature_map": feature_map, "kept_keys": 4})


def test_lists_of_several_tiles_in_several_blocks(monkeypatch):
    for module in (kept, launch_exact):
        monkeypatch.setattr(module, "LIST_TILE", 16)
    monkeypatch.setattr("hf_rfa.ops.triton.causal._processors", lambda device: 1)
    compare(small(90, heads=1, key_heads=1), **OPTIONS, kept_keys=30)


def test_each_head_keeps_a_number_of_its_own():
    inputs = small(45, heads=3, key_heads=3)
    options = {**OPTIONS, "kept_keys": (5, 0, 5)}
    compare(inputs, **options)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    _, got = hf_rfa.rfa_attention(**on_device(inputs), **options, backend="triton", output_final_state=True)
    _, want = hf_rfa.rfa_attention_reference(**wide, **options, output_final_state=True)
    assert got.kept_key is None
    assert torch.equal(got.beside[0].kept_position.cpu(), want.beside[0].kept_position)


def test_heads_with_different_numbers_are_computed_together(monkeypatch):
    """One launch for a layer, whose heads come in any order; tiles that some of them leave empty are passed over."""
    for module in (kept, launch_exact):
        monkeypatch.setattr(module, "LIST_TILE", 16)
    launches, choose_keys = [], kept.choose_keys
    monkeypatch.setattr(
        "hf_rfa.ops.triton.causal.choose_keys", lambda *given: launches.append(1) or choose_keys(*given)
    )
    inputs = small(75, heads=4, key_heads=4)
    options = {**OPTIONS, "kept_keys": (20, 0, 5, 20)}
    compare(inputs, **options)
    launches.clear()
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    _, got = hf_rfa.rfa_attention(**on_device(inputs), **options, backend="triton", output_final_state=True)
    assert len(launches) == 1
    _, want = hf_rfa.rfa_attention_reference(**wide, **options, output_final_state=True)
    assert got.kept_key is None
    assert [state.kept_key.shape[1:3] for state in got.beside] == [(1, 5), (2, 20)]
    for one, two in zip(got.beside, want.beside, strict=True):
        assert_same_choice(one, two)


def test_a_head_without_kept_keys_keeps_none_whatever_the_scores_of_its_neighbours():
    """Scores grow with the values, and have no bound."""
    inputs = small(26, heads=2, key_heads=2)
    inputs["value"] *= 100
    compare(inputs, **OPTIONS, kept_keys=(3, 0))


def test_a_state_of_heads_with_different_numbers_is_continued():
    inputs = small(70, heads=4, key_heads=4)
    options = {**OPTIONS, "kept_keys": (12, 3, 0, 12)}
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    want, of_whole = hf_rfa.rfa_attention_reference(**wide, **options, output_final_state=True)
    got, state = run_in_pieces(on_device(inputs), [33, 20, 17], **options, backend="triton")
    assert_near(got.cpu(), want, TOLERANCE, "output")
    for one, two in zip(state.beside, of_whole.beside, strict=True):
        assert_same_choice(one, two)
    with pytest.raises(hf_rfa.ConfigError, match="initial_state"):
        run_in_pieces(
            on_device(inputs), [70], state=state, **options | {"kept_keys": (12, 4, 0, 12)}, backend="triton"
        )


def test_padding_and_packed_documents():
    token_mask = torch.ones(2, 64, dtype=torch.bool)
    token_mask[0, :5] = token_mask[1, 40:43] = False
    segment_ids = (torch.arange(64) >= torch.tensor([[34], [29]])).long()
    inputs = small(64, batch=2, heads=2, key_heads=1)
    options = {**OPTIONS, "kept_keys": 5, "token_mask": token_mask, "segment_ids": segment_ids}
    compare(inputs, **options)
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    laid_out = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    _, got = hf_rfa.rfa_attention(**on_device(inputs), **laid_out, backend="triton", output_final_state=True)
    _, want = hf_rfa.rfa_attention_reference(**wide, **options, output_final_state=True)
    assert_same_choice(got, want)


def test_pieces_equal_the_whole_with_gradients_through_the_state():
    inputs = small(66, heads=2, key_heads=1)
    options = {**OPTIONS, "kept_keys": 5}
    states = []

    def in_pieces(**given):
        output, state = run_in_pieces(given, [19, 8, 39], **options, backend="triton")
        states.append(state)
        return output

    got, got_gradients = with_gradients(in_pieces, on_device(inputs))
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    want, want_gradients = with_gradients(hf_rfa.rfa_attention_reference, wide, **options)
    assert_near(got.cpu(), want, TOLERANCE)
    for name, gradient in want_gradients.items():
        assert_near(got_gradients[name].cpu(), gradient, TOLERANCE, name)
    _, final = hf_rfa.rfa_attention_reference(**wide, **options, output_final_state=True)
    assert_same_choice(states[0].detach(), final)


def test_rows_that_continue_states_of_different_lengths():
    inputs, options = small(60, batch=2, heads=1, key_heads=1), {**OPTIONS, "kept_keys": 5}
    token_mask = torch.ones(2, 60, dtype=torch.bool)
    token_mask[0, :14] = token_mask[1, 33:] = False
    wide = {name: tensor.double() for name, tensor in inputs.items()}
    want, final = hf_rfa.rfa_attention_reference(**wide, **options, token_mask=token_mask, output_final_state=True)
    mask = token_mask.to(DEVICE)
    got, state = run_in_pieces(on_device(inputs), [30, 30], **options, token_mask=mask, backend="triton")
    assert_near(got.cpu(), want, TOLERANCE)
    assert_same_choice(state, final)


def kept_of(inputs, backend):
    """The positions that are kept after a call."""
    options = {**OPTIONS, "kept_keys": 5, "output_final_state": True, "backend": backend}
    return hf_rfa.rfa_attention(**on_device(inputs), **options)[1].kept_position.tolist()


def test_of_equal_scores_the_later_key_stays():
    inputs = small(43, heads=1, key_heads=1)
    inputs["value"] *= 0.0  # every score is 0
    assert kept_of(inputs, "triton") == [[list(range(27, 32))]] == kept_of(inputs, "chunked")


def test_a_nan_loses_to_all_others():
    inputs = small(43, heads=1, key_heads=1)
    whole = kept_of(inputs, "triton")
    victim = whole[0][0][2]
    inputs["value"][0, 0, victim, 4] = torch.nan
    got = kept_of(inputs, "triton")
    assert victim not in got[0][0]
    assert got == kept_of(inputs, "chunked")


def test_half_precision_differs_by_its_rounding():
    inputs = small(45, heads=2, key_heads=1)
    inputs = {name: tensor.half() if name != "omega" else tensor for name, tensor in inputs.items()}
    compare(inputs, 0.005, **OPTIONS, kept_keys=5)


def test_dropped_far_parts_are_counted_as_the_chunked_form_counts_them():
    inputs, counts = on_device(small(70, size=2.0, heads=1, key_heads=1)), []
    for backend in ("triton", "chunked"):
        statistics = hf_rfa.ops.combine.FarStatistics()
        options = {**OPTIONS, "feature_map": "trigonometric", "kept_keys": 5, "alpha": 1.0}
        hf_rfa.rfa_attention(**inputs, **options, backend=backend, statistics=statistics)
        counts.append(statistics.counts().tolist())
    assert counts[0] == counts[1]
    assert counts[0][0] > 0
