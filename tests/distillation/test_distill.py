"""Attention transfer: it learns what it says, changes only the adapters, resumes exactly, and stops loudly."""

import copy
import dataclasses
import itertools

import pytest
import torch
from conversions import converted
from operator_inputs import operator_call, random_inputs, tokens

import hf_rfa
from hf_rfa.distillation.config import DistillConfig
from hf_rfa.distillation.distill import distill
from hf_rfa.distillation.layer_transfer import LayerTransfer
from hf_rfa.distillation.weight_loss import sampled_weight_loss
from hf_rfa.errors import CheckpointError, ConfigError, UnsupportedModelError
from hf_rfa.ops.reference import reference_exact_keys
from hf_rfa.runtime.adapters import named_adapters
from hf_rfa.runtime.calls import Interception, intercept

CONFIG = hf_rfa.RFAConfig(num_features=8, window=16, sink_tokens=2)


def batches(count=None, length=128):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randint(128, (2, length), generator=generator) for _ in itertools.count())
    return itertools.islice(drawn, count)


def sharpened(model):
    """Queries and keys that are larger than those of random weights, so that attention is not just a mean."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 12
            layer.self_attn.k_proj.weight *= 12
    return model


def sharp(model, **changes):
    return converted(sharpened(model), CONFIG, **changes)


def kernels(model):
    return {
        layer: {n: t.clone() for n, t in a.state_dict().items()}
        for layer, (_, _, a) in enumerate(named_adapters(model))
    }


@pytest.mark.parametrize("omega", ["learned", "random"])
@pytest.mark.parametrize("feature_map", ["trigonometric", "positive", "hyperbolic"])
def test_the_loss_falls_on_the_same_inputs_and_the_model_stays(tiny_llama, feature_map, omega):
    model = sharp(tiny_llama, feature_map=feature_map)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    before = kernels(model)
    fixed = [next(batches())] * 60
    result = distill(model, fixed, DistillConfig(steps=60, omega=omega, learning_rate=3e-2, progress=False))
    for layer in (0, 1):
        first = sum(row[layer] for row in result.losses[:5])
        assert 5 * result.mean(5)[layer] < 0.9 * first
    now = dict(model.named_parameters())
    for name, parameter in frozen.items():
        assert torch.equal(now[name], parameter), name
    for layer, tensors in kernels(model).items():
        assert torch.equal(tensors["omega"], before[layer]["omega"]) == (omega == "random")
        assert not torch.equal(tensors["query_transform"], before[layer]["query_transform"])


def test_what_was_trained_is_what_the_model_then_does(tiny_llama):
    """The loss of the last state, measured by a further transfer's first step at no learning rate to speak of."""
    model = sharp(tiny_llama)
    ids = next(batches())
    trained = distill(model, [ids] * 40, DistillConfig(steps=40, learning_rate=3e-2, progress=False))
    again = distill(model, [ids], DistillConfig(steps=1, learning_rate=1e-12, progress=False))
    for layer in (0, 1):
        assert again.losses[0][layer] <= trained.losses[0][layer] * 0.95
        assert again.losses[0][layer] == pytest.approx(trained.losses[-1][layer], rel=0.05)


def test_a_learned_omega_is_never_redrawn_and_survives_saving(tiny_llama, tmp_path):
    model = sharp(tiny_llama)
    distill(model, batches(), DistillConfig(steps=2, progress=False))
    with pytest.raises(ConfigError, match="learned"):
        hf_rfa.resample(model)
    with pytest.raises(ConfigError, match="never redrawn"):
        hf_rfa.RFAConfig(omega="learned", resample="forward")
    model.save_pretrained(tmp_path)
    loaded = hf_rfa.from_pretrained(tmp_path)
    ids = next(batches())
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="not redrawn"):
        distill(loaded, batches(), DistillConfig(steps=1, omega="random", progress=False))


