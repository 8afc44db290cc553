"""`convert` and `revert` on unlike families: what they change, what they leave alone, what they refuse."""

import copy
import dataclasses
import importlib
import logging
import pickle
import random

import numpy as np
import pytest
import torch
import transformers
from families import (
    CAUSAL,
    OTHERS,
    PEFT_ASKS,
    REFUSED,
    SHORT,
    SUPPORTED,
    attention_modules,
    build,
    checkpoint_activations,
    inputs_for,
    llama,
    lora,
    outputs_of,
    token_ids,
)
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import hf_rfa
from hf_rfa import ConfigError, RFAConfig, UnsupportedModelError

ALL_FAMILIES = pytest.mark.parametrize("family", SUPPORTED)
SOME_FAMILIES = pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "jamba", "bert", "vit", "bart"])


def fingerprint(model):
    """Everything that a conversion could leave behind in a model, but for the values of its tensors."""
    modules = {
        name: (
            type(module),
            sorted(vars(module)),
            list(module._modules),
            list(module._buffers),
            {key: len(value) for key, value in vars(module).items() if key.endswith(("_hooks", "_with_kwargs"))},
            module.training,
        )
        for name, module in model.named_modules()
    }
    configs = {
        name: copy.deepcopy(vars(module.config)) for name, module in model.named_modules() if hasattr(module, "config")
    }
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return modules, configs, list(model.state_dict()), flags


def every_pair(model):
    adapters = [module.rfa for module in attention_modules(model) if module.rfa.converted]
    return [(adapter.layer, head) for adapter in adapters for head in range(adapter.key_heads)]


# --- what a conversion does ------------------------------------------------------------------------------------------


@ALL_FAMILIES
def test_a_converted_model_keeps_its_class_and_gives_other_finite_outputs(family):
    model = build(family)
    model_class, inputs = type(model), inputs_for(model)
    before = outputs_of(model, inputs)
    assert hf_rfa.convert(model, SHORT, calibrate=False) is model
    assert isinstance(model, model_class)
    assert str(type(model)) == str(model_class)
    after = outputs_of(model, inputs)
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-3


@ALL_FAMILIES
def test_a_window_that_covers_everything_is_softmax(family):
    model = build(family)
    inputs = inputs_for(model)
    before = outputs_of(model, inputs)
    hf_rfa.convert(model, dataclasses.replace(SHORT, window=128), calibrate=False)
    assert_close(outputs_of(model, inputs), before, atol=1e-4, rtol=0)


