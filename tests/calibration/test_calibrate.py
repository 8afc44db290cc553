"""Calibration: the kernel of each head is fitted, heads that look things up are found, nothing else is touched."""

import dataclasses
import json
import math

import paths
import pytest
import torch
from conversions import adapters, converted, training_flags
from families import SHORT, build, inputs_for, llama, outputs_of, token_ids
from processes import launch
from torch.testing import assert_close
from trained_by_hand import harmful_and_helpful, looked_up, retrieving
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import hf_rfa
from hf_rfa import ConfigError, UnsupportedModelError
from hf_rfa.calibration.candidates import ALPHAS
from hf_rfa.calibration.fitting import GAMMAS
from hf_rfa.runtime.record import conversion_config


def text(rows=2, length=120):
    return token_ids(rows, length)


def divergence(original, model, ids):
    """KL(original || model), nats/token."""
    p, q = (outputs_of(each, {"input_ids": ids}).double().log_softmax(-1) for each in (original, model))
    return (p.exp() * (p - q)).sum(-1).mean().item()


# --- what is fitted --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_map", ["trigonometric", "positive", "hyperbolic", "optimal_positive"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "deepseek_v3", "gpt_oss", "jamba"])
def test_no_head_is_worse_than_its_window_alone(family, feature_map):
    model = converted(family, feature_map=feature_map)
    report = hf_rfa.calibrate(model, text(), plant_repeats=False)
    heads = [(a.layer, head) for a in adapters(model) if a.converted for head in range(a.key_heads)]
    assert [(h.layer, h.key_head) for h in report.heads] == heads
    assert all(0 <= h.cost <= h.window_cost for h in report.heads)
    assert any(h.cost < 0.9 * h.window_cost for h in report.heads)
    assert report.tokens == 240


def test_the_report_says_what_the_adapters_hold():
    model = converted()
    report = hf_rfa.calibrate(model, text())
    for head in report.heads:
        adapter = adapters(model)[head.layer]
        assert adapter.alpha[head.key_head].item() == pytest.approx(head.alpha)
        assert adapter.gamma[head.key_head].item() == pytest.approx(head.gamma)
        assert (head.alpha, head.gamma) == (0, 0) or (head.alpha in ALPHAS and head.gamma in GAMMAS)


@pytest.mark.parametrize("feature_map", ["trigonometric", "hyperbolic"])
def test_costs_are_the_divergence_that_is_measured(feature_map):
    """Of each head alone, all others exact; with its far part and with the window alone."""
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    reference, model, ids = llama(gain=3).eval(), converted(llama(gain=3), feature_map=feature_map), text(8, 160)
    report = hf_rfa.calibrate(model, ids, plant_repeats=False)
    costs = {(h.layer, h.key_head): (h.cost, h.window_cost) for h in report.heads}
    assert report.divergence == pytest.approx(divergence(reference, model, ids), rel=1e-3)
    kernels = [adapter.gamma.clone() for adapter in adapters(model)]
    for far in (True, False):
        for adapter, gamma in zip(adapters(model), kernels, strict=True):
            adapter.set_kernel(adapter.feature_maps, gamma=gamma * far)
        for head in heads:
            hf_rfa.set_softmax_heads(model, [other for other in heads if other != head])
            cost = costs[head][0 if far else 1]
            assert cost == pytest.approx(divergence(reference, model, ids), rel=0.35, abs=2e-5), (head, far)


def test_the_calibrated_model_is_nearer_to_the_original():
    reference, model = build("llama"), converted(alpha=1.5)
    ids = text(2, 120)
    before = divergence(reference, model, ids)
    hf_rfa.calibrate(model, ids, plant_repeats=False)
    assert divergence(reference, model, ids) < before


def test_where_the_far_part_only_harms_there_is_none():
    """Head 0 sees the last few tokens only, by a rotation that far keys never match; head 1 averages over all."""
    model = harmful_and_helpful()
    report = hf_rfa.calibrate(model, torch.arange(5, 85)[None], plant_repeats=False)
    local, average = report.heads
    assert (local.alpha, local.gamma) == (0, 0)
    assert local.cost == local.window_cost < 1e-3
    assert average.gamma > 0
    assert average.cost < 0.1 * average.window_cost


