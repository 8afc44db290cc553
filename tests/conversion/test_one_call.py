"""`convert` with nothing but a model: it calibrates itself, says what it did, and is never worse than its window."""

import copy
import dataclasses
import json

import paths
import pytest
import torch
from conversions import converted
from families import LONGEST, SHORT, build, inputs_for, outputs_of, short_llama, token_ids
from torch.testing import assert_close
from trained_by_hand import harmful_and_helpful
from trained_on_topics import topical, trained
from transformers import AutoModelForCausalLM

import hf_rfa
from hf_rfa import ConfigError, UnsupportedModelError
from hf_rfa.calibration.fitting import LayerFit
from hf_rfa.calibration.self_text import ROWS, write_text
from hf_rfa.runtime.record import conversion_config, is_converted

# --- one call --------------------------------------------------------------------------------------------------------


def test_one_call_calibrates_on_text_of_the_models_own():
    model = hf_rfa.convert(short_llama(), SHORT)
    report = hf_rfa.calibration_report(model)
    assert report.tokens == ROWS * LONGEST
    assert len(report.heads) == 4
    by_hand = converted(short_llama())
    hf_rfa.calibrate(by_hand, write_text(short_llama(), window=8))
    assert hf_rfa.calibration_report(by_hand).to_dict() == report.to_dict()
    for one, two in zip(model.model.layers, by_hand.model.layers, strict=True):
        assert_close(dict(one.self_attn.rfa.named_buffers()), dict(two.self_attn.rfa.named_buffers()))


def test_the_text_is_the_originals_and_a_function_of_the_seed():
    model = short_llama()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    text = write_text(model, window=8)
    assert torch.equal(torch.get_rng_state(), state)
    assert text.shape == (ROWS, LONGEST)
    assert (text[:, 0] == model.config.bos_token_id).all()
    assert torch.equal(write_text(model, window=8), text)
    assert not torch.equal(write_text(model, window=8, seed=1), text)
    with torch.no_grad():  # a sample of the model's distribution: its mean log-probability is minus the entropy
        log_p = model(text, use_cache=False).logits[:, :-1].log_softmax(-1)
    got = log_p.gather(-1, text[:, 1:, None]).mean().item()
    entropy = -(log_p.exp() * log_p).sum(-1).mean().item()
    assert got == pytest.approx(-entropy, abs=0.1)


def test_texts_of_ones_own():
    model = converted("bert", calibrate=[inputs_for(build("bert"), length=90)])
    assert hf_rfa.calibration_report(model).unit == "nats/token"  # of its masked-language head
    report = hf_rfa.calibration_report(converted("llama", calibrate=token_ids(2, 90)))
    assert report.tokens == 180


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("bert", SHORT, "cannot write a text to calibrate itself on. Pass texts of your own"),
        ("bart", SHORT, "cannot write a text to calibrate itself on"),
        ("vit", SHORT, "cannot write a text to calibrate itself on"),
        (None, hf_rfa.RFAConfig(), "texts of 120 tokens, in which nothing lies beyond two windows of 64"),
    ],
)
def test_what_cannot_calibrate_itself_is_refused_before_any_work(family, config, message):
    model = short_llama() if family is None else build(family)
    with pytest.raises(ConfigError, match=message):
        hf_rfa.convert(model, config)
    assert not is_converted(model)


def test_a_failing_calibration_gives_the_original_back():
    model, ids = short_llama(), token_ids(1, 60)
    before = outputs_of(model, {"input_ids": ids})
    with pytest.raises(ConfigError, match="longer than two windows"):
        hf_rfa.convert(model, SHORT, calibrate=ids[:, :10])
    assert not is_converted(model)
    assert torch.equal(outputs_of(model, {"input_ids": ids}), before)


def test_a_model_that_was_not_calibrated_has_no_report():
    model = converted(short_llama())
    with pytest.raises(UnsupportedModelError, match="not calibrated"):
        hf_rfa.calibration_report(model)