@ALL_FAMILIES
def test_every_head_kept_exact_is_softmax(family):
    model = build(family)
    inputs = inputs_for(model)
    before = outputs_of(model, inputs)
    hf_rfa.convert(model, SHORT, calibrate=False)
    hf_rfa.set_softmax_heads(model, every_pair(model))
    assert_close(outputs_of(model, inputs), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("feature_map", ["trigonometric", "positive", "hyperbolic", "optimal_positive"])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_every_map_gives_finite_outputs_of_its_own(family, window, feature_map):
    model = build(family)
    inputs = inputs_for(model)
    config = dataclasses.replace(SHORT, window=window, feature_map=feature_map)
    plain = outputs_of(hf_rfa.convert(model, config, calibrate=False), inputs)
    hf_rfa.resample(model)
    again = outputs_of(model, inputs)
    assert torch.isfinite(plain).all()
    assert torch.isfinite(again).all()
    assert not torch.equal(plain, again)  # omega is really used


@ALL_FAMILIES
def test_two_conversions_with_one_seed_are_the_same(family):
    one, two, other = build(family), build(family), build(family)
    inputs = inputs_for(one)
    hf_rfa.convert(one, SHORT, calibrate=False)
    hf_rfa.convert(two, SHORT, calibrate=False)
    hf_rfa.convert(other, dataclasses.replace(SHORT, seed=1), calibrate=False)
    assert torch.equal(outputs_of(one, inputs), outputs_of(two, inputs))
    assert not torch.equal(outputs_of(one, inputs), outputs_of(other, inputs))


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_layers_with_a_sliding_window_of_their_own_stay_softmax(family):
    model = hf_rfa.convert(build(family), SHORT, calibrate=False)
    assert [m.rfa.converted for m in attention_modules(model)] == [False, True]
    assert [m.rfa.softmax_heads for m in attention_modules(model)] == [(0, 1), ()]


def test_cross_attention_stays_softmax_and_both_kinds_of_self_attention_are_converted():
    model = hf_rfa.convert(build("bart"), SHORT, calibrate=False)
    kinds = {
        name.split(".")[1] + ("/cross" if "encoder_attn" in name else ""): module.rfa.converted
        for name, module in model.named_modules()
        if "rfa" in module._modules
    }
    assert kinds == {"encoder": True, "decoder": True, "decoder/cross": False}


def test_none_is_the_default_config():
    model = hf_rfa.convert(build("llama"), calibrate=False)
    assert attention_modules(model)[0].rfa.config == RFAConfig().settled()


def test_example_inputs_are_what_the_dry_run_sees():
    model, seen = build("llama"), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    hf_rfa.convert(model, SHORT, example_inputs={"input_ids": token_ids(3, 21)}, calibrate=False)
    assert set(seen) == {(3, 21)}


def test_a_base_model_without_a_head_converts():
    model = build("llama").model
    before = outputs_of(model, {"input_ids": token_ids()})
    hf_rfa.convert(model, SHORT, calibrate=False)
    assert not torch.equal(outputs_of(model, {"input_ids": token_ids()}), before)


# --- what it leaves alone --------------------------------------------------------------------------------------------


@ALL_FAMILIES
def test_revert_leaves_nothing_behind(family):
    model = build(family)
    inputs = inputs_for(model)
    before, print_before = outputs_of(model, inputs), fingerprint(model)
    hf_rfa.convert(model, dataclasses.replace(SHORT, resample="forward"), calibrate=False)
    assert fingerprint(model) != print_before
    outputs_of(model, inputs)
    assert hf_rfa.revert(model) is model
    assert fingerprint(model) == print_before
    assert torch.equal(outputs_of(model, inputs), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_revert_gives_the_implementation_back(implementation):
    model = build("llama")
    model.set_attn_implementation(implementation)
    before = outputs_of(model, inputs_for(model))
    hf_rfa.revert(hf_rfa.convert(model, SHORT, calibrate=False))
    assert model.config._attn_implementation == implementation
    assert torch.equal(outputs_of(model, inputs_for(model)), before)


def test_convert_revert_convert_is_convert():
    model = build("llama")
    once = outputs_of(hf_rfa.convert(model, SHORT, calibrate=False), inputs_for(model))
    again = outputs_of(hf_rfa.convert(hf_rfa.revert(model), SHORT, calibrate=False), inputs_for(model))
    assert torch.equal(once, again)


@ALL_FAMILIES
def test_a_conversion_that_fails_half_way_changes_nothing(family):
    model = build(family)
    inputs = inputs_for(model)
    before = outputs_of(model, inputs)
    calls = []

    def interrupt_the_second_run(module, args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt_the_second_run)
    print_before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        hf_rfa.convert(model, SHORT, calibrate=False)
    assert len(calls) == 2  # the adapters were in place
    assert fingerprint(model) == print_before
    hook.remove()
    assert torch.equal(outputs_of(model, inputs), before)


def random_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def test_the_global_random_state_is_untouched():
    model = build("llama")
    torch_state, python_state, numpy_state = random_states()
    hf_rfa.convert(model, SHORT, calibrate=False)
    hf_rfa.resample(model)
    hf_rfa.revert(model)
    after = random_states()
    assert torch.equal(torch_state, after[0])
    assert python_state == after[1]
    assert all(np.array_equal(a, b) for a, b in zip(numpy_state, after[2], strict=True))


def test_training_and_gradient_flags_are_untouched():
    model = build("llama").train()
    model.model.layers[1].mlp.eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hf_rfa.convert(model, SHORT, calibrate=False)
    assert {name: m.training for name, m in model.named_modules() if "rfa" not in name} == before
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_another_model_of_the_same_class_is_untouched():
    one, two = build("llama"), build("llama")
    before = outputs_of(two, inputs_for(two))
    hf_rfa.convert(one, SHORT, calibrate=False)
    assert torch.equal(outputs_of(two, inputs_for(two)), before)
    assert two.config._attn_implementation == "sdpa"


def test_registration_is_idempotent():
    function, mask = AttentionInterface._global_mapping["rfa"], AttentionMaskInterface._global_mapping["rfa"]
    count = len(AttentionInterface._global_mapping)
    importlib.reload(hf_rfa)
    hf_rfa.register()
    assert AttentionInterface._global_mapping["rfa"] is function
    assert AttentionMaskInterface._global_mapping["rfa"] is mask
    assert len(AttentionInterface._global_mapping) == count


# --- layers and heads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "converted"),
    [
        ("all", [True, True, True, True]),
        ([0, 3], [True, False, False, True]),
        ((2,), [False, False, True, False]),
        ("every 2nd stays softmax", [True, False, True, False]),
        ("every 3rd stays softmax", [True, True, False, True]),
    ],
)
def test_layers_are_chosen_by_number_or_rule(layers, converted):
    model = hf_rfa.convert(llama(num_hidden_layers=4), dataclasses.replace(SHORT, layers=layers), calibrate=False)
    assert [m.rfa.converted for m in attention_modules(model)] == converted
    assert [m.rfa.softmax_heads for m in attention_modules(model)] == [() if c else (0, 1) for c in converted]
    assert list(hf_rfa.far_statistics(model)) == [number for number, c in enumerate(converted) if c]


def test_a_layer_left_out_gives_what_softmax_gives():
    model, ids = llama(num_hidden_layers=4), token_ids()
    seen = {}

    def keep(module, args, kwargs, output):
        seen["input"], seen["output"] = kwargs, output[0]

    hook = model.model.layers[1].self_attn.register_forward_hook(keep, with_kwargs=True)
    hf_rfa.convert(model, dataclasses.replace(SHORT, layers="every 2nd stays softmax"), calibrate=False)
    outputs_of(model, {"input_ids": ids, "use_cache": False})
    hook.remove()
    hf_rfa.revert(model)
    with torch.no_grad():
        softmax = model.model.layers[1].self_attn(**{**seen["input"], "attention_mask": None})[0]
    assert_close(seen["output"], softmax, atol=1e-5, rtol=0)


def test_layers_before_the_first_converted_one_are_softmax():
    model, inputs = (
        llama(num_hidden_layers=4),
        {"input_ids": token_ids(), "output_hidden_states": True, "use_cache": False},
    )
    with torch.no_grad():
        before = model(**inputs).hidden_states
        after = hf_rfa.convert(model, dataclasses.replace(SHORT, layers=[2]), calibrate=False)(**inputs).hidden_states
    for layer in range(3):
        assert_close(after[layer], before[layer], atol=1e-5, rtol=0)
    assert (after[3] - before[3]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"layers": [0, 2]}, "layers"),
        ({"softmax_heads": [(0, 2)]}, "softmax_heads"),
        ({"softmax_heads": [(2, 0)]}, "softmax_heads"),
        ({"layers": [1], "softmax_heads": [(0, 0)]}, "softmax_heads"),
    ],
)
def test_numbers_that_do_not_exist_are_refused_and_nothing_changes(changes, names):
    model = build("llama")
    before, print_before = outputs_of(model, inputs_for(model)), fingerprint(model)
    with pytest.raises(ConfigError, match=names):
        hf_rfa.convert(model, dataclasses.replace(SHORT, **changes), calibrate=False)
    assert fingerprint(model) == print_before
    assert torch.equal(outputs_of(model, inputs_for(model)), before)


