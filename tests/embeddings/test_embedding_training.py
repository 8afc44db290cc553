"""Metric learning: it learns, resumes bit for bit, keeps to the old embeddings, and says so if all collapses."""

import copy
import dataclasses
import logging

import numpy as np
import pytest
import torch
from sentence_encoders import identity_texts

import hf_rfa
from hf_rfa.embeddings import MetricConfig, add_head, count_triplets, retrieve, text_features, train_embeddings
from hf_rfa.embeddings.heads import apply_head, train_head
from hf_rfa.embeddings.index import unit
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.runtime.adapters import require_adapters

pytest.importorskip("sentence_transformers")
ROWS = identity_texts(12, 4)
TEXTS = [text for _, text in ROWS]
LABELS = [n // 4 for n in range(48)]
SHORT = MetricConfig(steps=4, identities=3, passages=2, learning_rate=1e-3, progress=False, loss="triplet")


def train(encoder, config, **options):
    return train_embeddings(encoder, LABELS, config, features=text_features(encoder, TEXTS), **options)


def vectors(encoder):
    return unit(encoder.eval().encode(TEXTS))


@pytest.fixture
def converted(encoder):
    return hf_rfa.convert(
        encoder, hf_rfa.RFAConfig(num_features=16, window=4, softmax_heads=[(0, 0)]), calibrate=False
    )


@pytest.mark.parametrize("loss", ["triplet", "batch_hard", "multiple_negatives"])
def test_the_loss_falls_and_triplets_become_easy(converted, loss):
    config = dataclasses.replace(SHORT, steps=25, loss=loss, identities=6, warmup_steps=0)
    before = count_triplets(torch.from_numpy(vectors(converted)), torch.tensor(LABELS), 0.2)
    done = train(converted, config)
    after = count_triplets(torch.from_numpy(vectors(converted)), torch.tensor(LABELS), 0.2)
    assert np.mean(done.losses[-5:]) < 0.8 * np.mean(done.losses[:5])
    assert after.easy > before.easy
    assert len(done.triplets) == len(done.losses) == done.step == 25
    assert done.collapsed_at is None
    assert done.cpu_seconds > 0


def test_harmonic_triplets_keep_the_new_encoder_near_the_old_index(converted):
    old = torch.from_numpy(vectors(converted))
    start = copy.deepcopy(converted)
    config = dataclasses.replace(SHORT, steps=25, identities=6, warmup_steps=0)
    train(converted, dataclasses.replace(config, loss="harmonic"), old=old)
    near = (vectors(converted) * old.numpy()).sum(1).mean()
    train(start, config)
    assert near > (vectors(start) * old.numpy()).sum(1).mean() + 0.02
    assert (
        retrieve(vectors(converted), old.numpy(), LABELS).recall[1]
        >= 0.9 * (retrieve(old.numpy(), old.numpy(), LABELS).recall[1])
    )


def test_a_run_goes_on_bit_for_bit(encoder, tmp_path):
    # Omega is redrawn after steps 3 and 6: the checkpoint is of another draw, and of one step into the next three.
    config = hf_rfa.RFAConfig(num_features=16, window=4, softmax_heads=[(0, 0)], kept_keys=0, resample=3)
    converted = hf_rfa.convert(encoder, config, calibrate=False)
    again, part = copy.deepcopy(converted), copy.deepcopy(converted)
    config = dataclasses.replace(SHORT, steps=7, dropout=0.2, save_every=4, output=tmp_path / "whole")
    seen = []
    hooks = [hf_rfa.ResampleCallback()]
    whole = train(converted, config, hooks=hooks, evaluate=lambda model: seen.append(model) or {"x": 1.0})
    assert seen == [converted]
    assert whole.evaluations == [{"step": 7, "x": 1.0}]
    part_config = dataclasses.replace(config, output=tmp_path / "part")

    class KilledError(Exception):
        pass

    class Kill:
        def step(self, model):
            if kill.count == 5:
                raise KilledError
            kill.count += 1

        count = 1

    kill = Kill()
    with pytest.raises(KilledError):
        train(part, part_config, hooks=[hf_rfa.ResampleCallback(), kill])
    done = train(again, dataclasses.replace(part_config, resume=True), hooks=[hf_rfa.ResampleCallback()])
    assert done.losses == whole.losses
    assert done.triplets == whole.triplets
    for name, tensor in converted.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert {adapter.draw_number for adapter in require_adapters(again)} == {2}
    with pytest.raises(CheckpointError, match="has 7 steps, more than `steps`=3"):
        train(again, dataclasses.replace(part_config, steps=3, resume=True), hooks=hooks)


def test_without_dropout_the_global_random_state_and_rates_stay(converted):
    for number, module in enumerate(m for m in converted.modules() if isinstance(m, torch.nn.Dropout)):
        module.p = 0.1 + number / 100
    rates = [m.p for m in converted.modules() if isinstance(m, torch.nn.Dropout)]
    state = torch.get_rng_state()
    train(converted, SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.p for m in converted.modules() if isinstance(m, torch.nn.Dropout)] == rates


def test_a_collapse_is_said_once(converted, caplog):
    for parameter in converted.parameters():
        parameter.data.zero_()
    with caplog.at_level(logging.WARNING):
        done = train(converted, dataclasses.replace(SHORT, learning_rate=1e-9))
    assert done.collapsed_at == 1
    assert [r.message for r in caplog.records if "have collapsed at step 1" in r.message] != []
    assert sum("have collapsed" in r.message for r in caplog.records) == 1


def test_what_does_not_fit_is_refused_before_any_work(converted):
    old = torch.zeros(48, 32)
    with pytest.raises(ConfigError, match="Got loss='triplet' and old=\\(48, 32\\)"):
        train(converted, SHORT, old=old)
    harmonic = dataclasses.replace(SHORT, loss="harmonic")
    with pytest.raises(ConfigError, match="Got loss='harmonic' and old=None"):
        train(converted, harmonic)
    with pytest.raises(ConfigError, match="Got 7 for 48"):
        train(converted, harmonic, old=old[:7])
    with pytest.raises(ConfigError, match="Got 5 and 32 dimensions"):
        train(converted, harmonic, old=old[:, :5])
    with pytest.raises(ConfigError, match="needs 13 identities"):
        train(converted, dataclasses.replace(SHORT, identities=13))
    converted[0].model.embeddings.word_embeddings.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss of step 1 is nan"):
        train(converted, SHORT)


@pytest.mark.parametrize("dimension", [8, 48])
def test_heads_of_any_size(converted, dimension, tmp_path):
    stored = vectors(converted)
    head, done = train_head(stored, LABELS, dimension, dataclasses.replace(SHORT, steps=40, identities=6))
    small = apply_head(head, stored)
    assert small.shape == (48, dimension)
    assert np.mean(done.losses[-5:]) < np.mean(done.losses[:5])
    np.testing.assert_allclose(np.linalg.norm(small, axis=1), 1, atol=1e-5)
    add_head(converted, dimension)
    assert vectors(converted).shape == (48, dimension)
    if dimension > 32:  # nothing is lost before training: the head begins as a rotation
        np.testing.assert_allclose(vectors(converted) @ vectors(converted).T, stored @ stored.T, atol=1e-5)
    train(converted, SHORT)
    from sentence_transformers import SentenceTransformer

    converted.save(str(tmp_path))
    np.testing.assert_allclose(
        vectors(SentenceTransformer(str(tmp_path), device="cpu")), vectors(converted), atol=1e-6
    )


def test_an_evaluation_that_fails_loses_no_training(converted, tmp_path):
    def fails(encoder):
        raise ValueError("no")

    config = dataclasses.replace(SHORT, save_every=1000, output=tmp_path / "run")
    again = copy.deepcopy(converted)
    with pytest.raises(ValueError, match="no"):
        train(converted, config, evaluate=fails)
    done = train(again, dataclasses.replace(config, resume=True))
    assert done.step == len(done.losses) == 4
    assert np.array_equal(vectors(again), vectors(converted))