def test_pure_random_features_are_calibrated_too():
    model = converted(window=0, feature_map="positive")
    report = hf_rfa.calibrate(model, text())
    assert all(h.gamma == 1.0 and math.isnan(h.window_cost) for h in report.heads)
    assert all(math.isfinite(h.cost) for h in report.heads)
    assert torch.isfinite(outputs_of(model, inputs_for(model))).all()


def test_calibrating_twice_is_calibrating_once():
    model = converted(softmax_heads=0.25)
    first = hf_rfa.calibrate(model, text())
    again = hf_rfa.calibrate(model, text())
    assert [h.cost for h in again.heads] == [h.cost for h in first.heads]
    assert again.softmax_heads == first.softmax_heads


def test_several_batches_are_one_text():
    one, two = converted(), converted()
    whole = hf_rfa.calibrate(one, text(4), plant_repeats=False)
    parts = hf_rfa.calibrate(two, (row[None] for row in text(4)), plant_repeats=False)
    assert parts.tokens == whole.tokens == 480
    for a, b in zip(whole.heads, parts.heads, strict=True):
        assert (a.alpha, a.gamma) == (b.alpha, b.gamma)
        assert a.cost == pytest.approx(b.cost, rel=1e-4)


def test_layers_with_softmax_of_their_own_are_left_out():
    model = converted("gemma3")
    report = hf_rfa.calibrate(model, text())
    assert {head.layer for head in report.heads} == {1}
    assert adapters(model)[0].softmax_heads == (0, 1)


@pytest.mark.parametrize("family", ["bert", "vit", "bart"])
def test_dictionaries_are_the_models_own_arguments(family):
    model = converted(family)
    batch = {name: value for name, value in inputs_for(model, length=90).items() if isinstance(value, torch.Tensor)}
    if family == "bert":
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    report = hf_rfa.calibrate(model, [batch, batch])
    assert all(h.cost <= h.window_cost for h in report.heads)
    assert torch.isfinite(outputs_of(model, batch)).all()


# --- exact heads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "count"), [(None, 0), (0.0, 0), (0.25, 1), (0.5, 2), (1.0, 4), ([(1, 1), (0, 0)], 2)]
)
def test_softmax_heads_are_resolved_and_stored(setting, count):
    model = converted(softmax_heads=setting)
    report = hf_rfa.calibrate(model, text())
    chosen = report.softmax_heads
    assert len(chosen) == count
    if isinstance(setting, float):
        assert sorted(chosen) == sorted((layer, head) for layer, head, _ in report.ranking[:count])
    if isinstance(setting, list):
        assert chosen == [(0, 0), (1, 1)]
    assert list(conversion_config(model).softmax_heads) == chosen
    assert model.config.rfa_config["softmax_heads"] == [list(pair) for pair in chosen]
    assert [(a.layer, head) for a in adapters(model) for head in a.softmax_heads] == chosen


def test_the_ranking_is_by_cost_worst_first():
    ranking = hf_rfa.calibrate(converted(), text()).ranking
    assert [cost for *_, cost in ranking] == sorted((cost for *_, cost in ranking), reverse=True)
    assert sorted(pair[:2] for pair in ranking) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_auto_keeps_few_heads_or_none():
    model = converted(softmax_heads="auto")
    report = hf_rfa.calibrate(model, text())
    assert len(report.softmax_heads) <= 1
    harmless = converted(softmax_heads="auto", window=64)
    with torch.no_grad():
        for layer in harmless.model.layers:
            layer.self_attn.q_proj.weight.zero_()  # every head averages: nothing to keep
    assert hf_rfa.calibrate(harmless, text(2, 200), plant_repeats=False).softmax_heads == []


@pytest.mark.parametrize("setting", ["auto", 0.5])
@pytest.mark.parametrize("feature_map", ["trigonometric", "positive"])
def test_a_planted_retrieval_head_is_found_and_kept(feature_map, setting):
    reference = retrieving()
    config = dataclasses.replace(SHORT, num_features=32, feature_map=feature_map, softmax_heads=setting)
    model = hf_rfa.convert(retrieving(), config, calibrate=False)
    report = hf_rfa.calibrate(model, looked_up(), plant_repeats=False)
    assert report.ranking[0][:2] == (0, 1)
    assert report.heads[1].cost > 0.01 > 1e-4 > report.heads[0].cost
    assert report.softmax_heads == [(0, 1)]
    inputs = {"input_ids": looked_up(), "use_cache": False}
    assert_close(outputs_of(model, inputs), outputs_of(reference, inputs), atol=1e-3, rtol=0)