@pytest.mark.parametrize("heads", [[(0, 5)], [(3, 0)]])
def test_set_softmax_heads_refuses_what_does_not_exist_and_changes_nothing(heads):
    model = hf_rfa.convert(build("llama"), dataclasses.replace(SHORT, softmax_heads=[(1, 1)]), calibrate=False)
    with pytest.raises(ConfigError, match="softmax_heads"):
        hf_rfa.set_softmax_heads(model, [(1, 0), *heads])
    assert [m.rfa.softmax_heads for m in attention_modules(model)] == [(), (1,)]
    assert model.config.rfa_config["softmax_heads"] == [[1, 1]]


def test_one_exact_head_leaves_the_others_as_they_were():
    """The output of a layer's linear heads does not depend on which others are exact."""
    model, seen = build("llama"), {}
    inputs = inputs_for(model)
    project = model.model.layers[0].self_attn.o_proj
    project.register_forward_pre_hook(lambda module, args: seen.update(heads=args[0].unflatten(-1, (4, -1))))
    outputs_of(model, inputs)
    softmax = seen["heads"]
    hf_rfa.convert(model, SHORT, calibrate=False)
    outputs_of(model, inputs)
    linear = seen["heads"]
    hf_rfa.set_softmax_heads(model, [(0, 1)])
    outputs_of(model, inputs)
    assert_close(seen["heads"][:, :, :2], linear[:, :, :2], atol=1e-6, rtol=0)
    assert_close(seen["heads"][:, :, 2:], softmax[:, :, 2:], atol=1e-5, rtol=0)
    assert (linear - softmax)[:, :, 2:].abs().max() > 1e-3


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", REFUSED)
def test_refused_families_say_why_and_stay_as_they_were(family):
    make, reason = REFUSED[family]
    model = build(make)
    inputs = {"input_ids": token_ids()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(seed=1)
    before, print_before = outputs_of(model, inputs), fingerprint(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        hf_rfa.convert(model, SHORT, calibrate=False)
    assert fingerprint(model) == print_before
    assert torch.equal(outputs_of(model, inputs), before)


def test_a_second_conversion_is_refused_and_the_first_stays():
    model = hf_rfa.convert(build("llama"), SHORT, calibrate=False)
    before = outputs_of(model, inputs_for(model))
    with pytest.raises(UnsupportedModelError, match="already"):
        hf_rfa.convert(model, SHORT, calibrate=False)
    assert torch.equal(outputs_of(model, inputs_for(model)), before)


@pytest.mark.parametrize("call", [hf_rfa.revert, hf_rfa.resample, hf_rfa.far_statistics], ids=lambda f: f.__name__)
def test_what_is_not_converted_is_said_to_be_so(call):
    with pytest.raises(UnsupportedModelError, match="not converted"):
        call(build("llama"))


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), "a name"], ids=["module", "string"])
def test_what_is_no_transformers_model_is_refused(model):
    with pytest.raises(ConfigError, match="Transformers model"):
        hf_rfa.convert(model, calibrate=False)


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="RFAConfig"):
        hf_rfa.convert(build("llama"), {"window": 8}, calibrate=False)


