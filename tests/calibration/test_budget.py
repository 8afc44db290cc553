"""A budget in bytes is spent along the hull of nats against bytes; patterns carry the choice to another model."""

import copy
import dataclasses
import itertools
import json
import re

import pytest
import torch
from conversions import adapters, converted
from families import build, llama, token_ids
from trained_on_topics import topical, trained

import hf_rfa
from hf_rfa import CheckpointError, ConfigError
from hf_rfa.budget_curve import CurveStep, summary
from hf_rfa.calibration import head_choice
from hf_rfa.calibration.budget import Way, numbers_for, spend
from hf_rfa.calibration.loss_walk import walk_to_loss
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.runtime.record import conversion_config

BUDGET = {"window": 8, "sink_tokens": 2, "num_features": 2, "budget": 0.6, "budget_context": 400}


def test_steps_go_along_the_hull():
    """A step that saves little may lie before one that saves much: both are bought as one."""
    ways = {(0, 0): [Way(0, 10, 1.0), Way(32, 20, 0.95), Way(64, 30, 0.1), Way(None, 100, 0.0)]}
    chosen, curve = spend(ways, 30)
    assert chosen[0, 0].kept_keys == 64
    assert [(step.bytes, step.nats) for step in curve] == [(10, 1.0), (30, 0.1)]
    assert spend(ways, 29)[0][0, 0].kept_keys == 0  # the hull has no way that costs 20


def test_no_other_choice_of_the_same_bytes_costs_less_on_convex_curves():
    generator = torch.Generator().manual_seed(0)
    ways = {}
    for head in range(4):
        gains = torch.rand(3, generator=generator).sort(descending=True).values.tolist()
        costs = [sum(gains[n:]) for n in range(4)]
        ways[0, head] = [Way(number, 10.0 * (number + 1), cost) for number, cost in enumerate(costs)]
    for budget in (60, 90, 120):
        chosen, curve = spend(ways, budget)
        best = min(
            sum(way.cost for way in choice)
            for choice in itertools.product(*ways.values()) if sum(way.price for way in choice) <= budget
        )  # fmt: skip
        assert sum(way.cost for way in chosen.values()) == pytest.approx(best)
        assert curve[-1].nats == pytest.approx(best)
        assert [step.bytes for step in curve] == sorted(step.bytes for step in curve)


def test_the_walk_is_the_same_whatever_ends_it():
    ways = {
        (0, 0): [Way(0, 10, 0.5), Way(64, 20, 0.1), Way(None, 90, 0.0)],
        (0, 1): [Way(0, 10, 0.2), Way(None, 90, 0)],
    }
    whole = spend(ways)[1]
    assert [step.nats for step in whole] == [0.7, 0.3, 0.1, 0.0]
    for number, step in enumerate(whole):
        assert spend(ways, steps=number)[1] == spend(ways, step.bytes)[1] == whole[: number + 1]


def test_few_heads_may_become_exact():
    ways = {(0, head): [Way(0, 10, head + 1), Way(32, 20, head + 0.5), Way(None, 40, 0.0)] for head in range(4)}
    chosen, curve = spend(ways, most_exact=1)
    assert [head for head, way in chosen.items() if way.kept_keys is None] == [(0, 3)]
    assert all(chosen[0, head].kept_keys == 32 for head in range(3))
    assert curve[-1].nats == sum(head + 0.5 for head in range(3))
    assert all(way.kept_keys == 32 for way in spend(ways, most_exact=0)[0].values())


def test_where_an_exact_head_is_the_cheaper_one_still_only_the_costliest_become_exact():
    """In short contexts the state of a linear head may take more bytes than all keys."""
    ways = {(0, head): [Way(4, 50, float(head)), Way(None, 40, 0.0)] for head in range(4)}
    assert spend(ways, steps=1, most_exact=4)[0][0, 3].kept_keys is None
    assert [step.nats for step in spend(ways, steps=1, most_exact=4)[1]] == [6, 3]
    assert {way.kept_keys for way in spend(ways, 1000)[0].values()} == {None}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_budget_and_a_loss_budget_agree_on_the_curve(family):
    """Whoever asks for a loss gets bytes; whoever asks for these bytes gets the same heads, and the same loss."""
    original, texts = trained(family), topical(4, 200, seed=1)
    own = {name: value for name, value in BUDGET.items() if name != "budget"}

    def choice(**settings):
        model = hf_rfa.convert(copy.deepcopy(original), hf_rfa.RFAConfig(**own | settings), calibrate=texts)
        config, curve = conversion_config(model), hf_rfa.calibration_report(model).curve
        return (config.softmax_heads, config.kept_keys, config.head_kept_keys), curve

    whole = choice(budget=1.0)[1]
    by_loss, curve = choice(softmax_heads="auto", kept_keys="auto", loss_budget=whole[4].nats + 1e-9)  # it is rounded
    assert 2 < len(curve) < len(whole)
    assert curve == whole[: len(curve)]
    token = sum(2 * a.omega.shape[2] * 4 * a.key_heads for a in adapters(converted(copy.deepcopy(original))))
    by_bytes, same = choice(budget=(curve[-1].bytes + 0.5) / (token * 400))
    assert same == curve
    assert by_bytes == by_loss
    assert by_loss[2]


