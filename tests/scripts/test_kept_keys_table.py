"""The table of selection rules: its plain attention is held to the package, its bounds to what they mean."""

import copy
import dataclasses

import paths
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_rfa
from hf_rfa.ops.combine import combine
from hf_rfa.runtime.adapters import require_adapters

SCRIPTS = paths.SCRIPTS / "experiments"
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS, WINDOW, KEPT = 300, 16, 24


@pytest.fixture
def table(imported):
    return imported("kept_keys_table", SCRIPTS)


@pytest.fixture
def model():
    torch.manual_seed(0)
    small = LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=48, vocab_size=64))
    for parameter in small.parameters():
        parameter.data *= 8  # attention that chooses
    config = hf_rfa.RFAConfig(window=WINDOW, kept_keys=KEPT, num_features=8)
    return hf_rfa.convert(small, config, calibrate=False).eval()


@pytest.mark.parametrize(("window", "kept", "far"), [(16, 24, True), (16, 24, False), (32, 8, True), (16, 0, True)])
def test_the_costs_of_the_packages_rule_are_those_of_head_costs(table, model, window, kept, far):
    ids = torch.randint(64, (TOKENS,), generator=torch.Generator().manual_seed(1))
    option = hf_rfa.HeadOption(window=window, kept_keys=kept, far=far)
    theirs = hf_rfa.head_costs(model, ids[None], {"now": option}, draws=2)["now"]
    layers = table.captured(model, ids, 2)
    kernels = [{"hyperbolic": adapter.kernel} for adapter in require_adapters(model)]
    line = table.Line(table.PRODUCT, window, kept, "hyperbolic" if far else None)
    gammas = {(number, "hyperbolic", window, kept): torch.ones(2) for number in range(2)}
    errors = table.errors_of(layers, kernels, [line], gammas)[line]
    ours = errors.square().mean((0, 2)) / 2
    torch.testing.assert_close(ours, torch.tensor(list(theirs.values())), rtol=1e-3, atol=0)
    assert ours.min() > 1e-6


def test_every_rule_keeps_as_many_keys_and_loses_none(table, model):
    ids = torch.randint(64, (TOKENS,), generator=torch.Generator().manual_seed(1))
    layer = table.captured(model, ids, 1)[0]
    # A far kernel that says 1 for every key counts the keys in the sums.
    kernel = dataclasses.replace(require_adapters(model)[0].kernel, alpha=torch.zeros(2))
    flat = dataclasses.replace(layer, query=layer.query * 0)
    for name, rule in table.RULES.items():
        features = {"hyperbolic": table.FarFeatures(kernel, flat)}
        _, parts = table.attend(flat, rule, KEPT, features, window=WINDOW, sinks=4)
        counted = parts["hyperbolic"].denominator * parts["hyperbolic"].log_scale.exp()
        chunk = torch.arange(TOKENS) // WINDOW
        expected = ((chunk - 1) * WINDOW - 4 - KEPT).clamp_min(0).expand_as(counted).float()
        torch.testing.assert_close(counted, expected, msg=name)


def test_the_oracle_is_exact_with_all_keys_and_gets_worse_with_fewer(table, model):
    ids = torch.randint(64, (TOKENS,), generator=torch.Generator().manual_seed(1))
    layer = table.captured(model, ids, 1)[0]
    features = {"hyperbolic": table.FarFeatures(require_adapters(model)[0].kernel, layer)}
    found = table.oracle(layer, dict.fromkeys((0, 1, 4, TOKENS), features), window=WINDOW, sinks=4)
    size = layer.exact.norm()
    outputs = {kept: combine(near, far["hyperbolic"]) for kept, (near, far) in found.items()}
    errors = {kept: (output - layer.exact).norm() / size for kept, output in outputs.items()}
    assert errors[TOKENS] < 1e-5 < errors[4] < errors[1] < errors[0]
    near, parts = table.attend(layer, table.RULES[table.PRODUCT], 0, features, window=WINDOW, sinks=4)
    none = combine(near, parts["hyperbolic"])
    torch.testing.assert_close(none, outputs[0], rtol=1e-4, atol=1e-3)  # another order of sums


def test_a_window_of_the_same_bytes_is_the_widest_that_fits(table, model):
    layer = table.captured(model, torch.arange(64), 1)[0]
    line = table.Line(table.PRODUCT, 64, 128, None)
    size = table.bytes_of(layer, 64, 128, 0)
    found = table.same_bytes_window(layer, line)
    assert table.bytes_of(layer, found, 0, 0) <= size < table.bytes_of(layer, found + 1, 0, 0)


def test_kernels_are_fitted_as_calibrate_fits_them_and_kept_in_a_file(table, tmp_path):
    torch.manual_seed(0)
    small = LlamaForCausalLM(LlamaConfig(**SIZE, intermediate_size=48, vocab_size=64)).eval()
    ids = torch.randint(64, (TOKENS,), generator=torch.Generator().manual_seed(1))
    _, kernels = table.fitted(small, ids, ("hyperbolic",), tmp_path / "kernels.pt")
    config = hf_rfa.RFAConfig(feature_map="hyperbolic", window=table.WINDOW, kept_keys=table.KEPT)
    theirs = hf_rfa.convert(copy.deepcopy(small), config, calibrate=False)
    hf_rfa.calibrate(theirs, ids[None], plant_repeats=False)
    for adapter, mine in zip(require_adapters(theirs), kernels, strict=True):
        kernel = mine["hyperbolic"]
        assert torch.equal(kernel.alpha, adapter.alpha)
        torch.testing.assert_close(kernel.query_transform, adapter.query_transform)
    _, again = table.fitted(small, ids, ("hyperbolic",), tmp_path / "kernels.pt")
    assert torch.equal(again[0]["hyperbolic"].omega, kernels[0]["hyperbolic"].omega)