def test_geometry_learned_for_all_draws_helps_a_draw_it_never_saw(tiny_llama):
    model = sharp(tiny_llama, feature_map="positive")
    ids = next(batches())
    untrained = copy.deepcopy(model)
    distill(model, [ids] * 60, DistillConfig(steps=60, omega="random", learning_rate=3e-2, progress=False))
    losses = []
    for each in (untrained, model):
        hf_rfa.resample(each, draw=1000)
        losses.append(distill(each, [ids], DistillConfig(steps=1, learning_rate=1e-12, progress=False)).losses[0])
    assert all(losses[1][layer] < losses[0][layer] for layer in (0, 1))


def dense_weight_loss(call, rows):
    """The definition of `sampled_weight_loss` for one row without padding, in loops."""
    total = count = 0
    query, key, kernel = call.query, call.key, call.far
    psi_q, scale_q = kernel.query_features(query, call.scaling)
    psi_k, scale_k = kernel.key_features(key, call.scaling)
    exact_keys = reference_exact_keys(call)
    for head, group, i in itertools.product(range(query.shape[1]), range(query.shape[2]), rows.tolist()):
        seen = slice(i + 1 if call.causal else None)
        weights = (query[0, head, group, i] @ key[0, head, seen].T * call.scaling).exp()
        exact = exact_keys[0, head, i, seen]
        log_far = scale_q[0, head, group, i] + scale_k[0, head, seen]
        far = kernel.gamma[head] * (psi_q[0, head, group, i] @ psi_k[0, head, seen].T) * log_far.exp()
        mass = torch.cat([weights[exact].sum()[None], far[~exact]])
        p = torch.cat([weights[exact].sum()[None], weights[~exact]]) / weights.sum()
        total -= (p * (mass / mass.sum()).log()).sum()
        count += 1
    return total / count


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kept_keys", [0, 6])
def test_the_weight_loss_is_its_definition(kept_keys, causal):
    inputs = random_inputs(60, batch=1)
    kernel = {
        "alpha": torch.tensor([0.5, 0.9]).double(), "gamma": torch.tensor([0.7, 2.0]).double(),
        "query_center": torch.full((2, 8), 0.1).double(), "key_center": torch.full((2, 8), -0.2).double(),
    }  # fmt: skip
    settings = {"window": 8, "sink_tokens": 2, "scaling": 0.3, "causal": causal}
    rows = torch.tensor([0, 7, 17, 25, 39, 59])
    call = operator_call(inputs, **kernel, **settings, kept_keys=kept_keys)
    got = sampled_weight_loss(call, rows)
    torch.testing.assert_close(got, dense_weight_loss(call, rows))
    without = sampled_weight_loss(operator_call(inputs, **kernel, **settings), rows)
    assert torch.equal(got, without) == (kept_keys == 0)


def test_padding_and_other_documents_do_not_count_in_the_weight_loss():
    inputs = random_inputs(60, batch=1, heads=1, key_heads=1, dtype=torch.float32)
    settings = {"window": 8, "sink_tokens": 2, "scaling": 0.5, "kept_keys": 3}
    late = torch.arange(60) >= 20
    plain = sampled_weight_loss(operator_call(tokens(inputs, late), **settings), torch.arange(40))
    padded = sampled_weight_loss(operator_call(inputs, token_mask=late[None], **settings), torch.arange(60))
    torch.testing.assert_close(padded, plain)
    packed = operator_call(inputs, segment_ids=late.long()[None], **settings)
    torch.testing.assert_close(sampled_weight_loss(packed, torch.arange(20, 60)), plain)


@pytest.mark.parametrize("heads", [None, {(0, 0): 128, (1, 1): 0}])
def test_keys_that_are_kept_are_not_trained_for(tiny_llama, heads):
    """Where all keys are kept nothing is estimated, and nothing can be wrong."""
    model = sharp(tiny_llama, feature_map="hyperbolic", kept_keys=128, head_kept_keys=heads)
    settings = DistillConfig(steps=1, weight_loss=1.0, sampled_queries=128, progress=False)
    losses = distill(model, batches(1), settings).losses[0]
    assert losses[0] < 1e-6
    assert (losses[1] > 0.1) == (heads is not None)


