"""Fixtures of the tests of hf_rfa/embeddings."""

import pytest
from sentence_encoders import load_encoder


@pytest.fixture
def encoder(encoder_folder):
    """The encoder in `encoder_folder`."""
    pytest.importorskip("sentence_transformers")
    return load_encoder(encoder_folder)