@pytest.mark.parametrize("factor", [0.2, 1, 5])
def test_a_loss_budget_is_kept_however_wrong_the_estimates_are(factor, monkeypatch):
    """Costs rank, and are no promise: on SmolLM2 their sum is a third of the divergence."""
    original, texts, own = trained("llama"), topical(4, 200, seed=1), head_choice.costs_on

    def wrong(*arguments, **options):
        found = own(*arguments, **options)
        return {number: {head: factor * cost for head, cost in costs.items()} for number, costs in found.items()}

    monkeypatch.setattr(head_choice, "costs_on", wrong)
    settings = {name: value for name, value in BUDGET.items() if name != "budget"}

    def divergence(**more):
        model = hf_rfa.convert(copy.deepcopy(original), hf_rfa.RFAConfig(**settings, **more), calibrate=texts)
        return hf_rfa.calibration_report(model).divergence

    highest = divergence(softmax_heads=None, kept_keys=0)
    loss = highest / 3
    found = divergence(softmax_heads="auto", kept_keys="auto", loss_budget=loss)
    assert 0.6 * loss < found <= loss


def test_a_loss_that_is_not_to_be_had_is_said_and_all_is_bought(caplog):
    config = hf_rfa.RFAConfig(window=8, sink_tokens=2, kept_keys=3, softmax_heads="auto", loss_budget=0.0)
    model = hf_rfa.convert(build("llama"), config, calibrate=token_ids(2, 200))
    report = hf_rfa.calibration_report(model)
    said = f"loss_budget=0 is exceeded: the model diverges by {report.divergence:.4g} with all that there is to buy"
    assert said in caplog.text
    caplog.clear()
    hf_rfa.calibrate(hf_rfa.convert(build("llama"), dataclasses.replace(config, loss_budget=9.0)), token_ids(2, 200))
    assert "loss_budget" not in caplog.text


def steps_of(*nats):
    return [CurveStep(float(place), value, None, None, None) for place, value in enumerate(nats)]


FACTORS = {
    "too high": lambda n: 0.3, "right": lambda n: 1, "too low": lambda n: 3, "ever lower": lambda n: 1 + n / 20,
    "less low": lambda n: 5 - n / 50,
}  # fmt: skip


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_few_measurements_find_the_place_of_a_loss(factor):
    curve = steps_of(*(0.97**n for n in range(200)))
    asked = []

    def measure(place):
        asked.append(place)
        return factor(place) * curve[place].nats

    place, found = walk_to_loss(curve, 0.2, measure)
    assert 0.8 * 0.2 <= found <= 0.2
    assert found == factor(place) * curve[place].nats
    assert len(asked) == len(set(asked)) <= 5


def test_a_divergence_that_falls_at_one_step_is_found():
    """As on SmolLM2, where one step of 538 takes it from 0.058 to 0.012, and the estimates do not show it."""
    curve = steps_of(*(0.99**n for n in range(540)))
    asked = []

    def measure(place):
        asked.append(place)
        return curve[place].nats / 3 + (0.05 if place < 263 else 0.0)

    place, found = walk_to_loss(curve, 0.04, measure)
    assert found <= 0.04
    assert 263 <= place <= 263 * 1.01 + 1
    assert len(asked) <= 7


def test_nothing_is_given_up_while_something_is_left_to_buy():
    """A divergence that hardly falls before the last steps."""
    curve = steps_of(*(0.99**n for n in range(540)))
    asked = []

    def measure(place):
        asked.append(place)
        return 0.01 if place > 530 else 0.051

    place, found = walk_to_loss(curve, 0.05, measure)
    assert found == 0.01
    assert place > 530
    assert len(asked) <= 7


