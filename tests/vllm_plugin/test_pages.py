"""Pages of states: a head's memory of a sequence as a row of numbers, and sequences of all lengths advancing in them.

Nothing here needs vLLM.
"""

import dataclasses

import pytest
import torch
from operator_inputs import assert_near, random_inputs
from operator_states import assert_equal_states

from hf_rfa import UnsupportedModelError, rfa_attention
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.vllm import linear_heads
from hf_rfa.vllm.decoding import decodes_in_place
from hf_rfa.vllm.linear_heads import Step, advance
from hf_rfa.vllm.linear_part import LinearPart
from hf_rfa.vllm.pages import HeadPages, PageLayout
from hf_rfa.vllm.served_classes import name_server

CHANGE = torch.eye(8) + 0.1
OPTIONS = {
    "kept keys": {"kept_keys": 5},
    "none kept": {},
    "no sinks": {"sink_tokens": 0, "kept_keys": 3},
    "pure": {"window": 0, "sink_tokens": 0},
    "gate": {"gate_weight": torch.linspace(-0.3, 0.3, 16).view(2, 8), "gate_bias": torch.tensor([2.0, 5.0])},
    "two maps": {"feature_map": ("trigonometric", "hyperbolic"), "kept_keys": 4},
    "calibrated": {
        "gamma": torch.tensor([0.0, 3.0]), "query_center": torch.linspace(-1, 1, 16).view(2, 8),
        "key_center": torch.linspace(1, 0, 16).view(2, 8), "query_transform": CHANGE.repeat(2, 1, 1),
        "key_transform": torch.linalg.inv(CHANGE).mT.repeat(2, 1, 1), "query_radius": torch.tensor([2.0, 0.0]),
    },
}  # fmt: skip
CASES = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def prepared(options, dtype=torch.float32, length=60, seed=0):
    """q, k, v of one sequence, the operator's options, and the part whose pages hold its states."""
    inputs = random_inputs(length, batch=1, value_dim=8, dtype=dtype, seed=seed)
    options = {"omega": inputs.pop("omega"), "alpha": 0.6, "window": 8, "sink_tokens": 3, **options}
    kernel, settings, _ = operator_arguments(**inputs, **options)
    kept = options.get("kept_keys", 0)
    layout = PageLayout(kernel.num_components, 8, 8, settings.window, settings.sink_tokens, kept, 2, dtype)
    return inputs, options, LinearPart([0, 1], kernel, settings, layout)


def used_pages(layout, number):
    """Pages as sequences leave them: with anything in them, and longer than this head needs."""
    return [HeadPages(torch.full((number, layout.words + 6), torch.nan), layout) for _ in range(2)]


def flat(tokens):
    """q (N, Hk, G, D), k and v (N, Hk, D) of one sequence."""
    query, key, value = (tokens[name][0].movedim(1, 0) for name in ("query", "key", "value"))
    return query.unflatten(1, (2, -1)), key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CASES
def test_a_state_comes_back_from_its_pages(options, dtype):
    inputs, options, part = prepared(options, dtype)
    _, state = rfa_attention(**inputs, **options, output_final_state=True)
    pages = part.layout.pages(state)
    assert pages.shape == (1, 2, part.layout.words)
    assert_equal_states(part.layout.state(pages, [60]), state, 0)


