"""What belongs to a call stays with the call: threads, activation checkpointing, callers that pass `__call__` by."""

import copy
import dataclasses
import gc
import inspect
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conversions import converted
from families import CACHE, SHORT, build, checkpoint_activations, inputs_for, outputs_of, token_ids
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import hf_rfa
from hf_rfa import UnsupportedModelError
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.runtime.calls import Interception, intercept


def draws(model):
    return [adapter.draw_number for _, _, adapter in named_adapters(model)]


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"softmax_heads": [(0, 0), (1, 1)]}, {"feature_map": "trigonometric"}])
def test_threads_that_generate_from_one_model(settings):
    model = converted(**settings)
    prompts = [token_ids(1, 30 + 9 * number, seed=number) for number in range(6)]

    def run(prompt):
        return model.generate(prompt, max_new_tokens=30, do_sample=False)

    want = [run(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(run, prompts))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_thread_that_is_calibrated_does_not_show_in_another():
    """While one thread watches its layers, another thread's calls of the same layers are answered as ever."""
    model, ids = converted(), token_ids()
    want = outputs_of(model, {"input_ids": ids, "use_cache": False})
    seen = []
    observers = {adapter: lambda *args: seen.append(args) for _, _, adapter in named_adapters(model)}
    with ThreadPoolExecutor(1) as pool, intercept(Interception(observers=observers)):
        other = pool.submit(outputs_of, model, {"input_ids": ids, "use_cache": False}).result()
        assert not seen
        exact = outputs_of(model, {"input_ids": ids, "use_cache": False})
    assert len(seen) == 2
    assert torch.equal(other, want)
    assert_close(exact, outputs_of(build("llama"), {"input_ids": ids, "use_cache": False}), atol=1e-4, rtol=0)


# --- activation checkpointing ----------------------------------------------------------------------------------------


def gradients(family, reentrant, resample, forwards=2, **settings):
    model = converted(family, resample=resample, alpha=1.0, **settings).train()
    if reentrant is not None:
        checkpoint_activations(model, use_reentrant=reentrant)
        if family != "vit":
            model.enable_input_require_grads()
    losses = []
    for number in range(forwards):
        if family == "vit":
            losses.append(model(**inputs_for(model, seed=number)).last_hidden_state.square().mean())
            continue
        ids = token_ids(2, 70, seed=number)
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        options = {"use_cache": False} if model.can_generate() else {}
        losses.append(model(ids, attention_mask=mask, labels=ids, **options).loss)
    sum(losses).backward()
    return sum(losses).item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, draws(model)


@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "bert", "vit"])
def test_a_layer_that_runs_again_sees_the_draw_of_its_own_forward(family, reentrant):
    heads = [] if family == "gemma3" else [(0, 1)]
    loss, want, drawn = gradients(family, None, "forward", softmax_heads=heads)
    again, got, drawn_again = gradients(family, reentrant, "forward", softmax_heads=heads)
    assert again == loss
    assert drawn == drawn_again
    assert set(drawn) == {2}
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert_close(got[name], gradient, atol=1e-6 * float(gradient.abs().max()) + 1e-9, rtol=1e-5)
    other = gradients(family, None, "never", softmax_heads=heads)[1]
    assert any(not torch.allclose(other[n], want[n], rtol=1e-2) for n in want)  # the draw makes a difference


def test_without_a_mask_to_tell_it_the_second_run_is_refused(monkeypatch):
    monkeypatch.setattr(
        "hf_rfa.runtime.mask.travelling_call", lambda: None
    )  # as in models that hand their layers no mask
    model = converted(resample="forward").train()
    checkpoint_activations(model, use_reentrant=False)
    output = model(token_ids(), use_cache=False).logits
    with pytest.raises(UnsupportedModelError, match="ResampleCallback"):
        output.sum().backward()


