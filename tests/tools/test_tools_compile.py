"""`torch.compile(fullgraph=True)` and `torch.export` around whole converted models: the same numbers from one graph.

The operator alone is in test_graph.py. The default run stops before code is generated ("aot_eager"); `-m slow` runs
Inductor, which needs a C++ compiler.
"""

import functools
import shutil

import pytest
import torch
import transformers
from conversions import converted
from families import SHORT, build, inputs_for, outputs_of, token_ids
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import hf_rfa

FORWARD = ["llama", "gpt2", "gemma3", "gpt_oss", "deepseek_v3", "bert", "modernbert", "vit"]
GENERATE = ["llama", "gemma3", "gpt_oss"]
EXACT_HEAD = {"softmax_heads": [(1, 0)]}
KEEPING = {"kept_keys": 3}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compiled(model, backend="aot_eager"):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize(
    ("family", "changes"), [*((family, {}) for family in FORWARD), ("llama", KEEPING), ("gpt_oss", KEEPING)], ids=str
)
def test_a_forward_is_one_graph(family, changes):
    model = converted(family, **changes)
    inputs = inputs_for(model)
    function, counter = compiled(model)
    with torch.no_grad():
        assert_close(function(**inputs)[0], outputs_of(model, inputs), atol=2e-5, rtol=0)
        function(**inputs)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bert"])
def test_padding_needs_no_graph_of_its_own_for_each_mask(family):
    model, ids = converted(family), token_ids()
    more = {} if family == "bert" else {"use_cache": False}
    function, counter = compiled(model)
    for padding in (23, 5, 40):
        mask = (torch.arange(70) >= torch.tensor([[padding], [0]])).long()
        inputs = {"input_ids": ids, "attention_mask": mask, **more}
        with torch.no_grad():
            got, want = function(**inputs)[0], outputs_of(model, inputs)
        assert_close(got[mask.bool()], want[mask.bool()], atol=2e-5, rtol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_packed_documents_stay_apart_in_every_layer(family):
    model, ids = converted(family), token_ids(1)
    positions = torch.cat([torch.arange(40), torch.arange(30)])[None]
    function, _ = compiled(model)
    with torch.no_grad():
        packed = function(input_ids=ids, position_ids=positions, use_cache=False).logits
    apart = [outputs_of(model, {"input_ids": part, "use_cache": False}) for part in (ids[:, :40], ids[:, 40:])]
    assert_close(packed, torch.cat(apart, dim=1), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes"), [*((family, {}) for family in ("llama", "gpt_oss", "bert")), ("llama", KEEPING)], ids=str
)
def test_gradients_of_a_compiled_model(family, changes):
    if family == "gpt_oss" and transformers.__version__.startswith("5.17."):
        pytest.skip("the experts of this Transformers do not compile with gradients, converted or not")
    model = converted(family, **changes)
    inputs = inputs_for(model)
    function, counter = compiled(model)
    gradients = []
    for call in (model, function):
        model.zero_grad()
        call(**inputs)[0].square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        assert_close(gradients[1][name], want, atol=1e-5, rtol=1e-3, msg=name)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("family", "changes"), [*((family, {}) for family in GENERATE), ("llama", EXACT_HEAD), ("llama", KEEPING)], ids=str
)
def test_generation_through_a_compiled_forward_recompiles_nothing(family, changes):
    model, ids = converted(family, **changes), token_ids()
    options = {"do_sample": False, "max_new_tokens": 12}  # a chunk has 8
    want = [model.generate(ids[:, :length], **options) for length in (50, 61, 70)]
    function, counter = compiled(model.forward)
    model.forward = function
    got = [model.generate(ids[:, :50], **options)]
    # A prompt, a step; exact heads and local layers have keys for each token, whose number becomes a symbol.
    assert counter.frame_count == (2 if family == "llama" and changes != EXACT_HEAD else 3)
    got.append(model.generate(ids[:, :61], **options))  # the prompt's length becomes a symbol
    settled = counter.frame_count
    got.append(model.generate(ids, **options))
    assert counter.frame_count == settled <= 5
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bert", "vit"])
def test_an_exported_model_gives_what_the_model_gives(family):
    model = converted(family)
    inputs = inputs_for(model)
    main = inputs.pop(model.main_input_name)
    with torch.no_grad():
        program = torch.export.export(model, (main,), inputs)
        other = main.flip(1)
        want = outputs_of(model, {model.main_input_name: other, **inputs})
        assert_close(program.module()(other, **inputs)[0], want, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bert"])
def test_generated_code_gives_the_same_outputs_and_tokens(family):
    model = converted(family)
    inputs = inputs_for(model)
    function, counter = compiled(model, "inductor")
    with torch.no_grad():
        assert_close(function(**inputs)[0], outputs_of(model, inputs), atol=2e-4, rtol=0)
    function(**inputs)[0].square().mean().backward()
    assert counter.frame_count <= 2  # with and without gradients
    if model.can_generate():
        want = model.generate(token_ids(), do_sample=False, max_new_tokens=12)
        model.forward, _ = compiled(model.forward, "inductor")
        assert torch.equal(model.generate(token_ids(), do_sample=False, max_new_tokens=12), want)


# --- compiled first, converted after ---------------------------------------------------------------------------------

WAYS = ["model.compile()", "torch.compile(model)", "layers compiled", "an inner model compiled"]


def compiled_first(way, **options):
    """What is called of a tiny Llama that was compiled and has run, so that its graph is of softmax; its answer."""
    model = build("llama")
    called = model
    options = {"backend": "eager", **options}  # guards are what matters here
    if way == "model.compile()":
        model.compile(**options)
    elif way == "torch.compile(model)":
        called = torch.compile(model, **options)
    elif way == "layers compiled":
        for layer in model.model.layers:
            layer.compile(**options)
    else:
        model.model = torch.compile(model.model, **options)
    return called, answer(called)


def answer(model):
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).logits


