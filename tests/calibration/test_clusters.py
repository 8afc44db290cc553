"""The clustered map: k-means of the keys, what the kernel then is, and the model that is made of it."""

import dataclasses

import pytest
import torch
from families import SHORT, build, token_ids
from torch.testing import assert_close

import hf_rfa
from hf_rfa.calibration.clusters import SHARPNESS, TEMPERS, KeyClusters, k_means
from hf_rfa.calibration.geometry import root_metric
from hf_rfa.features.far_kernel import FarKernel
from hf_rfa.ops.attention import attend
from hf_rfa.ops.layout import TokenLayout
from hf_rfa.ops.settings import AttentionSettings
from hf_rfa.runtime.adapter import LEARNED, RFAAdapter
from hf_rfa.runtime.adapters import require_adapters

CLUSTERED = dataclasses.replace(SHORT, feature_map="clustered", num_features=6)


def blobs(heads=2, clusters=5, each=40, dim=6, seed=0):
    """Keys (heads, clusters * each, dim) around centres that are far apart, and the centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(heads, clusters, dim, generator=generator)
    noise = 0.1 * torch.randn(heads, clusters, each, dim, generator=generator)
    order = torch.randperm(clusters * each, generator=generator)
    return (centres.unsqueeze(2) + noise).flatten(1, 2)[:, order], centres


def observed(keys, config=CLUSTERED, scaling=0.25, token_mask=None):
    """A layer's adapter and its clusters after it has seen keys (heads, n, dim)."""
    adapter = RFAAdapter(config, 0, len(keys), keys.shape[-1], converted=True)
    clusters = KeyClusters(adapter)
    key = keys[None]
    settings = AttentionSettings(scaling=scaling)
    query = 1e-3 * key  # every key is attended to
    clusters(adapter, torch.nn.Identity(), query, key, key, TokenLayout(token_mask), settings, key)
    clusters.merge(lambda tensor: tensor)
    geometry = clusters.geometries()[TEMPERS.index(1.0)]
    heads = len(keys)
    adapter.set_kernel(["clustered"] * heads, omega=clusters.omega, alpha=torch.ones(heads), **vars(geometry))
    return adapter, clusters


def test_k_means_ends_where_each_centroid_is_the_mean_of_its_keys():
    keys, _ = blobs()
    weights = torch.rand(keys.shape[:2], generator=torch.Generator().manual_seed(1))
    found = k_means(keys, 7, torch.Generator().manual_seed(0), lambda tensor: tensor, weights)
    nearest = torch.cdist(keys, found).argmin(-1)
    for head in range(2):
        for cluster in nearest[head].unique().tolist():
            mine = nearest[head] == cluster
            mean = (keys[head] * weights[head, :, None])[mine].sum(0) / weights[head, mine].sum()
            assert_close(found[head, cluster], mean)


def test_k_means_of_two_processes_is_one_of_all_their_keys():
    keys, _ = blobs(each=20)
    seen = []

    def double(tensor):  # the other process has the same keys
        seen.append(tensor.shape)
        return 2 * tensor

    ones = torch.ones(keys.shape[:2])
    one = k_means(keys, 6, torch.Generator().manual_seed(0), lambda tensor: tensor, ones)
    two = k_means(keys, 6, torch.Generator().manual_seed(0), double, ones)
    assert_close(one, two)
    assert seen


def test_the_kernel_of_a_key_is_that_of_its_centroid():
    keys, _ = blobs(heads=1)
    adapter, _ = observed(keys, dataclasses.replace(CLUSTERED, num_features=30), scaling=0.25)
    kernel = FarKernel(adapter.feature_maps, adapter.omega, **{
        name: getattr(adapter, name) for name in
        ("alpha", "gamma", "proposal", "query_center", "key_center", "query_transform", "key_transform",
         "query_radius", "key_radius")
    })  # fmt: skip
    query = 0.3 * torch.randn(1, 1, 50, 6, generator=torch.Generator().manual_seed(1))
    features, scale = kernel.query_features(query, 0.25)
    shares, key_scale = kernel.key_features(keys[None], 0.25)
    assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
    got = (features @ shares.mT).log() + scale.unsqueeze(-1) + key_scale.unsqueeze(-2)
    want = 0.25 * query @ keys[None].mT
    # Clusters of keys as small as these: what a centroid says is true of each of them.
    assert (got - want).abs().max() < 0.2 < 0.1 * want.abs().max()