def test_a_checkpoint_around_the_whole_model_is_refused_where_omega_is_redrawn():
    ids = token_ids()
    model = converted(resample="forward").train()
    model.enable_input_require_grads()
    loss = checkpoint(lambda x: model(x, use_cache=False).logits.sum(), ids, use_reentrant=False)
    with pytest.raises(UnsupportedModelError, match="Checkpoint its layers"):
        loss.backward()
    fixed = converted().train()
    fixed.enable_input_require_grads()
    checkpoint(lambda x: fixed(x, use_cache=False).logits.sum(), ids, use_reentrant=False).backward()
    assert fixed.lm_head.weight.grad.abs().max() > 0


# --- whoever calls, and however --------------------------------------------------------------------------------------

CALLERS = {
    "the model": lambda model: model,
    "its forward": lambda model: model.forward,
    "the inner model": lambda model: model.model,
    "the inner model's forward": lambda model: model.model.forward,
}
CALLER = pytest.mark.parametrize("caller", CALLERS.values(), ids=CALLERS)


@CALLER
def test_each_training_forward_draws_omega_once(caller):
    model, ids = converted(resample="forward").train(), token_ids()
    for number in (1, 2, 3):
        caller(model)(ids, use_cache=False)[0].sum().backward()
        assert draws(model) == [number, number]
    with torch.no_grad():
        caller(model)(ids, use_cache=False)
    caller(model.eval())(ids, use_cache=False)
    assert draws(model) == [3, 3]


@CALLER
def test_attention_weights_are_refused(caller):
    with pytest.raises(UnsupportedModelError, match="output_attentions"):
        caller(converted())(token_ids(), output_attentions=True)


