"""A server of a tiny converted model, and a client of it."""

import pytest
from servers import serving, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def server(model):
    with serving(model, prefill_tokens=64) as running:
        yield running


@pytest.fixture
def client(server):
    with server.openai() as found:
        yield found
