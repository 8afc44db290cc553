"""What torch does not promise: with it and without it the numbers are the same."""

import pytest
import torch
from operator_inputs import assert_near, random_inputs, with_gradients

import hf_rfa
import hf_rfa.ops.attention as operator
from hf_rfa.ops import compiled
from hf_rfa.ops.causal import near
from hf_rfa.ops.compiled import linear_heads_of_graph
from hf_rfa.ops.private import works

OPTIONS = {"feature_map": "positive", "window": 8, "sink_tokens": 2, "alpha": 0.4}


def both_ways(monkeypatch, module, probe, **options):
    """Outputs and gradients with the private call and without it."""
    inputs = random_inputs(70, value_dim=8, dtype=torch.float32)
    results = []
    for present in (True, False):
        monkeypatch.setattr(module, probe, lambda present=present: present)
        results.append(with_gradients(hf_rfa.rfa_attention, inputs, **OPTIONS, **options))
    return results


def assert_same(results, tolerance):
    (output, gradients), (other, others) = results
    assert_near(other, output, tolerance)
    for name, gradient in gradients.items():
        assert_near(others[name], gradient, tolerance, name)


def test_this_torch_has_them():
    assert near.kernel_works()
    assert compiled.recording_works()


@pytest.mark.parametrize("padded", [False, True])
def test_near_attention_with_and_without_the_kernel_of_torch(monkeypatch, padded):
    calls = []
    for name in ("_kernel_attention", "_kernel_gradients", "_plain_attention", "_plain_gradients"):
        whole = getattr(near, name)
        monkeypatch.setattr(near, name, lambda *args, name=name, whole=whole: calls.append(name) or whole(*args))
    token_mask = torch.arange(70).expand(2, -1) > 9 if padded else None
    assert_same(both_ways(monkeypatch, near, "kernel_works", token_mask=token_mask), 2e-6)
    assert len(set(calls)) == 4


@pytest.mark.parametrize("causal", [True, False])
def test_an_operation_of_a_graph_with_and_without_the_switches_of_autograd(monkeypatch, causal):
    monkeypatch.setattr(operator, "linear_heads", linear_heads_of_graph)
    calls = []
    for name in ("_by_autograd", "_by_transform"):
        whole = getattr(compiled, name)
        monkeypatch.setattr(compiled, name, lambda *args, name=name, whole=whole: calls.append(name) or whole(*args))
    assert_same(both_ways(monkeypatch, compiled, "recording_works", causal=causal), 1e-6)
    assert calls == ["_by_autograd", "_by_transform"]


def gone():
    raise AttributeError("no such operation")


@pytest.mark.parametrize(("check", "reason"), [(gone, "no such operation"), (lambda: False, "numbers are others")])
def test_a_call_that_is_not_what_it_was_is_named_once(check, reason):
    with pytest.warns(UserWarning, match=rf"does not have the thing as hf_rfa knows it .*{reason}"):
        assert not works("the thing", check)


def test_the_probes_notice_other_numbers(monkeypatch):
    whole = near._kernel_attention
    monkeypatch.setattr(near, "_kernel_attention", lambda *args: (whole(*args)[0], whole(*args)[1] * 1.01))
    assert not near._kernel_is_right()
    monkeypatch.undo()
    monkeypatch.setattr(near, "_kernel_gradients", lambda *args: [x * 2 for x in near._plain_gradients(*args)])
    assert not near._kernel_is_right()