def test_the_weight_loss_moves_weights_to_the_key_that_is_looked_up(tiny_llama):
    """Entropy of softmax is the least cross-entropy there is: training on it alone has to come nearer."""
    model = sharp(tiny_llama, feature_map="hyperbolic")
    ids = next(batches())
    result = distill(
        model,
        [ids] * 60,
        DistillConfig(steps=60, weight_loss=1.0, sampled_queries=128, learning_rate=3e-2, progress=False),
    )
    for layer in (0, 1):
        assert result.losses[-1][layer] < result.losses[0][layer] - 0.05


def test_window_dropout_makes_the_far_part_answer_for_the_near_keys(tiny_llama):
    """Judged without any window, a kernel that was trained with the window dropped is the better one."""
    ids = next(batches())
    losses = {}
    for share in (0.0, 1.0):
        model = sharp(copy.deepcopy(tiny_llama))
        distill(model, [ids] * 60, DistillConfig(steps=60, window_dropout=share, learning_rate=3e-2, progress=False))
        judge = distill(model, [ids], DistillConfig(steps=1, window_dropout=1.0, learning_rate=1e-12, progress=False))
        losses[share] = sum(judge.losses[0].values())
    assert losses[1.0] < losses[0.0]


def test_exact_heads_are_left_alone(tiny_llama):
    model = sharp(tiny_llama, softmax_heads=[(0, 0), (0, 1), (1, 0)])
    before = kernels(model)
    result = distill(model, batches(), DistillConfig(steps=3, weight_loss=0.5, progress=False))
    assert set(result.losses[0]) == {1}
    after = kernels(model)
    assert torch.equal(after[0]["query_transform"], before[0]["query_transform"])
    assert torch.equal(after[1]["query_transform"][0], before[1]["query_transform"][0])
    assert not torch.equal(after[1]["query_transform"][1], before[1]["query_transform"][1])


def test_a_run_that_crashed_resumes_to_the_same_kernels(tiny_llama, tmp_path):
    settings = {"steps": 6, "weight_loss": 0.3, "window_dropout": 0.5, "progress": False}
    model = sharp(tiny_llama)
    crashing, resumed = copy.deepcopy(model), copy.deepcopy(model)
    expected = distill(model, batches(), DistillConfig(**settings))
    with pytest.raises(ConfigError, match="ended after 5 of 6"):
        distill(crashing, batches(5), DistillConfig(output=tmp_path, save_every=2, **settings))
    done = distill(resumed, batches(), DistillConfig(output=tmp_path, save_every=2, resume=True, **settings))
    assert done.losses == expected.losses
    for layer, tensors in kernels(resumed).items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, kernels(model)[layer][name], rtol=0, atol=0, msg=name)