def test_the_ends_of_the_curve_are_ends_of_the_search():
    curve = steps_of(4.0, 3.0, 2.0, 1.0)
    assert walk_to_loss(curve, 9.0, lambda place: 0.1) == (0, 0.1)  # nothing is left to save
    assert walk_to_loss(curve, 0.5, lambda place: curve[place].nats) == (3, 1.0)  # not enough, and all there is
    assert walk_to_loss(curve, 2.5, lambda place: 8 - place) == (3, 5.0)
    measured = [9, 7, 2.6, 1.5]  # of two neighbours one fails and one meets
    assert walk_to_loss(curve, 2.5, lambda place: measured[place]) == (3, 1.5)
    assert walk_to_loss(steps_of(0.0), 0.0, lambda place: 0.3) == (0, 0.3)
    assert walk_to_loss(steps_of(1.0, 0.0), 0.0, lambda place: 0.0) == (1, 0.0)


def test_auto_alone_leaves_the_kept_keys_as_they_are():
    config = hf_rfa.RFAConfig(window=8, sink_tokens=2, kept_keys=3, softmax_heads="auto", loss_budget=0.0)
    model = hf_rfa.convert(build("llama"), config, calibrate=token_ids(2, 200))
    got, report = conversion_config(model), hf_rfa.calibration_report(model)
    assert (got.kept_keys, got.head_kept_keys, len(got.softmax_heads)) == (3, None, 1)
    assert got.softmax_heads == (report.ranking[0][:2],)
    assert [step.kept_keys for step in report.curve] == [None, None]
    assert report.curve[0].nats == pytest.approx(sum(head.cost for head in report.heads), abs=2e-9)
    assert report.curve[1].nats == pytest.approx(report.curve[0].nats - report.ranking[0][2], abs=2e-9)


def test_kept_keys_alone_are_chosen_beside_the_exact_heads_that_are_listed():
    config = hf_rfa.RFAConfig(window=8, sink_tokens=2, kept_keys="auto", softmax_heads=[(1, 1)], loss_budget=0.0)
    undecided = hf_rfa.convert(build("llama"), config, calibrate=False)
    assert hf_rfa.RFAConfig.from_dict(conversion_config(undecided).to_dict()).kept_keys == "auto"
    with pytest.raises(ConfigError, match=r"not decided yet.*kept_keys='auto'"):
        hf_rfa.save_pattern(undecided, "never written")
    hf_rfa.calibrate(undecided, token_ids(2, 200))
    got, curve = conversion_config(undecided), hf_rfa.calibration_report(undecided).curve
    assert got.softmax_heads == ((1, 1),)
    assert {head for head, _ in got.head_kept_keys} == {(0, 0), (0, 1), (1, 0)}
    assert curve[-1].nats < curve[0].nats
    assert all(step.kept_keys for step in curve[1:])
    assert isinstance(got.kept_keys, int)


def test_the_report_shows_what_bytes_bought():
    model = hf_rfa.convert(trained("llama"), hf_rfa.RFAConfig(**BUDGET), calibrate=topical(4, 200, seed=1))
    report = hf_rfa.calibration_report(model)
    rows = summary(report.curve, rows=3)
    assert len(rows) == 5
    assert rows[-1][1] == f"{report.curve[-1].nats:.5f}"
    bought = "; ".join(row[2] for row in rows)
    for layer, head in report.softmax_heads:
        assert f"{layer}.{head}" in bought.split("exact:", 1)[1]
    assert "what bytes buy" in str(report)
    assert "what bytes buy" not in str(dataclasses.replace(report, curve=[]))
    assert summary([]) == [rows[0]]


def test_a_budget_decides_the_heads_of_a_model(tmp_path):
    model = hf_rfa.convert(trained("llama"), hf_rfa.RFAConfig(**BUDGET), calibrate=topical(4, 200, seed=1))
    report, config = hf_rfa.calibration_report(model), conversion_config(model)
    budget = 0.6 * 400 * 2 * 16 * 4 * sum(adapter.key_heads for adapter in adapters(model))
    assert report.curve[0].bytes < report.curve[-1].bytes <= budget
    assert report.curve[-1].nats < report.curve[0].nats
    numbers = dict(config.head_kept_keys or ())
    exact = [step for step in report.curve if step.layer is not None and step.kept_keys is None]
    assert sorted((step.layer, step.key_head) for step in exact) == list(config.softmax_heads)
    assert len(numbers) + len(config.softmax_heads) == 4
    assert len(report.curve_table().splitlines()) == 1 + len(report.curve)
    report.plot_curve(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 3_000
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))).curve == report.curve
    with torch.no_grad():  # the bytes that are counted are those of the cache, but for a few numbers per key
        cache = cache_of(model(input_ids=topical(1, 400, seed=2), use_cache=True))
    assert hf_rfa.cache_bytes(cache) == pytest.approx(report.curve[-1].bytes, rel=0.25)


