"""The limit of the far part's weight is a quantile of what exact attention gives to far keys."""

import math

import torch

import hf_rfa
from hf_rfa.calibration.far_shares import BINS, LEAST, MOST, QUANTILE, SLACK, FarShares
from hf_rfa.runtime.adapters import named_adapters

BIN = math.exp((MOST - LEAST) / BINS)


def drawn(seed, heads=3, tokens=4000):
    return torch.rand(2, heads, 2, tokens, generator=torch.Generator().manual_seed(seed)) ** 3


def test_the_limit_is_a_little_more_than_the_quantile_of_the_ratio():
    shares, counted = drawn(0), FarShares()
    counted.add(shares)
    flat = shares.transpose(0, 1).flatten(1).double()
    want = SLACK * torch.quantile(flat / (1 - flat), QUANTILE, dim=1)
    ratio = counted.limits().double() / want
    assert (ratio >= 1 / BIN).all()
    assert (ratio <= BIN * BIN).all()


def test_queries_without_far_keys_do_not_count_and_a_head_without_any_has_no_limit():
    shares, with_zeros = drawn(1), FarShares()
    shares[:, 2] = 0
    alone = FarShares()
    alone.add(shares)
    with_zeros.add(torch.cat([shares, torch.zeros_like(shares)], dim=-1))
    assert torch.equal(alone.limits(), with_zeros.limits())
    assert alone.limits()[2] == 0


def test_processes_add_up():
    parts, whole = [FarShares(), FarShares()], FarShares()
    for seed, part in enumerate(parts):
        part.add(drawn(seed))
        whole.add(drawn(seed))
    other = parts[1].counts
    parts[0].merge(lambda counts: counts + other)
    assert torch.equal(parts[0].limits(), whole.limits())


def test_all_of_the_attention_may_be_far():
    counted = FarShares()
    counted.add(torch.tensor([1.0, 1.0000001]).view(1, 1, 1, 2))
    assert torch.isfinite(counted.limits()).all()


def test_calibration_sets_the_limit_of_each_head(tiny_llama):
    model = hf_rfa.convert(tiny_llama, hf_rfa.RFAConfig(window=16), calibrate=torch.randint(64, (2, 256)))
    for _, _, adapter in named_adapters(model):
        assert (adapter.far_limit > 0).all()
        assert adapter.kernel.far_limit is adapter.far_limit
