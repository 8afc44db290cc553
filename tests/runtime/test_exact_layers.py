"""Layers all of whose key heads are exact: what they have learned is kept, and no Parameter waits for a gradient."""

import copy

import pytest
import torch
from conversions import converted
from families import token_ids
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import hf_rfa

WHOLE = [(0, 0), (0, 1)]
LEARNED = {
    "clustered": {"feature_map": "clustered"},
    "learned": {"omega": "learned"},
    "gated": {"gate": True},
    "both": {"omega": "learned", "gate": True},
}
kinds = pytest.mark.parametrize("changes", LEARNED.values(), ids=LEARNED)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def calibrated(heads, **changes):
    return converted(softmax_heads=heads, calibrate=token_ids(2, 90), **changes)


def steps(model, rounds=3):
    """Rounds of DDP, which raises in the second one if a Parameter got no gradient in the first."""
    parallel, ids = DistributedDataParallel(model.train()), token_ids()
    for _ in range(rounds):
        parallel(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return model


def trained(model, layer):
    adapter = model.model.layers[layer].self_attn.rfa
    return sorted(name for name, parameter in adapter.named_parameters() if parameter.requires_grad)


@kinds
@pytest.mark.parametrize(
    "heads", [WHOLE, [(0, 1)], [(0, 0), (0, 1), (1, 0)], None], ids=["layer", "head", "3", "none"]
)
def test_ddp_trains_whatever_heads_are_exact(group, heads, changes):
    model = steps(calibrated(heads, **changes))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert trained(model, 1)
    assert bool(trained(model, 0)) == (heads is None or len([h for h in heads if h[0] == 0]) < 2)


@kinds
def test_also_when_the_exact_heads_change_later(group, changes):
    model = calibrated(None, **changes)
    before = {layer: trained(model, layer) for layer in (0, 1)}
    hf_rfa.set_softmax_heads(model, WHOLE)
    assert trained(model, 0) == []
    steps(copy.deepcopy(model))
    hf_rfa.set_softmax_heads(model, [(1, 0), (1, 1)])
    assert trained(model, 0) == before[0]
    assert trained(model, 1) == []
    steps(copy.deepcopy(model))
    hf_rfa.set_softmax_heads(model, [(0, 0)])
    assert {layer: trained(model, layer) for layer in (0, 1)} == before
    steps(model)


@kinds
def test_also_after_loading(group, changes, tmp_path):
    model = calibrated(WHOLE, **changes)
    hf_rfa.save_pretrained(model, tmp_path)
    again = hf_rfa.from_pretrained(tmp_path)
    assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert trained(again, 0) == []
    assert trained(again, 1) == trained(model, 1)
    steps(again)


def test_also_after_a_plain_state_dict(group):
    model = calibrated(None, feature_map="clustered")
    model.load_state_dict(calibrated(WHOLE, feature_map="clustered").state_dict())
    assert trained(model, 0) == []
    steps(model)


def test_also_after_a_distillation(group):
    model = calibrated(WHOLE)
    hf_rfa.distill(model, [token_ids(2, 90)], hf_rfa.DistillConfig(steps=1, progress=False))
    assert trained(model, 0) == []
    assert trained(model, 1)
    steps(model)


def test_what_its_user_froze_stays_frozen():
    model = calibrated(None, feature_map="clustered").requires_grad_(False)
    hf_rfa.set_softmax_heads(model, WHOLE)
    hf_rfa.set_softmax_heads(model, [])
    assert trained(model, 0) == trained(model, 1) == []
