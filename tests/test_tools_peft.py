"""PEFT around a converted model beyond LoRA on a Llama: other families, other methods, prefixes, merging."""

import dataclasses

import pytest
import torch
from families import CACHE, PEFT_ASKS, SHORT, build, outputs_of, token_ids
from torch.testing import assert_close

import hf_rfa
from hf_rfa import UnsupportedModelError
from hf_rfa.adapter import require_adapters

peft = pytest.importorskip("peft")

TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "gemma3": ["q_proj", "k_proj"],
    "gpt_oss": ["q_proj", "v_proj"],
    "deepseek_v3": ["q_b_proj", "kv_b_proj"],
    "bert": ["query", "value"],
}
METHODS = {
    "lora": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
    "loha": lambda: peft.LoHaConfig(target_modules=["q_proj"], init_weights=False),
}
#: PEFT hands its prefix over under the name that the cache had until Transformers 5.23.
PEFT_SAYS_PAST = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")

PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6),
    "p-tuning": lambda: peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_hidden_size=16
    ),
}  # fmt: skip

# What PEFT says of every model.
IGNORED_POSITIONS = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")


def wrap(model, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).eval()


def converted(family, **changes):
    return hf_rfa.convert(build(family), dataclasses.replace(SHORT, **changes), calibrate=False)


def gradients_of(model):
    model.train()(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@PEFT_ASKS
@pytest.mark.parametrize("family", TARGETS)
def test_a_lora_trains_merges_and_is_taken_off(family):
    model, inputs = converted(family), {"input_ids": token_ids()}
    plain = outputs_of(model, inputs)
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS[family], init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    wrapped = wrap(model, config)
    tuned = outputs_of(wrapped, inputs)
    assert (tuned - plain).abs().max() > 1e-3
    with wrapped.disable_adapter():
        assert torch.equal(outputs_of(wrapped, inputs), plain)
    assert all("lora" in name for name in gradients_of(wrapped))
    merged = wrapped.eval().merge_and_unload()
    assert_close(outputs_of(merged, inputs), tuned, atol=1e-4, rtol=0)
    assert require_adapters(merged)


@PEFT_ASKS
@pytest.mark.parametrize("method", METHODS)
def test_other_methods_train_and_merge(method):
    wrapped, inputs = wrap(converted("llama"), METHODS[method]()), {"input_ids": token_ids(), "use_cache": False}
    tuned = outputs_of(wrapped, inputs)
    assert any(grad.abs().max() > 0 for grad in gradients_of(wrapped).values())
    assert_close(outputs_of(wrapped.eval().merge_and_unload(), inputs), tuned, atol=1e-4, rtol=0)


@PEFT_ASKS
def test_all_linear_layers_are_the_models_own():
    """PEFT looks for linear layers by itself: an adapter has none."""
    with_rfa = wrap(converted("llama"), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    without = wrap(build("llama"), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    names = [{name for name, _ in model.named_parameters()} for model in (with_rfa, without)]
    assert names[0] == names[1]


@PEFT_ASKS
@IGNORED_POSITIONS
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_learned_prompts_are_tokens_like_others(family, prompt):
    ids = token_ids()

    def generated(wrapped, use_cache):
        return wrapped.generate(input_ids=ids, use_cache=use_cache, do_sample=False, max_new_tokens=8)

    softmax, wrapped = (wrap(model, PROMPTS[prompt]()) for model in (build(family), converted(family)))
    if torch.equal(generated(softmax, True), generated(softmax, False)):
        assert torch.equal(generated(wrapped, True), generated(wrapped, False))
    else:  # PEFT 0.21 looks for `past_key_values`, which is `cache` since Transformers 5.24
        assert CACHE == "cache"
    assert any(grad.abs().max() > 0 for grad in gradients_of(wrapped).values())


def with_prefix(model, tokens=6):
    wrapped = wrap(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    with torch.no_grad():
        for parameter in wrapped.prompt_encoder.parameters():
            parameter.mul_(2)
    return wrapped


@PEFT_SAYS_PAST
@PEFT_ASKS
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("converted_first", [True, False])
def test_a_prefix_in_the_window_is_the_prefix_of_softmax(family, converted_first):
    inputs = {"input_ids": token_ids()}
    want = outputs_of(with_prefix(build(family)), inputs)
    config = dataclasses.replace(SHORT, window=80)
    if converted_first:
        model = with_prefix(hf_rfa.convert(build(family), config, calibrate=False))
    else:
        model = hf_rfa.convert(with_prefix(build(family)), config, calibrate=False)
    assert_close(outputs_of(model, inputs), want, atol=2e-5, rtol=0)
    assert (want - outputs_of(build(family), inputs)).abs().max() > 1e-2


@PEFT_SAYS_PAST
@PEFT_ASKS
@IGNORED_POSITIONS
@pytest.mark.parametrize("softmax_heads", [None, [(1, 0)]])
def test_a_prefix_out_of_the_window_is_estimated_trained_and_generated_from(softmax_heads):
    """Six virtual tokens: two are sinks, the others are far from the last of 70 tokens."""
    wrapped, ids = with_prefix(converted("llama", softmax_heads=softmax_heads)), token_ids()
    before = outputs_of(wrapped, {"input_ids": ids})
    if CACHE == "past_key_values":  # PEFT 0.21 hands a prefix to `generate` under that name only
        tokens = wrapped.generate(input_ids=ids, do_sample=False, max_new_tokens=12)
        logits = outputs_of(wrapped, {"input_ids": tokens})
        assert torch.equal(logits[:, 69:-1].argmax(-1), tokens[:, 70:])
    wrapped(input_ids=ids).logits[:, -1].square().sum().backward()
    weight = wrapped.prompt_encoder["default"].embedding.weight
    assert (weight.grad.abs().amax(1) > 0).all()
    with torch.no_grad():
        weight[3:].mul_(-1)
    assert (outputs_of(wrapped, {"input_ids": ids})[:, -1] - before[:, -1]).abs().max() > 1e-5


@PEFT_SAYS_PAST
@PEFT_ASKS
def test_a_prefix_before_padded_rows():
    wrapped, ids = with_prefix(converted("llama")), token_ids()
    mask = (torch.arange(70) >= torch.tensor([[23], [0]])).long()
    position = 6 + (mask.cumsum(1) - 1).clamp_min(0)
    padded = outputs_of(wrapped.get_base_model(), {
        "input_ids": ids, "position_ids": position, CACHE: wrapped.get_prompt(2),
        "attention_mask": torch.cat([mask.new_ones(2, 6), mask], dim=1),
    })  # fmt: skip
    bare = outputs_of(wrapped, {"input_ids": ids[:1, 23:]})
    assert_close(padded[0, 23:], bare[0], atol=2e-5, rtol=0)


@PEFT_SAYS_PAST
@PEFT_ASKS
def test_a_prefix_of_a_bidirectional_layer_is_refused():
    wrapped = wrap(converted("bert"), peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=6))
    with pytest.raises(UnsupportedModelError, match="prefix tuning"):
        wrapped(input_ids=token_ids())