def uncompiled(*changes):
    model = build("llama")
    for change in changes:
        change(model)
    return answer(model)


@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_model_converts_and_serves_no_stale_graph(way, tmp_path):
    model, softmax = compiled_first(way)
    convert = functools.partial(hf_rfa.convert, config=SHORT, calibrate=token_ids(2, 90))
    exact = functools.partial(hf_rfa.set_softmax_heads, heads=[(0, 0), (1, 1)])
    inexact = functools.partial(hf_rfa.set_softmax_heads, heads=[])
    other = functools.partial(hf_rfa.calibrate, batches=token_ids(2, 120, seed=3))
    assert convert(model) is model
    done = [convert]
    seen = [softmax]
    for change in (None, exact, inexact, hf_rfa.resample, other):
        if change is not None:
            change(model)
            done.append(change)
        got = answer(model)
        assert_close(got, uncompiled(*done), atol=2e-5, rtol=0)
        assert (got - seen[-1]).abs().max() > 1e-4
        seen.append(got)
    if way != "an inner model compiled":  # Transformers itself writes other names for its weights then
        hf_rfa.save_pretrained(model, tmp_path)
        assert_close(answer(hf_rfa.from_pretrained(tmp_path)), seen[-1], atol=2e-5, rtol=0)
    assert hf_rfa.calibration_report(model).heads
    assert set(hf_rfa.far_statistics(model)) == {0, 1}
    assert hf_rfa.revert(model) is model
    assert_close(answer(model), softmax, atol=0, rtol=0)


def test_it_is_compiled_afterwards():
    counter = CompileCounterWithBackend("eager")
    model, _ = compiled_first("model.compile()", backend=counter, fullgraph=True)
    assert counter.frame_count == 1
    hf_rfa.convert(model, SHORT, calibrate=token_ids(2, 90))
    assert counter.frame_count == 1  # neither the dry runs nor calibration are compiled
    answer(model)
    assert counter.frame_count == 2
    hf_rfa.distill(model, [token_ids(2, 90)], hf_rfa.DistillConfig(steps=1, progress=False))
    assert counter.frame_count == 2


@pytest.mark.parametrize("change", [None, "heads", "resample", "load", "kernel"])
def test_one_graph_without_an_eager_forward_before(change, tmp_path):
    """What Python knows of an adapter's tensors is known before a graph is made, which cannot ask."""
    model = converted("llama", calibrate=token_ids(2, 90))
    if change == "heads":
        hf_rfa.set_softmax_heads(model, [(0, 1)])
    elif change == "resample":
        hf_rfa.resample(model)
    elif change == "kernel":
        hf_rfa.distill(model, [token_ids(2, 90)], hf_rfa.DistillConfig(steps=1, progress=False))
    elif change == "load":
        hf_rfa.save_pretrained(model, tmp_path)
        model = hf_rfa.from_pretrained(tmp_path)
    function, counter = compiled(model, "eager")
    got = answer(function)
    assert counter.frame_count == 1
    assert_close(got, answer(model), atol=2e-5, rtol=0)
