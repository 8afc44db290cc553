"""Kept keys with everything at once, drawn at random: every form against the definition. Each seed is one combination.

What makes a choice fail is rarely one option alone: a row that begins a document where its neighbour goes on, a token
of padding that is decoded, a window shorter than the distance from which queries count.
"""

import random

import pytest
import torch
from operator_inputs import FEATURE_MAPS, assert_near, random_inputs, tokens, with_gradients
from operator_states import assert_equal_states, run_in_pieces

from hf_rfa import rfa_attention, rfa_attention_reference
from hf_rfa.calibration.parts import parts_of
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.combine import Part, combine
from hf_rfa.ops.decode import Decoder
from hf_rfa.ops.layout import TokenLayout


def random_call(seed):
    """Inputs, options and per-token options of a call; lengths of pieces of it."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    window, heads, groups, dim = rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 12, 16]), *rng.choices([1, 2, 3], k=2), 4
    batch, length = rng.choice([1, 2, 3]), rng.randint(2, 9 * window)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = random_inputs(
        length, batch=batch, heads=heads * groups, key_heads=heads, dim=dim, value_dim=rng.choice([1, 3, 8]),
        size=rng.choice([0.3, 1.0, 2.0]), seed=seed,
    )  # fmt: skip
    if rng.random() < 0.4:
        inputs["sink_logits"] = draw(heads * groups)
    if rng.random() < 0.4:
        inputs |= {"gate_weight": 0.5 * draw(heads, dim), "gate_bias": draw(heads) + 2}
    if rng.random() < 0.3:
        inputs |= {"query_center": 0.3 * draw(heads, dim), "key_center": 0.3 * draw(heads, dim)}
    inputs["alpha"] = draw(heads).abs().clamp_max(1) * rng.choice([0, 1])
    options = {
        "window": window, "sink_tokens": rng.choice([0, 1, window // 2, window]), "kept_keys": rng.randint(1, 50),
        "feature_map": rng.choice(FEATURE_MAPS),
    }  # fmt: skip
    # A head whose far part is switched off stays so: there gamma has no gradient, whatever the definition has.
    gamma = rng.choice([0.0, draw(heads).abs()])
    (inputs if isinstance(gamma, torch.Tensor) else options)["gamma"] = gamma
    if rng.random() < 0.5:  # a constant of the backward pass, so no input; 0 is none
        options["far_limit"] = torch.tensor(rng.choices([0.0, 0.02, 0.2, 1.0], k=heads), dtype=torch.float64)
    layout = {}
    if rng.random() < 0.5:
        layout["token_mask"] = torch.rand(batch, length, generator=generator) > rng.choice([0.1, 0.5])
    if rng.random() < 0.4:
        starts = torch.rand(batch, length, generator=generator) < rng.choice([0.02, 0.1])
        layout["segment_ids"] = starts.long().cumsum(1)
    pieces = []
    while sum(pieces) < length:
        pieces.append(min(length - sum(pieces), rng.choice([1, 1, rng.randint(1, 3 * window + 2)])))
    return inputs, options, layout, pieces


@pytest.mark.parametrize("seed", range(40))
def test_every_form_equals_the_definition(seed):
    inputs, options, layout, pieces = random_call(seed)
    _, want = with_gradients(rfa_attention_reference, inputs, **options, **layout)
    _, got = with_gradients(rfa_attention, inputs, **options, **layout)
    for name, gradient in want.items():
        assert_near(got[name], gradient, 1e-9, name)
    want, final = rfa_attention_reference(**inputs, **options, **layout, output_final_state=True)
    got, state = rfa_attention(**inputs, **options, **layout, output_final_state=True)
    assert_near(got, want, 1e-10)
    assert_equal_states(state, final, 1e-10)
    if "segment_ids" in layout:  # pieces go on with a row's last document, whatever its number
        want, final = run_in_pieces(inputs, pieces, rfa_attention_reference, **options, **layout)
    got, state = run_in_pieces(inputs, pieces, **options, **layout)
    assert_near(got, want, 1e-10)
    assert_equal_states(state, final, 1e-10)


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_decode_at_paces_of_their_own_and_are_selected(seed):
    # Rows of a batch that are padded at single tokens, and replaced by others as beams are.
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    inputs = random_inputs(70, batch=3, seed=seed)
    gate = {"gate_weight": 0.4 * torch.randn(2, 8, generator=generator).double(), "gate_bias": torch.ones(2).double()}
    options = {
        "window": rng.choice([2, 3, 8]), "sink_tokens": rng.choice([0, 1]), "kept_keys": rng.choice([1, 3, 20]),
        "alpha": 0.5, **rng.choice([gate, {}]),
    }  # fmt: skip
    token_mask, start = torch.rand(3, 70, generator=generator) > 0.3, rng.randint(1, 30)
    kernel, settings, _ = operator_arguments(**inputs, **options)
    _, state = rfa_attention(
        **tokens(inputs, slice(start)), **options, token_mask=token_mask[:, :start], output_final_state=True
    )
    rows = torch.arange(3)[:, None].expand(3, start).clone()  # of each row so far: which token it took
    decoder = None
    for number in range(start, 70):
        new = torch.tensor([rng.randrange(3) for _ in range(3)])
        query, key, value = (inputs[name][new, :, number : number + 1] for name in ("query", "key", "value"))
        if decoder is None:
            decoder = Decoder(query, key, value, kernel, settings, state)
        if rng.random() < 0.2:
            chosen = torch.tensor([rng.randrange(3) for _ in range(3)])
            decoder.select_rows(chosen)
            rows = rows[chosen]
        output = decoder.step(query, key, value, TokenLayout(token_mask[new, number : number + 1]))
        rows = torch.cat([rows, new[:, None]], dim=1)
    places = torch.arange(70).expand(3, -1)
    whole = {name: inputs[name][rows, :, places].transpose(1, 2) for name in ("query", "key", "value")}
    options |= {"omega": inputs["omega"], "token_mask": token_mask[rows, places]}
    want, final = rfa_attention(**whole, **options, output_final_state=True)
    assert_near(output, want[:, :, -1:], 1e-11)
    assert_equal_states(decoder.state(), final)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pieces", [[133, 67, 100], [133, *[1] * 167]], ids=["chunks", "tokens"])
def test_half_precision_chooses_alike_in_pieces(dtype, pieces):
    # Keys are remembered as they came, so that nothing is rounded a second time: masses are float32 on both ways.
    inputs, options = random_inputs(300, dtype=dtype), {"window": 8, "sink_tokens": 3, "kept_keys": 12, "alpha": 0.6}
    whole, final = rfa_attention(**inputs, **options, output_final_state=True)
    output, state = run_in_pieces(inputs, pieces, **options)
    assert torch.equal(state.kept_position, final.kept_position)
    assert torch.equal(state.kept_key, final.kept_key)
    assert torch.equal(state.kept_value, final.kept_value)
    assert_near(state.mass, final.mass, 1e-5)
    assert_near(output.float(), whole.float(), 2 * torch.finfo(dtype).eps)
    want, exact = rfa_attention_reference(**inputs, **options, output_final_state=True)
    assert torch.equal(final.kept_position, exact.kept_position)
    assert_near(whole.double(), want, torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x | {"query": 8 * x["query"], "key": 8 * x["key"]},
        lambda x: x | {"key": x["key"][:, :, :1].expand_as(x["key"]).clone()},
        lambda x: x | {"query": 0 * x["query"], "key": 0 * x["key"], "value": x["value"].sign()},
        lambda x: x | {"value": 0 * x["value"]},
    ],
    ids=["logits of 200", "equal keys", "zeros", "no values"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_unusual_inputs(change, dtype):
    inputs = change(random_inputs(100, dtype=dtype))
    options, tolerance = {"window": 8, "kept_keys": 10}, 1e-11 if dtype == torch.float64 else 1e-4
    want, final = rfa_attention_reference(**inputs, **options, output_final_state=True)
    for pieces in ([100], [41, 59], [1] * 100):
        got, state = run_in_pieces(inputs, pieces, **options)
        assert_near(got.double(), want, tolerance)
        assert torch.equal(state.kept_position, final.kept_position)


def test_masses_of_a_long_text_in_float32():
    inputs, options = random_inputs(5000, batch=1), {"window": 4, "sink_tokens": 2, "kept_keys": 6, "alpha": 0.5}
    want, final = rfa_attention(**inputs, **options, output_final_state=True)
    got, state = rfa_attention(**{name: x.float() for name, x in inputs.items()}, **options, output_final_state=True)
    assert torch.equal(state.kept_position, final.kept_position)
    assert float(final.kept_position.min()) < 4500  # some have been there for long
    assert_near(state.mass.double(), final.mass, 1e-5)
    assert_near(got.double(), want, 1e-5)


def test_the_backward_pass_uses_the_choice_of_the_forward():
    inputs, options = random_inputs(90), {"window": 8, "kept_keys": 6, "alpha": 0.5}
    want, gradients = with_gradients(rfa_attention, inputs, **options)

    def again(**leaves):
        return torch.utils.checkpoint.checkpoint(lambda: rfa_attention(**leaves, **options), use_reentrant=False)

    got, found = with_gradients(again, inputs)
    assert torch.equal(got, want)
    for name, gradient in gradients.items():
        assert torch.equal(found[name], gradient), name


def test_kept_keys_belong_to_the_near_part_that_calibration_sees():
    inputs, options = random_inputs(90), {"window": 8, "sink_tokens": 3, "kept_keys": 20, "alpha": 0.5, "gamma": 0.7}
    kernel, settings, layout = operator_arguments(**inputs, **options)
    call = OperatorCall.of(inputs["query"], inputs["key"], inputs["value"], kernel, settings, layout)
    key_heads = inputs["key"].shape[1]
    want = rfa_attention(**inputs, **options).unflatten(1, (key_heads, -1))
    for every in (1, 4):
        parts = parts_of(call, every)
        blocks = [(far.clone(), log) for _, far, log in parts.far(kernel)]
        far, log = (torch.cat(x, dim=1) for x in zip(*blocks, strict=True))
        far = Part(far[..., :-1], far[..., -1], log + kernel.gamma.log().repeat(len(want))[:, None, None])
        joined = combine(Part(parts.near, torch.ones_like(parts.near_log), parts.near_log), far)
        asked = parts.asked.repeat(1, 1, want.shape[2]).expand(joined.shape[:3])
        assert asked.sum() == want[..., 0].numel() if every == 1 else asked.any()
        assert_near(joined[asked], parts.rows(want)[asked], 1e-12)
    everything = settings.replace(kept_keys=90)  # then all keys are near
    parts = parts_of(OperatorCall.of(*(inputs[n] for n in ("query", "key", "value")), kernel, everything, layout), 1)
    keys = (inputs[name].repeat_interleave(2, 1) for name in ("key", "value"))
    softmax = torch.nn.functional.scaled_dot_product_attention(inputs["query"], *keys, is_causal=True)
    asked = parts.asked.repeat(1, 1, want.shape[2]).expand(parts.near_log.shape)
    assert_near(parts.near[asked], parts.rows(softmax.unflatten(1, (key_heads, -1)))[asked], 1e-12)


def test_a_state_is_copied_moved_selected_and_saved_with_what_it_keeps(tmp_path):
    inputs, options = random_inputs(60), {"window": 8, "kept_keys": 6}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    _, state = rfa_attention(**leaves, **options, output_final_state=True)
    _, bare = rfa_attention(**leaves, window=8, output_final_state=True)
    # K keys, values, positions and decays, and the masses of K + 2C keys from 2 query heads, of 2 x 2 key heads, 8
    # bytes each.
    assert state.nbytes - bare.nbytes == 4 * 8 * (6 * (8 + 6 + 2) + 2 * (6 + 2 * 8))
    detached = state.detach()
    assert not any(x.requires_grad for x in detached._tensors().values())
    torch.save(detached.to_dict(), tmp_path / "state.pt")
    loaded = type(state).from_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    twice = type(state).cat([loaded, loaded]).select_rows(torch.tensor([3, 0]))
    for other in (
        loaded,
        state.to(torch.device("cpu")),
        state.map(torch.clone),
        twice.select_rows(torch.tensor([1, 0])),
    ):
        assert_equal_states(other, state, 0.0)
