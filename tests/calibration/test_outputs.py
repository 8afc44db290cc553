"""What calibration sees of a model: its outputs in blocks, and the gradients of its layers with little memory."""

import logging

import pytest
import torch
import transformers as T
from conversions import adapters, converted
from families import build, inputs_for, llama, token_ids
from torch import nn
from torch.testing import assert_close

import hf_rfa
from hf_rfa import UnsupportedModelError
from hf_rfa.calibration import outputs
from hf_rfa.calibration.divergence import Divergence
from hf_rfa.calibration.layer_gradients import LayerGradients
from hf_rfa.calibration.outputs import OutputReader
from hf_rfa.runtime.calls import Interception, intercept

SIZE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16, "vocab_size": 99,
}  # fmt: skip
MODELS = {
    "plain": lambda: build("llama"),
    "capped": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**SIZE, head_dim=16, final_logit_softcapping=0.3)),
    "scaled": lambda: T.CohereForCausalLM(T.CohereConfig(**SIZE, logit_scale=0.0625)),
    "divided": lambda: T.GraniteForCausalLM(T.GraniteConfig(**SIZE, logits_scaling=8.0)),
}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(outputs, "BLOCK_BYTES", 1)
    monkeypatch.setattr(outputs, "BLOCK_TOKENS", 10)


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_blocks_are_the_models(name, small_blocks):
    torch.manual_seed(0)
    model, ids, shapes = MODELS[name]().eval(), token_ids(2, 33), []
    model.get_output_embeddings().register_forward_hook(lambda m, args, out: shapes.append(out.shape[:2].numel()))
    with torch.no_grad():
        found = OutputReader(model)({"input_ids": ids, "use_cache": False})
        parts = [found.logits(found.tensor[:, span]) for span in found.blocks()]
        assert max(shapes) <= 10
        assert_close(torch.cat(parts, dim=1), model(input_ids=ids).logits, atol=1e-6, rtol=1e-5)
    assert found.weight() == 66


def test_a_head_that_is_something_else_is_told_and_held_whole(caplog):
    class Shifted(T.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids, **kwargs)
            output.logits = output.logits.cumsum(-1)
            return output

    model = Shifted(llama().config).eval()
    with caplog.at_level(logging.WARNING), torch.no_grad():
        found = OutputReader(model)({"input_ids": token_ids()})
        assert torch.equal(found.tensor, model(input_ids=token_ids()).logits)
    assert "held whole" in caplog.text
    hf_rfa.convert(model, hf_rfa.RFAConfig(window=8, num_features=8, kept_keys=0), calibrate=token_ids(2, 90))
    assert hf_rfa.calibration_report(model).divergence < 1


def test_the_divergence_in_blocks_is_the_divergence(small_blocks):
    one, two, ids = llama(gain=3).eval(), build("llama").eval(), token_ids(2, 33)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    inputs, found = {"input_ids": ids, "attention_mask": mask}, Divergence()
    with torch.no_grad():
        found.add(OutputReader(one)(inputs), OutputReader(two)(inputs))
        log_p, log_q = (model(**inputs).logits.log_softmax(-1) for model in (one, two))
    want = (log_p.exp() * (log_p - log_q)).sum(-1)[mask.bool()].mean().item()
    assert found.mean == pytest.approx(want, rel=1e-5)
    assert found.weight == 53


def test_tokens_are_drawn_from_the_models_distribution(small_blocks):
    """E[g] = 0 and E[g g^T] is the Fisher information W^T (diag p - p p^T) W."""
    model, ids = llama(gain=3).eval(), token_ids(1, 12)
    with torch.no_grad():
        found = OutputReader(model)({"input_ids": ids})
        draws = torch.stack(found.gradients([0], 4000))[:, 0, -1].double()
        p, weight = model(input_ids=ids).logits[0, -1].double().softmax(-1), model.lm_head.weight.double()
    want = weight.T @ (p.diag() - p[:, None] * p) @ weight
    assert (draws.T @ draws / len(draws) - want).norm() < 0.1 * want.norm()
    assert draws.mean(0).norm() < 0.1 * draws.norm(dim=1).mean()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "bert", "vit", "jamba"])
def test_gradients_are_those_of_a_plain_backward_pass(family):
    model = converted(family)
    inputs = inputs_for(model, length=90)
    passes, got, seen = LayerGradients(model, adapters(model)), {}, {}

    def take(layer, gradient):
        got[layer.adapter.layer] = (gradient, layer.exact)

    with passes.watching():
        found = passes.forward(inputs)
        gradient = torch.ones_like(found.tensor)
        passes.backward(found, gradient, dict.fromkeys(passes.layers, take))

    def note(adapter, *args):
        seen[adapter.layer] = args[-1].retain_grad() or args[-1]

    for parameter in model.parameters():
        parameter.requires_grad_()
    with intercept(Interception(observers=dict.fromkeys(adapters(model), note))):
        OutputReader(model.eval())(inputs).tensor.backward(gradient)
    assert sorted(got) == [a.layer for a in adapters(model) if a.converted]
    for layer, (gradient, exact) in got.items():
        assert_close(exact, seen[layer].detach())
        assert_close(gradient, seen[layer].grad, atol=1e-5, rtol=1e-4)


def test_of_a_text_only_the_inputs_of_blocks_are_held():
    model, held = converted(), []
    passes = LayerGradients(model, adapters(model))

    def pack(x):
        held.append(x.shape)
        return x

    with passes.watching(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        passes.forward({"input_ids": token_ids(1, 64), "use_cache": False})
    intermediate = model.config.intermediate_size
    assert not any(intermediate in shape and 64 in shape for shape in held)


def test_a_model_without_a_graph_is_told():
    class Closed(T.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            with torch.no_grad():
                return super().forward(input_ids, **kwargs)

    model = hf_rfa.convert(Closed(llama().config), hf_rfa.RFAConfig(window=8, kept_keys=0), calibrate=False)
    with pytest.raises(UnsupportedModelError, match=r"No gradient flows through .*Closed"):
        hf_rfa.calibrate(model, token_ids(2, 90))


def test_half_precision_costs_are_those_of_full_precision():
    reports = []
    for dtype in (torch.float32, torch.bfloat16):
        model = converted(llama(gain=3).to(dtype), num_features=4)
        reports.append(hf_rfa.calibrate(model, token_ids(8, 120), plant_repeats=False))
    full, half = reports
    assert half.window_divergence == pytest.approx(full.window_divergence, rel=0.2)
    for one, two in zip(half.heads, full.heads, strict=True):
        assert one.window_cost == pytest.approx(two.window_cost, rel=0.4)


def test_an_attention_module_outside_of_lists_is_calibrated_too():
    model = build("llama")
    layers, model.model.layers = model.model.layers, nn.Sequential()
    for number, layer in enumerate(layers):
        model.model.layers.add_module(str(number), layer)
    report = hf_rfa.calibrate(converted(model), token_ids(2, 90))
    listed = hf_rfa.calibrate(converted(), token_ids(2, 90))
    assert [h.cost for h in report.heads] == pytest.approx([h.cost for h in listed.heads], rel=1e-4)
