"""A SentenceTransformer is converted, saved and used as the Transformers model in it."""

import copy
import types

import pytest
import torch
from sentence_encoders import load_encoder, words

import hf_rfa
from hf_rfa import ConfigError, RFAConfig, UnsupportedModelError
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.record import base_model

sentence_transformers = pytest.importorskip("sentence_transformers")
CONFIG = RFAConfig(num_features=16, window=16, sink_tokens=2, softmax_heads=0.25, kept_keys=8)
TEXTS = [words(90, 0), words(70, 1), words(12, 2)]


def embed(model, **options):
    return torch.as_tensor(model.encode(TEXTS, **options))


def test_it_is_converted_like_its_inner_model_and_reverted(encoder, encoder_folder):
    before = embed(encoder)
    inner = load_encoder(encoder_folder)
    rows = [dict(inner.tokenizer(text, return_tensors="pt")) for text in TEXTS[:2]]
    hf_rfa.convert(inner[0].model, CONFIG, calibrate=rows)
    assert hf_rfa.convert(encoder, CONFIG, calibrate=TEXTS[:2]) is encoder
    assert torch.equal(embed(encoder), embed(inner))
    report = hf_rfa.calibration_report(encoder)
    assert len(report.softmax_heads) == round(0.25 * len(report.heads))
    assert (embed(encoder) - before).abs().max() > 1e-4
    assert torch.equal(embed(hf_rfa.revert(encoder)), before)


def test_texts_are_cut_as_encode_cuts_them(encoder):
    encoder.max_seq_length = 60
    hf_rfa.convert(encoder, CONFIG, calibrate=TEXTS[:2])
    assert hf_rfa.calibration_report(encoder).tokens == 120


def test_it_is_saved_whole(encoder, tmp_path):
    hf_rfa.convert(encoder, CONFIG, calibrate=TEXTS[:2])
    hf_rfa.resample(encoder, 3)
    want = embed(encoder)
    encoder.save(str(tmp_path / "own"))
    hf_rfa.save_pretrained(encoder, tmp_path / "ours")
    for name in ("own", "ours"):
        loaded = load_encoder(tmp_path / name)
        assert torch.equal(embed(loaded), want)
        assert {adapter.draw_number for adapter in require_adapters(loaded)} == {3}
    alone = hf_rfa.from_pretrained(tmp_path / "ours")
    assert type(alone) is type(base_model(encoder))


def test_resampling_changes_the_next_forward_although_it_passes_all_hooks(encoder):
    hf_rfa.convert(encoder, RFAConfig(num_features=16, window=8, resample="forward", kept_keys=0), calibrate=False)
    assert hf_rfa.resample(encoder) == 1
    first = embed(encoder)
    hf_rfa.resample(encoder, 2)
    assert not torch.equal(embed(encoder), first)
    hf_rfa.resample(encoder, 1)
    assert torch.equal(embed(encoder), first)
    encoder.train()
    features = encoder.preprocess(TEXTS[:2])
    drawn = [encoder(copy.copy(features))["sentence_embedding"].detach() for _ in range(2)]
    assert [adapter.draw_number for adapter in require_adapters(encoder)] == [3] * 2
    assert not torch.equal(*drawn)


def test_matryoshka_truncation(encoder):
    hf_rfa.convert(encoder, CONFIG, calibrate=TEXTS[:2])
    want = embed(encoder)
    assert torch.equal(embed(encoder, truncate_dim=8), want[:, :8])
    with encoder.truncate_embeddings(4):
        assert torch.equal(embed(encoder), want[:, :4])


@pytest.mark.multi_process
def test_encode_in_several_processes(encoder):
    hf_rfa.convert(encoder, CONFIG, calibrate=TEXTS[:2])
    want = embed(encoder, batch_size=1)
    pool = encoder.start_multi_process_pool(["cpu", "cpu"])
    try:
        found = torch.as_tensor(encoder.encode(TEXTS, pool=pool, chunk_size=1, batch_size=1))
    finally:
        encoder.stop_multi_process_pool(pool)
    assert (found - want).abs().max() < 1e-6


def test_other_backends_are_refused(encoder):
    for backend in ("onnx", "openvino"):
        encoder.backend = backend
        with pytest.raises(UnsupportedModelError, match=f"Got backend='{backend}'. Load it with backend='torch'"):
            hf_rfa.convert(encoder, CONFIG, calibrate=False)
    encoder.backend = "torch"
    hf_rfa.convert(encoder, CONFIG, calibrate=False)


def test_models_without_one_encoder_are_refused(encoder):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = sentence_transformers.SentenceTransformer(
        modules=[StaticEmbedding(encoder.tokenizer, embedding_dim=8)], device="cpu"
    )
    with pytest.raises(ConfigError, match="or pass a SentenceTransformer that holds one"):
        hf_rfa.convert(static, CONFIG, calibrate=False)
    encoder.add_module("second", copy.deepcopy(encoder[0]))
    with pytest.raises(UnsupportedModelError, match="holds 2 Transformers models"):
        hf_rfa.convert(encoder, CONFIG, calibrate=False)


def test_without_texts_it_asks_for_them(encoder):
    with pytest.raises(ConfigError, match=r"calibrate=\[text, ...\]"):
        hf_rfa.convert(encoder, CONFIG)


def test_what_only_looks_like_a_wrapper_is_no_sentence_transformer():
    with pytest.raises(ConfigError, match=r"must be a loaded Transformers model. Got SimpleNamespace"):
        base_model(types.SimpleNamespace())