def test_no_head_is_offered_more_keys_than_half_of_the_text():
    """Of a text that a head keeps almost whole it forgets nothing, and would seem to cost nothing in longer ones."""
    settings = BUDGET | {"budget": "400 tokens"}  # more than there is to buy
    for length, most in ((150, 64), (300, 128)):
        model = hf_rfa.convert(build("llama"), hf_rfa.RFAConfig(**settings), calibrate=token_ids(2, length))
        assert {step.kept_keys for step in hf_rfa.calibration_report(model).curve} - {None} <= set(numbers_for(length))
        assert max(number for _, number in conversion_config(model).head_kept_keys) == most
    assert numbers_for(8192)[-3:] == (1024, 2048, 4096)


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ("30 tokens", r"take at least \d\.\d{3} MiB of cache, more than the budget='30 tokens', \d\.\d{3} MiB.*Raise"),
        ("120 tokens", None),
        ("400 tokens", r"budget='400 tokens', .* only \d\.\d{3} MiB are spent: .* 200 tokens .* 64 kept keys\. Calib"),
    ],
)
def test_a_budget_that_is_not_what_is_spent_is_told(caplog, budget, told):
    """Short texts offer few kept keys, and no head takes less than its window."""
    settings = BUDGET | {"budget": budget, "window": 16}
    with caplog.at_level("WARNING", logger="hf_rfa"):
        model = hf_rfa.convert(build("llama"), hf_rfa.RFAConfig(**settings), calibrate=token_ids(2, 200))
    said = [record.getMessage() for record in caplog.records if "budget" in record.getMessage()]
    assert len(said) == (told is not None)
    assert told is None or re.search(told, said[0])
    report = hf_rfa.calibration_report(model)
    token = sum(2 * a.omega.shape[2] * 4 * a.key_heads for a in adapters(model))
    assert report.budget == int(budget.split()[0]) * token
    assert report.sold_out == (budget == "400 tokens")
    spent = f"budget: {report.budget / 2**20:.3f} MiB, spent: {report.curve[-1].bytes / 2**20:.3f} MiB"
    assert spent + ": nothing else lowers the cost" * report.sold_out in str(report)
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_more_bytes_cost_fewer_nats():
    nats = []
    for budget in ("40 tokens", "80 tokens", "200 tokens"):
        model = hf_rfa.convert(build("llama"), hf_rfa.RFAConfig(**BUDGET | {"budget": budget}), calibrate=False)
        nats.append(hf_rfa.calibrate(model, token_ids(2, 200)).curve[-1].nats)
        assert conversion_config(model).softmax_heads == ()  # it is for any length
    assert nats == sorted(nats, reverse=True)
    assert nats[0] > nats[-1]


@pytest.mark.parametrize("budget", [0.0, 1.5, "many", 3, "0 tokens"])
def test_what_is_no_budget(budget):
    with pytest.raises(ConfigError, match="`budget` must be"):
        hf_rfa.RFAConfig(budget=budget)
    with pytest.raises(ConfigError, match="need a window"):
        hf_rfa.RFAConfig(budget=0.5, window=0)


def test_a_pattern_is_applied_without_ranking(tmp_path):
    config = hf_rfa.RFAConfig(window=8, sink_tokens=2, softmax_heads=[(1, 1)], head_kept_keys={(0, 1): 9}, kept_keys=4)
    hf_rfa.save_pattern(converted(config=config), tmp_path / "p.json")
    other = hf_rfa.RFAConfig(window=8, sink_tokens=2, softmax_heads="auto")
    model = hf_rfa.convert(build("llama"), other, pattern=tmp_path / "p.json", calibrate=token_ids(2, 90))
    got = conversion_config(model)
    assert (got.softmax_heads, got.head_kept_keys, got.kept_keys) == (((1, 1),), (((0, 1), 9),), 4)
    assert hf_rfa.calibration_report(model).softmax_heads == [(1, 1)]


def test_patterns_that_do_not_fit(tmp_path):
    model = converted()
    hf_rfa.save_pattern(model, tmp_path / "p.json")
    with pytest.raises(ConfigError, match="is of another model: LlamaForCausalLM"):
        hf_rfa.convert(llama(num_hidden_layers=3), pattern=tmp_path / "p.json", calibrate=False)
    with pytest.raises(CheckpointError, match="Cannot read the pattern"):
        hf_rfa.convert(build("llama"), pattern=tmp_path / "none.json", calibrate=False)
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is no pattern of version 1"):
        hf_rfa.convert(build("llama"), pattern=tmp_path / "p.json", calibrate=False)
    with pytest.raises(ConfigError, match="not decided yet"):
        hf_rfa.save_pattern(converted(softmax_heads=0.25), tmp_path / "p.json")