@pytest.mark.parametrize("way", ["ours", "the model's own"])
def test_the_report_is_saved_and_loaded(tmp_path, way):
    model = hf_rfa.convert(short_llama(), SHORT)
    if way == "ours":
        hf_rfa.save_pretrained(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    again = hf_rfa.from_pretrained(tmp_path)
    assert hf_rfa.calibration_report(again) == hf_rfa.calibration_report(model)
    assert json.loads((tmp_path / "rfa_config.json").read_text())["calibration"]["tokens"] == ROWS * LONGEST


def test_the_heat_map_is_written(tmp_path):
    hf_rfa.calibration_report(hf_rfa.convert(short_llama(), SHORT)).plot(tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 5_000


# --- what heads cost -------------------------------------------------------------------------------------------------


def test_the_costs_add_up_to_about_the_divergence():
    report = hf_rfa.calibrate(converted(short_llama()), token_ids(8, 110), plant_repeats=False)
    assert sum(h.cost for h in report.heads) == pytest.approx(report.divergence, rel=0.5)
    assert sum(h.window_cost for h in report.heads) == pytest.approx(report.window_divergence, rel=0.5)


def test_auto_keeps_the_fewest_heads_that_meet_the_budget():
    ids = token_ids(2, 100)
    free = hf_rfa.calibrate(converted(short_llama()), ids)
    total = sum(h.cost for h in free.heads)
    for budget, kept in ((2 * total, 0), (0.0, 1)):  # at most a quarter of four
        config = hf_rfa.RFAConfig(
            num_features=16, window=8, sink_tokens=2, softmax_heads="auto", loss_budget=budget
        )  # fmt: skip
        report = hf_rfa.calibrate(hf_rfa.convert(short_llama(), config, calibrate=False), ids)
        assert len(report.softmax_heads) == kept
        assert all((layer, head) == free.ranking[0][:2] for layer, head in report.softmax_heads)


# --- never worse than the window alone -------------------------------------------------------------------------------

FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "phi", "qwen3"]


def held_out_loss(model) -> float:
    with torch.no_grad():
        return sum(
            model(input_ids=ids, labels=ids, use_cache=False).loss.item()
            for ids in (topical(16, 100, seed) for seed in range(1000, 1004))
        ) / 4  # fmt: skip


@pytest.mark.parametrize("features", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_model_is_never_worse_than_its_window_alone(family, features):
    original = trained(family)
    config = hf_rfa.RFAConfig(num_features=features, window=8, sink_tokens=2)
    model = hf_rfa.convert(copy.deepcopy(original), config, calibrate=topical(4, 100, seed=500))
    window = hf_rfa.convert(
        copy.deepcopy(original),
        hf_rfa.RFAConfig(num_features=features, window=8, sink_tokens=2, gamma=0.0),
        calibrate=False,
    )
    report = hf_rfa.calibration_report(model)
    assert report.divergence <= report.window_divergence
    assert held_out_loss(model) <= held_out_loss(window) + 1e-4


def test_far_parts_that_harm_are_switched_off(monkeypatch):
    """A fit gone wrong: all weight on far keys, and on the wrong ones among them."""
    fit = LayerFit.choose

    def spoilt(self, weight):
        rows = fit(self, weight)
        self.adapter.gamma.fill_(1e6)
        self.adapter.query_center.mul_(-30)
        return [dataclasses.replace(row, gamma=1e6) for row in rows]

    monkeypatch.setattr(LayerFit, "choose", spoilt)
    model = harmful_and_helpful()
    report = hf_rfa.calibrate(model, torch.arange(5, 85)[None], plant_repeats=False)
    assert report.silenced == [0]
    assert not model.model.layers[0].self_attn.rfa.gamma.any()
    assert report.divergence == report.window_divergence > 0
    assert "switched off in layers [0]" in str(report)
    assert [h.gamma for h in report.heads] == [0.0, 0.0]


def test_the_window_alone_is_worse_for_the_models_of_these_tests():
    """Or the promise above would say nothing: far keys do help them."""
    original = trained("llama")
    config = hf_rfa.RFAConfig(num_features=16, window=8, sink_tokens=2, gamma=0.0)
    window = hf_rfa.convert(copy.deepcopy(original), config, calibrate=False)
    assert held_out_loss(window) > held_out_loss(original) + 1e-3


@pytest.mark.slow
def test_a_pretrained_model_needs_no_data():
    folder = paths.SHARED / "models" / "books-llama-copy"
    if not folder.is_dir():
        pytest.skip("needs a pretrained model that copies")
    model = hf_rfa.convert(AutoModelForCausalLM.from_pretrained(folder), hf_rfa.RFAConfig(softmax_heads="auto"))
    assert hf_rfa.calibration_report(model).ranking[0][:2] == (3, 1)
    assert (3, 1) in conversion_config(model).softmax_heads