@CALLER
def test_packed_documents_beside_a_cache_are_refused(caller):
    model, ids = converted(), token_ids()
    positions = (torch.arange(70) % 35).expand(2, -1)
    for options in ({"use_cache": True}, {}, {"use_cache": False, CACHE: DynamicCache(config=model.config)}):
        with pytest.raises(UnsupportedModelError, match="Packed documents"):
            caller(model)(ids, position_ids=positions, **options)
    with pytest.raises(UnsupportedModelError, match="Packed documents"):
        caller(model)(ids, None, positions)  # by position
    packed = caller(model)(ids, position_ids=positions, use_cache=False)[0][:, 35:]
    assert_close(packed, caller(model)(ids[:, 35:], use_cache=False)[0], atol=2e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*")  # deprecated, by one category or another
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # tracing looks at all attributes
def test_tracing_is_refused_and_names_what_to_use():
    model = converted()
    with pytest.raises(UnsupportedModelError, match=r"torch\.export"):
        torch.jit.trace(model, (token_ids(),))


def test_a_graph_does_not_swallow_what_intercepts_a_layer():
    model, ids = converted(), token_ids()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(ids, use_cache=False)
    with intercept(Interception(observers={})), pytest.raises(Exception, match="compiled model"):
        compiled(ids, use_cache=False)
    with pytest.raises(Exception, match="cannot draw omega"):
        torch.compile(converted(resample="forward").train(), backend="eager", fullgraph=True)(ids, use_cache=False)


# --- the class of a converted model ----------------------------------------------------------------------------------


def test_the_class_is_still_the_models_own():
    model, softmax = converted(), build("llama")
    own = type(softmax)
    assert isinstance(model, own)
    assert str(type(model)) == str(own)
    assert type(hf_rfa.revert(converted())) is own
    assert type(model.model.layers[0]) is type(softmax.model.layers[0])
    assert model.can_generate()
    for name in ("forward", "generate", "save_pretrained"):
        assert inspect.signature(getattr(model, name)) == inspect.signature(getattr(softmax, name)), name


def test_a_model_that_nobody_else_holds_answers():
    """In `convert(...).generate(...)` the method alone keeps the model alive."""
    tokens = converted().generate(token_ids(), max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 73)


@pytest.mark.parametrize("family", ["llama", "bert", "bart"])
def test_a_converted_model_is_freed_by_del(family):
    gc.collect()
    gc.disable()
    try:
        model = converted(family)
        outputs_of(model, inputs_for(model))
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_converted_by_itself(make):
    model = converted(resample="forward")
    twin = make(model)
    twin.train()(token_ids(), use_cache=False)
    assert (draws(twin), draws(model)) == ([1, 1], [0, 0])
    softmax = {"input_ids": token_ids(), "use_cache": False}
    assert torch.equal(outputs_of(hf_rfa.revert(twin.eval()), softmax), outputs_of(build("llama"), softmax))
    assert model.forward.__wrapped__ is type(twin).forward  # the one is reverted, the other is not


def test_the_replicas_of_data_parallel_run_themselves():
    """`torch.nn.DataParallel` copies the `__dict__` of each module onto its replica."""
    model, ids = converted(), token_ids()
    replica = model._replicate_for_data_parallel()
    for name, child in model.named_children():
        setattr(replica, name, child)
    replica._parameters, replica.lm_head = {}, torch.nn.Linear(32, 99, bias=False)
    assert not torch.allclose(replica(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_what_others_put_around_the_forward_still_works_after_revert():
    """Accelerate and others replace `forward` on the instance, before a conversion or after it."""
    model, ids = build("llama"), token_ids()
    want, calls = outputs_of(model, {"input_ids": ids}), []

    def wrap(inner, name):
        def forward(*args, **kwargs):
            calls.append(name)
            return inner(*args, **kwargs)

        forward.__wrapped__ = inner
        return forward

    model.forward = wrap(model.forward, "before")
    hf_rfa.convert(model, dataclasses.replace(SHORT, resample="forward"), calibrate=False)
    model.forward = wrap(model.forward, "after")
    calls.clear()
    model.train()(ids, use_cache=False)
    assert calls == ["after", "before"]
    assert draws(model) == [1, 1]
    assert torch.equal(outputs_of(hf_rfa.revert(model.eval()), {"input_ids": ids}), want)
    with pytest.raises(UnsupportedModelError, match="not converted"):
        hf_rfa.revert(model)


# --- two models, one config object -----------------------------------------------------------------------------------


def test_models_of_one_config_object_do_not_touch_each_other():
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99
    )
    first, second = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    assert first.config is second.config
    ids = {"input_ids": token_ids(), "use_cache": False}
    softmax = outputs_of(second, ids)
    hf_rfa.convert(first, SHORT, calibrate=False)
    rfa = outputs_of(first, ids)
    assert torch.equal(outputs_of(second, ids), softmax)
    assert not hasattr(second.config, "rfa_config")
    hf_rfa.convert(second, SHORT, calibrate=False)
    hf_rfa.revert(second)
    assert torch.equal(outputs_of(first, ids), rfa)
    assert torch.equal(outputs_of(second, ids), softmax)
    assert config._attn_implementation == "sdpa"
    assert all(
        m.config is first.config for m in first.modules() if isinstance(getattr(m, "config", None), LlamaConfig)
    )


def test_a_conversion_that_fails_leaves_the_config_object():
    model = build("llama")
    config = model.config
    with pytest.raises(hf_rfa.ConfigError):
        hf_rfa.convert(model, dataclasses.replace(SHORT, softmax_heads=[(7, 0)]), calibrate=False)
    assert model.config is config
    assert model.model.config is config
    assert type(model) is type(build("llama"))


def test_a_cache_outlives_no_call():
    """The context remembers the last call of a layer, but not what it was called with."""
    model = converted()
    cache = cache_of(model(token_ids(), use_cache=True))
    alive = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert alive() is None


def test_methods_that_are_replaced_on_the_class_afterwards_are_followed(monkeypatch):
    """Liger, for one, puts forwards of its own into Transformers' classes."""
    model = converted()
    own, seen = type(build("llama")).forward, []

    def forward(self, *args, **kwargs):
        seen.append(type(self).__name__)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(build("llama")), "forward", forward)
    for one in (model, converted()):
        outputs_of(one, {"input_ids": token_ids()})
    assert seen.count("LlamaForCausalLM") >= 2
    seen.clear()
    outputs_of(model, {"input_ids": token_ids()})
    assert seen == ["LlamaForCausalLM"]


def test_an_omega_drawn_in_inference_mode_can_be_trained_with():
    model = converted(alpha=1.0)
    with torch.inference_mode():
        hf_rfa.resample(model)
    model.train()(token_ids(), use_cache=False).logits.sum().backward()
    assert draws(model) == [1, 1]