def test_a_model_without_a_layer_to_convert_is_refused():
    config = transformers.MistralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    model = build(lambda: transformers.MistralForCausalLM(config))
    print_before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        hf_rfa.convert(model, SHORT, calibrate=False)
    assert fingerprint(model) == print_before


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = LlamaForCausalLM(build("llama").config)
    with pytest.raises(UnsupportedModelError, match="meta"):
        hf_rfa.convert(model, SHORT, calibrate=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_four_dimensions_are_refused(family, dtype):
    model = hf_rfa.convert(build(family), SHORT, calibrate=False)
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool).tril()
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    with pytest.raises(UnsupportedModelError, match="2-D"):
        model(input_ids=token_ids(), attention_mask=mask)


def test_a_dictionary_of_masks_is_refused():
    model = hf_rfa.convert(build("gemma3"), SHORT, calibrate=False)
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool).tril()
    with pytest.raises(UnsupportedModelError, match="2-D"):
        model(input_ids=token_ids(), attention_mask={"full_attention": mask, "sliding_attention": mask})


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_attention_weights_are_refused(family):
    model = hf_rfa.convert(build(family), SHORT, calibrate=False)
    with pytest.raises((UnsupportedModelError, ValueError), match="output_attentions"):
        model(input_ids=token_ids(), output_attentions=True)


# --- attn_implementation="rfa" at loading --------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "bart", "jamba", "gpt_oss"])
def test_loaded_with_the_implementation_alone_a_model_says_what_to_call(family, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="rfa").eval()
    with pytest.raises(UnsupportedModelError, match=r"hf_rfa\.convert"):
        loaded(**inputs_for(loaded))


