"""`head_costs`: its sum against the divergence that is measured, head by head and together; `set_kept_keys`."""

import pytest
import torch
import torch.nn.functional as F
from conversions import converted
from decoding import prefilled
from families import llama, token_ids

import hf_rfa
from hf_rfa import ConfigError, HeadOption, RFAConfig, StaleStateError
from hf_rfa.runtime.arguments import cache_argument

CONFIG = RFAConfig(window=8, sink_tokens=2, num_features=8, alpha=0.3)
HEADS = [(layer, head) for layer in range(2) for head in range(2)]


def divergence(original, model, ids):
    """KL(original || model), nats/token."""
    with torch.no_grad():
        p, q = (each(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for each in (original, model))
    return F.kl_div(q, p, reduction="sum", log_target=True).item() / ids.numel()


@pytest.fixture(scope="module")
def model():
    """Converted, and logits that depend on the context."""
    return hf_rfa.convert(llama(gain=3), CONFIG, calibrate=False).eval()


@pytest.fixture(scope="module")
def costs(model):
    options = {"now": HeadOption(), "window": HeadOption(far=False), "kept": HeadOption(kept_keys=12)}
    return hf_rfa.head_costs(model, token_ids(2, 160), options, draws=24)


def test_a_cost_is_the_divergence_that_the_head_alone_causes(model, costs):
    ids, original = token_ids(2, 160), llama(gain=3).eval()
    measured = {}
    for head in HEADS:
        hf_rfa.set_softmax_heads(model, [other for other in HEADS if other != head])
        measured[head] = divergence(original, model, ids)
    hf_rfa.set_softmax_heads(model, [])
    assert sorted(costs["now"]) == HEADS
    for head in HEADS:
        assert costs["now"][head] == pytest.approx(measured[head], rel=0.3), head
    assert sum(costs["now"].values()) == pytest.approx(divergence(original, model, ids), rel=0.5)


def test_options_are_what_they_say(model, costs):
    for name, config in (
        ("window", RFAConfig(**{**vars(CONFIG), "gamma": 0.0})),
        ("kept", RFAConfig(**{**vars(CONFIG), "kept_keys": 12})),
    ):
        other = hf_rfa.convert(llama(gain=3), config, calibrate=False).eval()
        now = hf_rfa.head_costs(other, token_ids(2, 160), {"now": HeadOption()}, draws=24)["now"]
        assert now == pytest.approx(costs[name], rel=1e-4)


def test_nothing_is_left_behind(model):
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before = model(input_ids=token_ids(1, 40)).logits
    hf_rfa.head_costs(model, token_ids(1, 40), {"now": HeadOption()})
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(input_ids=token_ids(1, 40)).logits, before)


@pytest.mark.parametrize(
    ("ids", "options", "draws"),
    [(torch.zeros(5, dtype=torch.int64), {"a": HeadOption()}, 1), (token_ids(1, 5), {}, 1),
     (token_ids(1, 5), {"a": HeadOption()}, 0)],
)  # fmt: skip
def test_what_it_cannot_do(model, ids, options, draws):
    with pytest.raises(ConfigError, match="at least one option and one draw"):
        hf_rfa.head_costs(model, ids, options, draws=draws)


def test_set_kept_keys_is_the_conversion_with_them():
    ids = token_ids(2, 60)
    config = RFAConfig(**{**vars(CONFIG), "kept_keys": 5, "head_kept_keys": {(1, 0): 9}})
    wanted = converted(config=config)
    model = converted(config=CONFIG)
    cache = prefilled(model, ids)
    hf_rfa.set_kept_keys(model, 5, {(1, 0): 9})
    with torch.no_grad():
        logits = (each(input_ids=ids, use_cache=False).logits for each in (model, wanted))
        assert torch.equal(*logits)
        with pytest.raises(StaleStateError, match="another conversion"):
            model(input_ids=ids[:, :1], use_cache=True, **{cache_argument(model): cache})
    with pytest.raises(ConfigError, match=r"names heads that are not converted: \[\(7, 0\)\]"):
        hf_rfa.set_kept_keys(model, 5, {(7, 0): 9})
