"""Ways of calling a converted model that few think of: each is right, or an error that names what to do."""

import subprocess
import sys

import pytest
import torch
from conversions import converted
from decoding import one_by_one, prefilled, whole
from families import CACHE, build, token_ids
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache, LlamaForCausalLM, Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

import hf_rfa
from hf_rfa import StaleStateError, UnsupportedModelError
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.arguments import cache_of

# --- inference mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"softmax_heads": [(0, 0), (1, 1)]}, {"gate": True}])
def test_a_cache_goes_in_and_out_of_inference_mode(settings):
    model, ids = converted(**settings), token_ids(2, 90)
    with torch.inference_mode():
        cache = prefilled(model, ids[:, :40])
        inside = one_by_one(model, cache, ids[:, :45], 40)
    outside = one_by_one(model, cache, ids[:, :60], 45)
    with torch.inference_mode():
        inside_again = one_by_one(model, cache, ids[:, :80], 60)
    outside_again = one_by_one(model, cache, ids, 80)
    got = torch.cat([inside, outside, inside_again, outside_again], dim=1)
    assert_close(got, whole(model, ids)[:, 40:], atol=1e-4, rtol=0)


def test_what_was_redrawn_in_inference_mode_is_trained_with():
    model, ids = converted(), token_ids()
    with torch.inference_mode():
        hf_rfa.resample(model)
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- caches ----------------------------------------------------------------------------------------------------------


def test_recording_that_a_user_asked_for_goes_on_after_generate():
    model, ids = converted(), token_ids(1)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    text = model.generate(ids, max_new_tokens=10, do_sample=False, **{CACHE: cache})
    held = cache.get_seq_length()
    cache.crop(-4)
    assert_close(one_by_one(model, cache, text, held - 4), whole(model, text)[:, held - 4 :], atol=1e-4, rtol=0)


def test_a_module_called_past_its_hooks_does_not_find_the_cache_of_the_last_call():
    model, ids = converted(), token_ids()
    cache = prefilled(model, ids)
    attention, x = model.model.layers[1].self_attn, torch.randn(2, 20, 32)
    inputs = {
        "hidden_states": x, "position_embeddings": model.model.rotary_emb(x, torch.arange(20)[None]),
        "attention_mask": None,
    }  # fmt: skip
    with torch.no_grad():
        assert_close(attention.forward(**inputs)[0], attention(**inputs)[0])
        attention(**inputs, **{CACHE: cache})  # outside of any model's forward, so that nothing ends the call
        assert cache.get_seq_length(1) == ids.shape[1] + 20
        assert_close(attention.forward(**inputs)[0], attention(**inputs)[0])
    assert cache.get_seq_length(1) == ids.shape[1] + 20


def test_a_forward_that_fails_before_it_attends_leaves_no_way_for_softmax_to_take_its_cache():
    model, ids = converted(), token_ids()
    cache = prefilled(model, ids)

    def fail(*_):
        raise ZeroDivisionError

    for layer in reversed(model.model.layers):  # at last all of them have failed
        handle = layer.self_attn.q_proj.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :1], use_cache=True, **{CACHE: cache})
        handle.remove()
    hf_rfa.revert(model)
    with pytest.raises(StaleStateError, match="softmax"):
        model(ids[:, :1], use_cache=True, **{CACHE: cache})


def test_a_tensor_of_the_kernel_that_was_written_into_is_another_conversion():
    model, ids = converted(), token_ids()
    cache = prefilled(model, ids)
    for _, _, adapter in named_adapters(model):
        adapter.alpha.fill_(0.9)
    with pytest.raises(StaleStateError):
        model(ids[:, :1], use_cache=True, **{CACHE: cache})


def test_parameters_of_functional_call_are_another_conversion():
    model, ids = converted(omega="learned"), token_ids()
    other = {
        name: (parameter * 1.3 if ".rfa." in name else parameter).detach()
        for name, parameter in model.named_parameters()
    }

    def call(ids, **kwargs):
        with torch.no_grad():
            return torch.func.functional_call(model, other, (ids,), {"use_cache": True, **kwargs})

    cache = cache_of(call(ids[:, :40]))
    got = call(ids[:, 40:], **{CACHE: cache}).logits
    assert_close(got, call(ids, use_cache=False).logits[:, 40:], atol=1e-4, rtol=0)
    with pytest.raises(StaleStateError):
        model(ids[:, :1], use_cache=True, **{CACHE: cache})


