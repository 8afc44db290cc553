"""What surrounds a call has no say in a conversion, and no module's training flag is changed by being watched."""

import copy
import dataclasses
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conversions import converted, training_flags
from families import SHORT, build, token_ids
from torch import nn
from torch.testing import assert_close

import hf_rfa
from hf_rfa import UnsupportedModelError
from hf_rfa.evaluation import copy_perplexity, greedy_agreement, greedy_continuations, kl_divergence, perplexity
from hf_rfa.runtime.quiet import evaluation_mode, plain_torch, quiet_eval
from hf_rfa.training import FinetuneConfig, finetune


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "device context": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
}
around = pytest.mark.parametrize("surroundings", SURROUNDINGS.values(), ids=SURROUNDINGS)
CLUSTERED = dataclasses.replace(SHORT, feature_map="clustered")
GATED = dataclasses.replace(SHORT, gate=True, softmax_heads=0.25)


def adapters_of(model):
    return {name: tensor for name, tensor in model.state_dict().items() if ".rfa." in name}


def converted_within(config, calibrate, surroundings=nullcontext):
    model = build("llama")
    with surroundings():
        return converted(model, config, calibrate=calibrate)


# --- the same adapters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SHORT, CLUSTERED, GATED], ids=["random", "clustered", "gated"])
@around
def test_a_conversion_is_the_same_whatever_surrounds_it(surroundings, config):
    rows = token_ids(2, 90).tolist()  # which become tensors inside
    want, got = adapters_of(converted_within(config, rows)), adapters_of(converted_within(config, rows, surroundings))
    assert {name: tensor.dtype for name, tensor in got.items()} == {name: t.dtype for name, t in want.items()}
    assert_close(got, want, atol=0, rtol=0)
    assert all(t.dtype == torch.float32 for t in got.values() if t.is_floating_point())


@around
def test_so_is_one_on_text_of_the_models_own(surroundings):
    config = dataclasses.replace(SHORT, window=20)
    assert_close(
        adapters_of(converted_within(config, True, surroundings)), adapters_of(converted_within(config, True))
    )


@around
def test_so_is_a_distillation(surroundings):
    want, got = converted_within(CLUSTERED, token_ids(2, 90)), converted_within(CLUSTERED, token_ids(2, 90))
    hf_rfa.distill(want, [token_ids(2, 90)] * 2, hf_rfa.DistillConfig(steps=2, progress=False))
    batches = [token_ids(2, 90)] * 2
    with surroundings():
        hf_rfa.distill(got, batches, hf_rfa.DistillConfig(steps=2, progress=False))
    assert_close(adapters_of(got), adapters_of(want), atol=0, rtol=0)
    assert not any(tensor.is_inference() for tensor in got.state_dict().values())


@around
def test_the_model_trains_afterwards(surroundings):
    model = converted_within(GATED, token_ids(2, 90), surroundings).train()
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])
    model(token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_the_surroundings_are_as_before(error):
    failing = pytest.raises(error) if error else nullcontext()
    with default_dtype(torch.bfloat16), torch.device("meta"), torch.autocast("cpu"), torch.no_grad():
        with failing, plain_torch():
            assert torch.ones(1).dtype == torch.float32
            assert torch.ones(1).device.type == "cpu"
            assert not torch.is_autocast_enabled("cpu")
            assert torch.is_grad_enabled()
            if error:
                raise error
        assert torch.ones(1).dtype == torch.bfloat16
        assert torch.ones(1).device.type == "meta"
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("example_inputs", [None, {"input_ids": token_ids(1, 20)}])
def test_a_model_without_values_is_refused(example_inputs):
    with torch.device("meta"):
        model = build("llama")
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match="meta device"):
        hf_rfa.convert(model, SHORT, calibrate=False, example_inputs=example_inputs)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama without a head"])
def test_the_cache_of_the_models_config_has_no_say_in_calibration(family, use_cache):
    """Nor has it in the cost: no forward makes a cache that nobody reads."""
    model = build("llama") if family == "llama" else build("llama").model
    model.config.use_cache = use_cache
    hf_rfa.convert(model, SHORT, calibrate=False)
    caches = []

    def note(module, args, kwargs):
        caches.append(kwargs.get("past_key_values", kwargs.get("cache")))

    attention = next(m for m in model.modules() if "rfa" in m._modules)
    attention.register_forward_pre_hook(note, with_kwargs=True)
    report = hf_rfa.calibrate(model, token_ids(2, 90))
    hf_rfa.calibrate(model, {"input_ids": token_ids(2, 90)})
    assert caches
    assert set(caches) == {None}
    other = build("llama") if family == "llama" else build("llama").model
    assert hf_rfa.calibrate(hf_rfa.convert(other, SHORT, calibrate=False), token_ids(2, 90)) == report


# --- training flags --------------------------------------------------------------------------------------------------


def mixed():
    """In training, but for one block that its user keeps in evaluation mode."""
    model = build("llama").train()
    model.model.layers[1].mlp.eval()
    return model


IDS = token_ids(1, 120)[0]
MEASURES = {
    "perplexity": lambda model: perplexity(model, IDS, 40),
    "kl_divergence": lambda model: kl_divergence(model, mixed(), IDS, 40),
    "copy_perplexity": lambda model: copy_perplexity(model, IDS, gap=10, span=12, samples=2),
    "greedy": lambda model: greedy_agreement(model, greedy_continuations(model, IDS, 8, 4, 2), 8),
    "finetune": lambda model: finetune(model, iter([token_ids(2, 30)] * 2), FinetuneConfig(steps=2, progress=False)),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_every_module_comes_back_in_the_mode_that_it_had(measure):
    model = mixed()
    before = training_flags(model)
    measure(model)
    assert training_flags(model) == before


@pytest.mark.parametrize("context", [evaluation_mode, quiet_eval])
def test_also_after_an_error(context):
    model = mixed()
    before = training_flags(model)

    def fails():
        assert not any(training_flags(model).values())
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), context(model):
        fails()
    assert training_flags(model) == before


def test_models_that_share_modules_come_back_too():
    model = mixed()
    wrapped, before = nn.Sequential(model), training_flags(model)
    with evaluation_mode(wrapped, model):
        assert not any(training_flags(wrapped).values())
    assert training_flags(model) == before
    assert wrapped.training


def test_a_teacher_is_not_changed():
    model, teacher = build("llama"), mixed()
    before = training_flags(teacher)
    twin = copy.deepcopy(teacher).eval()
    config = FinetuneConfig(steps=1, kl_weight=0.5, progress=False)
    losses = [
        finetune(copy.deepcopy(model), iter([token_ids(2, 30)]), config, teacher=t).losses for t in (teacher, twin)
    ]
    assert losses[0] == losses[1]
    assert training_flags(teacher) == before
    assert all(parameter.requires_grad for parameter in teacher.parameters())