def test_loaded_with_the_implementation_alone_generate_and_padding_fail_too(tmp_path):
    build("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="rfa").eval()
    mask = torch.ones(2, 70, dtype=torch.int64)
    mask[0, :9] = 0
    with pytest.raises(UnsupportedModelError, match=r"hf_rfa\.convert"):
        model.generate(token_ids(), attention_mask=mask, max_new_tokens=2)


def test_a_model_loaded_with_the_implementation_can_be_converted_and_reverted(tmp_path):
    plain = build("llama")
    plain.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="rfa").eval()
    inputs = inputs_for(plain)
    softmax = outputs_of(plain, inputs)
    hf_rfa.convert(model, SHORT, calibrate=False), hf_rfa.convert(plain, SHORT, calibrate=False)
    assert torch.equal(outputs_of(model, inputs), outputs_of(plain, inputs))
    assert torch.equal(outputs_of(hf_rfa.revert(model), inputs), softmax)


# --- dtypes, copies, training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("converted_first", [True, False])
def test_the_adapter_stays_float32_and_is_not_rounded(dtype, converted_first):
    model = build("llama")
    if converted_first:
        before = hf_rfa.convert(model, SHORT, calibrate=False).model.layers[1].self_attn.rfa.omega.clone()
        model.to(dtype)
    else:
        before = hf_rfa.convert(build("llama"), SHORT, calibrate=False).model.layers[1].self_attn.rfa.omega
        hf_rfa.convert(model.to(dtype), SHORT, calibrate=False)
    adapter = model.model.layers[1].self_attn.rfa
    assert model.dtype == dtype
    assert adapter.omega.dtype == adapter.alpha.dtype == adapter.gamma.dtype == torch.float32
    assert adapter.draw.dtype == torch.int64
    assert adapter.softmax_mask.dtype == torch.bool
    assert torch.equal(adapter.omega, before)


@pytest.mark.parametrize("call", ["bfloat16", "half", "float", "double"])
def test_the_other_ways_to_cast_keep_the_adapter_too(call):
    model = hf_rfa.convert(build("llama"), SHORT, calibrate=False)
    before = model.model.layers[0].self_attn.rfa.omega.clone()
    getattr(model, call)()
    assert torch.equal(model.model.layers[0].self_attn.rfa.omega, before)


@SOME_FAMILIES
def test_bfloat16_is_near_float32(family):
    model = build(family)
    inputs = inputs_for(model)
    exact = outputs_of(hf_rfa.convert(model, SHORT, calibrate=False), inputs)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    rounded = outputs_of(model.to(torch.bfloat16), inputs)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("exact_head", [False, True])