def test_heads_with_draws_and_heads_with_centroids_share_a_layer():
    keys, _ = blobs()
    adapter, _ = observed(keys)
    alone, settings = {}, AttentionSettings(window=8, sink_tokens=2, scaling=6**-0.5)
    for names in (["hyperbolic", "clustered"], ["hyperbolic", "hyperbolic"], ["clustered", "clustered"]):
        kernel = dataclasses.replace(adapter.kernel, feature_maps=tuple(names))
        if "clustered" not in names:
            kernel = dataclasses.replace(kernel, omega=adapter.omega[:, : CLUSTERED.num_features])
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(1, 2, 60, 6, generator=generator) for _ in range(3))
        alone[tuple(names)] = attend(q, k, v, kernel, settings, TokenLayout())[0]
    mixed = alone["hyperbolic", "clustered"]
    assert_close(mixed[:, 0], alone["hyperbolic", "hyperbolic"][:, 0])
    assert_close(mixed[:, 1], alone["clustered", "clustered"][:, 1])
    assert (mixed[:, 0] - alone["clustered", "clustered"][:, 0]).abs().max() > 1e-3


def test_padding_is_in_no_cluster():
    keys, _ = blobs(heads=1, each=30)
    token_mask = torch.ones(1, keys.shape[1], dtype=torch.bool)
    token_mask[0, :40] = False
    far = keys.clone()
    far[:, :40] = 1e4
    with_padding, _ = observed(far, token_mask=token_mask)
    without, _ = observed(keys[:, 40:])
    assert_close(with_padding.omega, without.omega)


def test_sharpness_and_scaling_cancel_in_the_products():
    keys, _ = blobs(heads=1, clusters=4)
    adapter, clusters = observed(keys, scaling=0.25)
    geometry = clusters.geometries()[TEMPERS.index(1.0)]
    eye = torch.eye(6)
    assert_close(geometry.query_transform[0] @ geometry.key_transform[0], eye)
    centroids = adapter.omega / (SHARPNESS * 0.25) ** 0.5 @ clusters.inverse_metric.mT + clusters.center.unsqueeze(1)
    assert torch.cdist(keys, centroids).amin(-1).max() < 20


def test_a_difference_counts_by_how_far_it_moves_products_with_queries():
    factor = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = factor @ factor.mT
    root, inverse = root_metric(covariance)
    assert_close(root @ inverse, torch.eye(6, dtype=torch.float64)[None])
    difference = torch.randn(1, 6, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = (difference.mT @ covariance @ difference) / covariance.diagonal(dim1=1, dim2=2).mean()
    assert_close((root @ difference).square().sum(), moved.sum(), rtol=0.05, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_clustered_model_is_calibrated_saved_and_never_redrawn(family, tmp_path):
    model = build(family)
    ids = token_ids(batch=2, length=128)
    hf_rfa.convert(model, CLUSTERED, calibrate=ids)
    assert {name for a in require_adapters(model) for name in a.feature_maps} == {"clustered"}
    report = hf_rfa.calibration_report(model)
    assert report.divergence <= report.window_divergence
    for adapter in require_adapters(model):
        assert {name for name, _ in adapter.named_parameters()} == set(LEARNED)
    with pytest.raises(hf_rfa.ConfigError, match="learned"):
        hf_rfa.resample(model)
    with pytest.raises(hf_rfa.ConfigError, match="never redrawn"):
        dataclasses.replace(CLUSTERED, resample=2)
    hf_rfa.save_pretrained(model, tmp_path)
    again = hf_rfa.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