def test_repeats_are_planted_at_the_end_of_plain_texts_only():
    model, seen = converted(), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    ids = text(2, 120)
    hf_rfa.calibrate(model, ids)
    hf_rfa.calibrate(model, ids, plant_repeats=False)
    hf_rfa.calibrate(model, {"input_ids": ids})
    texts = [ids for n, ids in enumerate(seen) if n == 0 or not torch.equal(ids, seen[n - 1])]
    planted, plain = texts  # the dictionary's, too, is plain
    given = seen[-1]
    assert torch.equal(planted[:, :-15], ids[:, :-15])
    assert torch.equal(planted[:, -15:], ids[:, 30:45])
    assert torch.equal(plain, ids)
    assert torch.equal(given, ids)


PRETRAINED = paths.SHARED / "models" / "books-llama-copy"


@pytest.mark.slow
@pytest.mark.skipif(not PRETRAINED.is_dir(), reason="needs a pretrained model that copies")
def test_the_retrieval_head_of_a_pretrained_model_is_found():
    model = AutoModelForCausalLM.from_pretrained(PRETRAINED, dtype=torch.float32).eval()
    hf_rfa.convert(model, hf_rfa.RFAConfig(softmax_heads="auto"), calibrate=False)
    generator = torch.Generator().manual_seed(0)
    report = hf_rfa.calibrate(model, torch.randint(5, 4000, (2, 512), generator=generator))
    assert report.ranking[0][:2] == (3, 1)
    assert (3, 1) in report.softmax_heads


# --- what is left alone ----------------------------------------------------------------------------------------------