def test_a_fingerprint_inside_a_transformation_is_the_one_outside():
    adapter = next(adapter for _, _, adapter in named_adapters(converted()))
    want, seen = adapter.fingerprint, []

    def loss(x):
        adapter._python.pop("fingerprint")
        seen.append(adapter.fingerprint)
        return (x**2).sum()

    torch.func.grad(loss)(torch.ones(2))
    assert seen == [want]


def test_another_attention_set_by_hand_has_a_cache_of_its_own():
    model, ids = converted(), token_ids()
    ours = prefilled(model, ids)
    model.set_attn_implementation("sdpa")
    with pytest.raises(StaleStateError):
        model(ids[:, :1], use_cache=True, **{CACHE: ours})
    want = build("llama").generate(ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), want)
    cache = prefilled(model, ids[:, :30])
    assert_close(one_by_one(model, cache, ids, 30), whole(build("llama"), ids)[:, 30:], atol=1e-5, rtol=0)


def test_documents_by_four_positions_a_token_are_refused_beside_a_cache():
    config = Qwen2VLTextConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, bos_token_id=0, eos_token_id=1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    model, ids = converted(lambda: Qwen2VLTextModel(config)), token_ids(2, 90)
    positions = (torch.arange(90) % 45)[None, None].expand(4, 2, -1)
    with torch.no_grad():
        alone = [model(part, use_cache=False).last_hidden_state for part in ids.split(45, dim=1)]
        packed = model(ids, position_ids=positions, use_cache=False).last_hidden_state
        assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=0)
        with pytest.raises(UnsupportedModelError, match="beside a cache"):
            model(ids, position_ids=positions)
        model(ids, position_ids=torch.arange(90)[None, None].expand(4, 2, -1))  # one document


# --- graphs that break -----------------------------------------------------------------------------------------------


class Opaque(nn.Module):
    """A layer that no graph can hold."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @torch.compiler.disable
    def forward(self, x):
        return self.layer(x)


def break_inside_attention(model):
    for layer in model.model.layers:
        layer.self_attn.q_proj = Opaque(layer.self_attn.q_proj)
    model.compile(backend="eager")


def compile_forwards_of_attention(model):
    for layer in model.model.layers:
        layer.self_attn.forward = torch.compile(layer.self_attn.forward, backend="eager")


def break_nowhere(model):
    model.compile(backend="eager")


@pytest.mark.parametrize("change", [break_nowhere, break_inside_attention, compile_forwards_of_attention])
def test_a_graph_that_breaks_between_a_layer_and_its_cache(change):
    model, ids = converted(), token_ids(2, 43)
    want = whole(model, ids)
    torch._dynamo.reset()
    change(model)
    cache = prefilled(model, ids[:, :40])
    assert cache.get_seq_length() == 40
    assert_close(one_by_one(model, cache, ids, 40), want[:, 40:], atol=1e-4, rtol=0)
    assert all(adapter.traced_call is None for _, _, adapter in named_adapters(model))
    torch._dynamo.reset()


# --- classes and files -----------------------------------------------------------------------------------------------


def test_a_method_that_others_put_into_the_class_later_is_the_one_that_answers(monkeypatch):
    ids, calls, own = token_ids(), [], LlamaForCausalLM.forward
    before = converted()

    def patched(self, *args, **kwargs):
        calls.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", patched)
    after = converted()
    calls.clear()
    for model in (before, after):
        model(ids)
    assert calls == [before, after]


def test_save_pretrained_takes_its_arguments_by_position(tmp_path, monkeypatch):
    model, ids = converted(), token_ids()
    monkeypatch.setattr(LlamaForCausalLM, "push_to_hub", lambda *args, **kwargs: pytest.fail("pushed"))
    model.save_pretrained(tmp_path, True, model.state_dict(), False, "20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(whole(hf_rfa.from_pretrained(tmp_path), ids), whole(model, ids))


def test_another_process_takes_a_model_and_its_cache_over(tmp_path):
    model, ids = converted(), token_ids(2, 90)
    cache = prefilled(model, ids[:, :60])
    one_by_one(model, cache, ids[:, :62], 60)
    torch.save((model, cache, ids, whole(model, ids)), tmp_path / "all.pt")
    program = f"""
import torch
from transformers import DynamicCache
model, cache, ids, want = torch.load({str(tmp_path / "all.pt")!r}, weights_only=False)
with torch.no_grad():
    torch.testing.assert_close(model(ids[:, 62:], {CACHE}=cache).logits, want[:, 62:], atol=1e-4, rtol=0)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()  # nothing was converted in this process
    model(ids, {CACHE}=cache)
cache.crop(-5)
assert cache.get_seq_length() == 85
"""
    subprocess.run([sys.executable, "-c", program], check=True)