def test_a_damaged_or_foreign_checkpoint_is_an_error(tiny_llama, tmp_path):
    model = sharp(tiny_llama)
    distill(model, batches(), DistillConfig(steps=2, output=tmp_path, progress=False))
    with pytest.raises(CheckpointError, match="more than `steps`"):
        distill(model, batches(), DistillConfig(steps=1, output=tmp_path, resume=True, progress=False))
    other = hf_rfa.convert(hf_rfa.revert(model), dataclasses.replace(CONFIG, num_features=4), calibrate=False)
    with pytest.raises(CheckpointError, match="layer 0 trains"):
        distill(other, batches(), DistillConfig(steps=3, output=tmp_path, resume=True, progress=False))
    (tmp_path / "distill.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="Cannot resume"):
        distill(model, batches(), DistillConfig(steps=3, output=tmp_path, resume=True, progress=False))


def test_a_loss_that_is_not_finite_names_the_layer_and_keeps_the_kernels(tiny_llama):
    model = sharp(tiny_llama)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    before = kernels(model)
    with pytest.raises(FloatingPointError, match=r"layer 1 .* step 1"):
        distill(model, batches(), DistillConfig(steps=2, progress=False))
    for layer, tensors in kernels(model).items():
        assert torch.equal(tensors["omega"], before[layer]["omega"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps`"),
        ({"omega": "fixed"}, r"`omega` must be one of \['learned', 'random'\]"),
        ({"learning_rate": 0.0}, "`learning_rate`"),
        ({"cluster_scale": 0.0}, "`cluster_scale` must be a number > 0"),
        ({"cluster_scale": 0.5}, "for the clustered map, which no head"),
        ({"max_grad_norm": 0.0}, "`max_grad_norm`"),
        ({"weight_loss": -1.0}, "`weight_loss`"),
        ({"sampled_queries": 0}, "`sampled_queries`"),
        ({"window_dropout": 1.5}, "`window_dropout`"),
        ({"resume": True}, "`output`"),
        ({"steps": 3}, "ended after 2 of 3"),
    ],
)
def test_bad_arguments_are_refused(tiny_llama, settings, message):
    with pytest.raises(ConfigError, match=message):
        distill(sharp(tiny_llama), batches(2), DistillConfig(**{"steps": 2, "progress": False, **settings}))


def test_what_cannot_be_trained_is_refused(tiny_llama):
    with pytest.raises(UnsupportedModelError, match="not converted"):
        distill(tiny_llama, batches(), DistillConfig(steps=1))
    with pytest.raises(ConfigError, match="trigonometric"):
        distill(
            sharp(copy.deepcopy(tiny_llama), feature_map="trigonometric"),
            batches(),
            DistillConfig(steps=1, weight_loss=1.0),
        )
    everything = [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(ConfigError, match="Every key head"):
        distill(sharp(tiny_llama, softmax_heads=everything), batches(), DistillConfig(steps=1))


def test_no_gradient_crosses_a_layer(tiny_llama):
    """Each observer takes its gradient at once, so that the memory is that of one layer."""
    model = sharp(tiny_llama)
    adapter = next(named_adapters(model))[2]
    layer = LayerTransfer(adapter, DistillConfig(steps=1, sampled_queries=8))
    with intercept(Interception(observers={adapter: layer})):
        output = model(next(batches())).logits
    assert all(tensor.grad is not None for tensor in layer.tensors.values())
    assert all(p.grad is None for p in model.parameters())
    assert output.isfinite().all()


def test_clusters_begin_as_soft_as_asked_for(tiny_llama):
    config = dataclasses.replace(CONFIG, feature_map="clustered")
    model = hf_rfa.convert(sharpened(tiny_llama), config, calibrate=next(batches()))
    _, _, adapter = next(iter(named_adapters(model)))
    x = torch.randn(50, adapter.omega.shape[-1], generator=torch.Generator().manual_seed(0))

    def start(scale):
        config = DistillConfig(steps=1, weight_loss=1.0, sampled_queries=8, cluster_scale=scale)
        tensors = LayerTransfer(adapter, config).tensors
        return {name: tensor[0].detach() for name, tensor in tensors.items()}

    @torch.no_grad()
    def entropy_and_logits(omega, key_transform, query_transform, **others):
        shares = (x @ key_transform.T @ omega.T - omega.square().sum(-1) / 2).softmax(-1)
        return float(torch.special.entr(shares).sum(-1).mean()), x @ query_transform.T @ omega.T

    fitted = {name: getattr(adapter, name)[0] for name in ("omega", "key_transform", "query_transform")}
    sharp, expected = entropy_and_logits(**fitted)
    soft, logits = entropy_and_logits(**start(0.5))
    torch.testing.assert_close(logits, expected)
    assert soft > 1.5 * sharp
    torch.testing.assert_close(start(1.0)["omega"], adapter.omega[0].detach())
