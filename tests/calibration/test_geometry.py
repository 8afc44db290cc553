"""The closed forms of calibration: balancing, and centres where attention lies."""

import dataclasses

import pytest
import torch
from conversions import converted
from families import SHORT, token_ids
from torch.testing import assert_close

import hf_rfa
from hf_rfa.calibration.geometry import Moments, balance
from hf_rfa.ops.attention import rfa_attention
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import RFAAdapter


def covariances(heads=3, dim=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(2, heads, dim, dim, generator=generator, dtype=torch.float64)
    return roots[0] @ roots[0].mT, roots[1] @ roots[1].mT


def test_balanced_queries_and_keys_covary_alike_and_their_product_is_kept():
    query, key = covariances()
    forth, back = balance(query, key)
    assert_close(forth.mT @ back, torch.eye(6, dtype=torch.float64).expand(3, 6, 6), atol=1e-8, rtol=0)
    one, two = forth @ query @ forth.mT, back @ key @ back.mT
    # Up to the ridge of 1 %.
    assert_close(one, two, atol=0.05 * one.abs().max().item(), rtol=0)


def test_no_other_change_of_variable_has_a_smaller_sum_of_squares():
    query, key = covariances()
    forth, _ = balance(query, key)
    generator = torch.Generator().manual_seed(1)

    def total(change):
        inverse = torch.linalg.inv(change).mT
        return torch.einsum("hij,hjk,hik->h", change, query, change) + torch.einsum(
            "hij,hjk,hik->h", inverse, key, inverse
        )

    best = total(forth)
    assert (best < total(torch.eye(6, dtype=torch.float64).expand(3, 6, 6))).all()
    for size in (0.1, 0.3):
        for _ in range(20):
            noise = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
            other = forth @ (torch.eye(6, dtype=torch.float64) + size * noise)
            assert (total(other) > best).all()


LAYER = dataclasses.replace(SHORT, window=4, sink_tokens=1)


def observed(query, key, config=LAYER, **options):
    moments = Moments()
    settings = AttentionSettings(**{"scaling": 0.5, **options})
    adapter = RFAAdapter(config, 0, key.shape[1], key.shape[3], converted=True)
    moments(adapter, torch.nn.Identity(), query, key, key, TokenLayout(), settings, query)
    return moments


def test_the_attended_centres_are_the_means_over_far_pairs_by_their_weight():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 40, 8, generator=generator), torch.randn(2, 1, 40, 8, generator=generator)
    _, attended = observed(query, key).geometries()
    slots = torch.arange(40)
    near = ((slots[:, None] // 4 - slots // 4) <= 1) | (slots < 1)
    causal = slots <= slots[:, None]
    weights = (query @ key.mT * 0.5).masked_fill(~causal, -torch.inf).softmax(-1) * (~near & causal)
    total = weights.sum()
    assert_close(attended.query_center[0], torch.einsum("bgij,bgid->d", weights, query) / total, atol=1e-5, rtol=0)
    keys = key.expand(2, 2, 40, 8)
    assert_close(attended.key_center[0], torch.einsum("bgij,bgjd->d", weights, keys) / total, atol=1e-5, rtol=0)


def test_kept_keys_have_no_part_in_the_attended_geometry():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 40, 8, generator=generator), torch.randn(2, 1, 40, 8, generator=generator)
    key[:, :, 6] *= 4  # behind the window from token 12 on; of all keys the one that is attended to most
    loud = key[:, 0, 6].mean(0)
    far = [
        observed(query, key, dataclasses.replace(LAYER, kept_keys=number)).geometries()[1].key_center[0]
        for number in (0, 1)
    ]
    assert (far[0] - loud).norm() < (far[1] - loud).norm()
    # As many as there are: nothing is far, and the geometry is the plain one.
    plain, attended = observed(query, key, dataclasses.replace(LAYER, kept_keys=40)).geometries()
    assert torch.equal(attended.key_center, plain.key_center)


def test_the_plain_geometry_has_plain_means_and_no_change_of_variable():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 40, 8, generator=generator), torch.randn(2, 1, 40, 8, generator=generator)
    plain, _ = observed(query, key).geometries()
    assert_close(plain.query_center[0], query.mean((0, 1, 2)), atol=1e-6, rtol=0)
    assert_close(plain.key_center[0], key.mean((0, 1, 2)), atol=1e-6, rtol=0)
    assert torch.equal(plain.query_transform[0], torch.eye(8))
    root_mean_square = (query - plain.query_center[0]).square().sum(-1).mean().sqrt()
    assert plain.query_radius[0].item() == pytest.approx(root_mean_square.item(), rel=1e-5)


def test_a_head_without_far_pairs_has_the_plain_geometry():
    query = torch.randn(1, 2, 6, 8, generator=torch.Generator().manual_seed(0))  # nothing is far
    plain, attended = observed(query, query[:, :1]).geometries()
    assert torch.equal(attended.query_center, plain.query_center)
    assert torch.equal(attended.key_transform, plain.key_transform)


def test_at_alpha_one_the_geometry_changes_nothing_in_the_mean():
    """Centres and balancing are exact changes of variable: over many features the output is that of softmax."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (0.4 * torch.randn(1, 1, 60, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    query, key = query + 0.5, key - 0.3
    _, geometry = observed(query.float(), key.float()).geometries()
    kernel = {name: tensor.double() for name, tensor in vars(geometry).items() if "radius" not in name}
    omega = torch.randn(1, 40_000, 4, generator=generator, dtype=torch.float64)
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    got = rfa_attention(query, key, value, omega=omega, feature_map="hyperbolic", window=4, sink_tokens=1, **kernel)
    assert (got - exact).abs().max() < 0.02


def test_calibration_takes_the_attended_geometry_where_it_is_better():
    model = converted()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)  # attention that is far from uniform
    hf_rfa.calibrate(model, token_ids(2, 120), plant_repeats=False)
    adapters = [layer.self_attn.rfa for layer in model.model.layers]
    eye = torch.eye(adapters[0].omega.shape[-1])
    changed = [not torch.equal(m, eye) for a in adapters for m in a.query_transform]
    assert any(changed)
    assert all(bool((a.query_radius > 0).all()) for a in adapters)