def test_training_flags_gradients_and_weights_are_as_before():
    model = converted().train()
    model.model.layers[0].mlp.eval()
    before, weights = training_flags(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    hf_rfa.calibrate(model, text())
    assert training_flags(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    assert all(p.grad is None and torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_omega_and_the_draw_are_as_before():
    model = converted(resample="forward").train()
    before = [adapter.omega.clone() for adapter in adapters(model)]
    hf_rfa.calibrate(model, text())
    assert all(torch.equal(adapter.omega, old) for adapter, old in zip(adapters(model), before, strict=True))
    assert {adapter.draw_number for adapter in adapters(model)} == {0}


class BrokenSourceError(Exception):
    pass


def fails():
    yield text()
    raise BrokenSourceError


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        (fails, BrokenSourceError),
        (lambda: {"input_ids": text(), "inputs_embeds": torch.zeros(2, 120, 64)}, ValueError),
    ],
    ids=["source", "model"],
)
def test_after_a_failure_the_model_is_as_before(batches, error):
    model = converted(softmax_heads=[(1, 0)]).train()
    before, output = training_flags(model), outputs_of(model.eval(), inputs_for(model))
    model.train()
    with pytest.raises(error):
        hf_rfa.calibrate(model, batches())
    assert training_flags(model) == before
    assert torch.equal(outputs_of(model.eval(), inputs_for(model)), output)


NOTHING_FAR = {"none": [], "iterator": iter(()), "two windows": [token_ids(2, 16)], "short": token_ids(2, 3)}


@pytest.mark.parametrize("batches", NOTHING_FAR.values(), ids=NOTHING_FAR)
def test_nothing_far_is_an_error_and_changes_nothing(batches):
    model = converted()
    before = outputs_of(model, inputs_for(model))
    with pytest.raises(ConfigError, match="batch"):
        hf_rfa.calibrate(model, batches)
    assert torch.equal(outputs_of(model, inputs_for(model)), before)


def test_an_unconverted_model_is_refused():
    with pytest.raises(UnsupportedModelError, match="not converted"):
        hf_rfa.calibrate(build("llama"), text())


def test_the_layers_answer_with_softmax_while_it_runs():
    """What each layer sees is what it sees in the original model."""
    reference, model, seen = build("llama"), converted(), []
    model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    hf_rfa.calibrate(model, text(), plant_repeats=False)
    with torch.no_grad():
        want = reference.model(input_ids=text()).last_hidden_state
    assert_close(seen[0].detach(), want, atol=1e-5, rtol=0)
    assert len(seen) == 3  # that of the fit; the window alone and the result are measured


def test_the_centres_are_the_mean_queries_and_keys_of_the_original():
    """By hand, from the first layer's projections and rotary positions, over two batches of different length."""
    model, seen = converted(), []
    attention = model.model.layers[0].self_attn

    def keep(module, args, kwargs):
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        hidden = hidden.detach()
        q, k = (p(hidden).view(shape).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
        seen.append(apply_rotary_pos_emb(q, k, cos, sin))

    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        hf_rfa.calibrate(model, [text(2, 120), text(1, 60)], plant_repeats=False)
    hook.remove()
    heads = attention.rfa.key_heads
    q = torch.cat([q.unflatten(1, (heads, -1)).permute(1, 0, 2, 3, 4).flatten(1, 3) for q, _ in seen[:2]], dim=1)
    k = torch.cat([k.transpose(0, 1).flatten(1, 2) for _, k in seen[:2]], dim=1)
    # Each head has these, or those of the pairs that attention lies on (test_geometry).
    plain = [bool((attention.rfa.query_center[head] - q[head].mean(0)).abs().max() < 1e-5) for head in range(heads)]
    assert any(plain)
    assert_close(attention.rfa.key_center[plain], k.mean(1)[plain], atol=1e-5, rtol=0)
    assert attention.rfa.key_center.abs().max() > 1e-2


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_prints_and_serialises():
    report = hf_rfa.calibrate(converted(softmax_heads=0.25), text())
    lines = str(report).splitlines()
    assert "240 tokens" in lines[0]
    assert (SHORT.window, SHORT.sink_tokens) == (8, 2)
    assert lines[1] == "window 8: a query of a causal layer sees 8 to 16 tokens and the first 2 exactly"
    assert len(lines) == 5 + 4
    assert lines[5].split()[-1] == "softmax"
    assert [line.split()[-1] for line in lines[6:]] == ["linear"] * 3
    values = json.loads(json.dumps(report.to_dict()))
    assert values["tokens"] == 240
    assert [row["key_head"] for row in values["heads"]] == [0, 1, 0, 1]
    assert type(report).from_dict(values) == report
    old = {name: value for name, value in values.items() if name not in ("window", "sink_tokens")}
    assert len(str(type(report).from_dict(old)).splitlines()) == len(lines) - 1  # of a version that did not say


def test_a_report_of_a_version_that_fitted_to_the_layers_output_loads():
    report = hf_rfa.calibrate(converted(softmax_heads=0.25), text())
    values = report.to_dict()
    values["heads"] = [
        {**{name: x for name, x in head.items() if name != "window_cost"}, "loss": 0.1, "window_loss": 0.2}
        for head in values["heads"]
    ]
    loaded = type(report).from_dict(values)
    assert [h.cost for h in loaded.heads] == [h.cost for h in report.heads]
    assert all(math.isnan(h.window_cost) for h in loaded.heads)
    assert len(str(loaded).splitlines()) == len(str(report).splitlines())


def test_a_text_in_which_nothing_is_far_is_told(caplog):
    """Every key outside of the window is kept: the far part cannot be fitted, and is off."""
    with caplog.at_level("WARNING", logger="hf_rfa"):
        report = hf_rfa.calibrate(converted(kept_keys=400), text())
    assert [record.args for record in caplog.records if "nothing is far" in record.message] == [(0,), (1,)]
    assert {h.gamma for h in report.heads} == {0.0}
    caplog.clear()
    hf_rfa.calibrate(converted(kept_keys=4), text())
    assert not caplog.records


# --- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.multi_process
def test_statistics_are_added_over_processes(tmp_path):
    """Two processes with half of the rows each fit what one process fits on all of them."""
    launch([str(paths.TESTS / "worker_calibrate.py"), str(tmp_path)], 2)
    first, second = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    patterns = [(tmp_path / f"pattern-{rank}.json").read_text() for rank in (0, 1)]
    assert patterns[0] == patterns[1]
    alone = hf_rfa.calibration_report(converted("llama", calibrate=token_ids(4, 120))).to_dict()
    assert first["tokens"] == alone["tokens"] == 480
    assert first["divergence"] == pytest.approx(alone["divergence"], rel=1e-4)
    for got, want in zip(first["heads"], alone["heads"], strict=True):
        assert (got["alpha"], got["gamma"]) == (want["alpha"], want["gamma"])
        assert got["cost"] == pytest.approx(want["cost"], rel=1e-3)