@CASES
def test_an_empty_page_is_the_state_before_the_first_token(options):
    inputs, options, part = prepared(options)
    state = part.layout.state(part.layout.empty.expand(1, 2, -1), [0])
    assert_near(rfa_attention(**inputs, **options, initial_state=state), rfa_attention(**inputs, **options), 1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
@CASES
def test_sequences_that_come_and_go_are_each_as_if_alone(options, dtype, tolerance):
    """Nine sequences of unlike lengths, at most four at once, in pieces of unlike lengths, in pages used before."""
    lengths = [60, 1, 8, 23, 57, 2, 40, 16, 33]
    given = [prepared(options, dtype, length, seed) for seed, length in enumerate(lengths)]
    part = given[0][2]
    heads, free = used_pages(part.layout, 6), [[5, 0, 3, 1], [2, 4, 0, 1]]  # each head has its own places
    generator = torch.Generator().manual_seed(0)
    waiting, running, outputs = list(range(9)), {}, [[] for _ in range(9)]
    while waiting or running:
        while waiting and len(running) < 4:
            running[waiting.pop(0)] = [0, [own.pop() for own in free]]
        pieces = {row: int(torch.randint(1, 12, (), generator=generator)) for row in running}
        pieces = {row: 1 if piece > 7 else min(piece, lengths[row] - running[row][0]) for row, piece in pieces.items()}
        rows, sizes = list(pieces), list(pieces.values())
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        seen = [running[row][0] for row in rows]
        parts = [
            [x[count : count + size] for x in flat(given[row][0])]
            for row, size, count in zip(rows, sizes, seen, strict=True)
        ]
        tokens = tuple(torch.cat(x) for x in zip(*parts, strict=True))
        output = torch.zeros_like(tokens[0])
        places = [torch.tensor([running[row][1][head] for row in rows]) for head in range(2)]
        advance(part, tokens, output, Step(starts, sizes, seen), heads, places)
        for row, size, start in zip(rows, sizes, starts, strict=True):
            outputs[row].append(output[start : start + size])
            running[row][0] += size
            if running[row][0] == lengths[row]:
                for own, place in zip(free, running.pop(row)[1], strict=True):
                    own.append(place)
    for row, (inputs, of_row, _) in enumerate(given):
        alone = rfa_attention(**inputs, **of_row)[0].movedim(1, 0).unflatten(1, (2, -1))
        assert_near(torch.cat(outputs[row]).float(), alone.float(), tolerance, f"sequence {row}")


@CASES
def test_decoding_in_the_pages_is_the_operators_step(options, monkeypatch):
    inputs, options, part = prepared(options)
    tokens = flat(inputs)

    def pages_and_output():
        heads = used_pages(part.layout, 2)
        output, place = torch.zeros_like(tokens[0]), [torch.tensor([1])] * 2
        for start, size in ((0, 20), *((count, 1) for count in range(20, 60))):
            own = tuple(x[start : start + size] for x in tokens)
            advance(part, own, output[start : start + size], Step([0], [size], [start]), heads, place)
        pages = torch.stack([head.pages[1, : part.layout.words] for head in heads]).unsqueeze(0)
        return part.layout.state(pages, [60]), output

    inside = [decodes_in_place(part, count) for count in range(20, 60)]
    gate, window = "gate_weight" in options, options["window"]
    assert sum(inside) == (0 if gate or not window else 35)  # the others end a chunk
    state, output = pages_and_output()
    monkeypatch.setattr(linear_heads, "decodes_in_place", lambda part, count: False)
    want_state, want = pages_and_output()
    assert_near(output, want, 1e-5)
    assert_equal_states(state, want_state, 1e-5)


def test_all_pages_are_whole_words():
    layout = PageLayout(16, 5, 7, 3, 1, 1, 1, torch.bfloat16)
    for name, (shape, dtype, place) in layout.fields.items():
        assert (place.stop - place.start) * 4 >= torch.Size(shape).numel() * dtype.itemsize, name
    assert layout.words == len(layout.empty)


def test_a_config_names_the_model_that_serves_it():
    from transformers import Qwen3Config

    config = Qwen3Config(num_hidden_layers=2)
    name_server(config, "Qwen3ForCausalLM")
    assert config.architectures == ["RFAQwen3ForCausalLM"]
    assert "full_attention" not in config.layer_types  # vLLM would take it for a model of softmax only
    with pytest.raises(UnsupportedModelError, match=r"serves converted models of LlamaForCausalLM.*Got GPT2LMHead"):
        name_server(config, "GPT2LMHeadModel")
    local = Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(UnsupportedModelError, match=r"without a sliding window.*sliding_attention"):
        name_server(local, "Qwen3ForCausalLM")


def test_the_operators_dtype_is_not_that_of_the_pages():
    """Features and sums are float32 in the pages of a bfloat16 model."""
    _, _, part = prepared({"kept_keys": 5}, torch.bfloat16)
    types = {name: dtype for name, (_, dtype, _) in part.layout.fields.items()}
    assert types["kv_state"] == types["mass"] == torch.float32
    assert types["near_key"] == types["kept_value"] == torch.bfloat16
    half = dataclasses.replace(part.layout, dtype=torch.float32)
    assert part.layout.words < half.words