@SOME_FAMILIES
def test_autocast_is_near_float32(family, exact_head):
    model = hf_rfa.convert(build(family), SHORT, calibrate=False)
    inputs = inputs_for(model)
    if exact_head:
        hf_rfa.set_softmax_heads(model, every_pair(model)[:1])
    exact = outputs_of(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast = outputs_of(model, inputs)
    assert not torch.equal(cast.float(), exact)
    assert (cast.float() - exact).norm() < 0.1 * exact.norm()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@SOME_FAMILIES
def test_a_copy_is_the_same_and_lives_on_its_own(family, make):
    model = hf_rfa.convert(build(family), SHORT, calibrate=False)
    inputs = inputs_for(model)
    before = outputs_of(model, inputs)
    twin = make(model)
    assert torch.equal(outputs_of(twin, inputs), before)
    hf_rfa.resample(twin)
    assert not torch.equal(outputs_of(twin, inputs), before)
    assert torch.equal(outputs_of(model, inputs), before)
    hf_rfa.revert(twin)
    assert torch.equal(outputs_of(model, inputs), before)


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_generates_with_itself(make):
    model = hf_rfa.convert(build("llama"), SHORT, calibrate=False)
    twin = make(model)
    hf_rfa.resample(twin)
    options = {"max_new_tokens": 8, "do_sample": False}
    cached, uncached = (twin.generate(token_ids(), **options, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)
    assert hf_rfa.resample(model) == 1  # the original still counts its own draws


def gradients(model, inputs):
    model.zero_grad()
    model(**inputs)[0].float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("resample", ["never", "forward"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients(family, reentrant, resample):
    model = hf_rfa.convert(build(family), dataclasses.replace(SHORT, resample=resample), calibrate=False).train()
    inputs = inputs_for(model)
    twin = copy.deepcopy(model)
    checkpoint_activations(twin, use_reentrant=reentrant)
    if reentrant:
        twin.enable_input_require_grads()
    want, got = gradients(model, inputs), gradients(twin, inputs)
    assert want.keys() == got.keys()
    assert any(value.abs().max() > 0 for name, value in want.items() if "q_proj" in name or "query" in name)
    for name, value in want.items():
        assert_close(got[name], value, atol=1e-6, rtol=1e-4, msg=name)
    draws = {m.rfa.draw_number for m in attention_modules(twin)}
    assert draws == ({1} if resample == "forward" else {0})


@ALL_FAMILIES
def test_gradients_reach_every_weight_that_they_reached_before(family):
    model = build(family).train()
    inputs = inputs_for(model)
    before = {name for name, grad in gradients(model, inputs).items() if grad.abs().max() > 0}
    hf_rfa.convert(model, SHORT, calibrate=False)
    after = gradients(model, inputs)
    assert all(torch.isfinite(grad).all() for grad in after.values())
    assert before <= {name for name, grad in after.items() if grad.abs().max() > 0}


# --- PEFT ------------------------------------------------------------------------------------------------------------


@PEFT_ASKS
@pytest.mark.parametrize("converted_first", [True, False])
def test_a_lora_trains_a_step_and_merges(converted_first):
    model = build("llama")
    if converted_first:
        wrapped = lora(hf_rfa.convert(model, SHORT, calibrate=False))
    else:
        wrapped = lora(model)
        assert hf_rfa.convert(wrapped, SHORT, calibrate=False) is wrapped
    ids = token_ids()
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    first = wrapped(input_ids=ids, labels=ids).loss
    first.backward()
    optimizer.step()
    with torch.no_grad():
        assert wrapped(input_ids=ids, labels=ids).loss < first
        trained = wrapped(input_ids=ids, use_cache=False).logits
    merged = wrapped.merge_and_unload()
    assert isinstance(merged, LlamaForCausalLM)
    assert_close(outputs_of(merged, {"input_ids": ids, "use_cache": False}), trained, atol=1e-5, rtol=0)
    hf_rfa.revert(merged)
    assert not torch.allclose(outputs_of(merged, {"input_ids": ids, "use_cache": False}), trained, atol=1e-3)


@PEFT_ASKS
def test_a_lora_wrapped_model_reverts_bit_for_bit():
    wrapped = lora(build("llama"))
    ids = token_ids()
    before = outputs_of(wrapped, {"input_ids": ids})
    hf_rfa.convert(wrapped, SHORT, calibrate=False)
    assert not torch.equal(outputs_of(wrapped, {"input_ids": ids}), before)
    hf_rfa.revert(wrapped)
    assert torch.equal(outputs_of(wrapped, {"input_ids": ids}), before)


def test_the_adapter_is_not_trainable():
    model = hf_rfa.convert(build("llama"), SHORT, calibrate=False)
    assert not any("rfa" in name for name, _ in model.named_parameters())


# --- attention dropout -----------------------------------------------------------------------------------------------


TINY = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
WITH_DROPOUT = {  # GPT-2 and BERT have it by default
    "attn_pdrop": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=99, bos_token_id=0, eos_token_id=1)
    ),
    "attention_probs_dropout_prob": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TINY)),
    "attention_dropout": lambda: LlamaForCausalLM(LlamaConfig(**TINY, attention_dropout=0.1)),
}


@pytest.mark.parametrize(("named", "make"), WITH_DROPOUT.items(), ids=WITH_DROPOUT)
def test_attention_dropout_is_warned_about_once(named, make, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_rfa"):
        hf_rfa.convert(build(make), SHORT, calibrate=False)
    assert [named in record.getMessage() for record in caplog.records if record.name.startswith("hf_rfa")] == [True]


def test_without_attention_dropout_nothing_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger="hf_rfa"):
        for family in [*CAUSAL, *OTHERS]:
            hf_rfa.convert(build(family), SHORT, calibrate=False)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("hf_rfa")] == []
