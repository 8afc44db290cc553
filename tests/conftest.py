"""Fixtures that several test files share. Nothing here needs a network."""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

# Without a GPU the Triton kernels are tested in its interpreter, which is chosen when anybody first imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import paths
from families import build, llama
from sentence_encoders import identity_texts, load_encoder, save_encoder
from transformers import LlamaForCausalLM

import hf_rfa

DEFAULT_KEPT_KEYS = hf_rfa.config.DEFAULT_KEPT_KEYS
# Tiny models gain nothing from a second thread, and lose a lot to waiting for it on a machine that does other things.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The example of a public name runs as its reader runs it: with nothing but what it imports itself."""
    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.dtest.name.rpartition(".")[2] in hf_rfa.__all__:
            item.dtest.globs.clear()


@pytest.fixture(autouse=True, scope="module")
def no_kept_keys_by_default() -> Iterator[None]:
    """Tests keep keys where they say so: of texts as short as theirs the default, 128, would leave nothing far.

    Tests of the default itself are marked `default_kept_keys`; examples and commands have it, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_rfa.config, "DEFAULT_KEPT_KEYS", 0)
        yield


@pytest.fixture(autouse=True)
def default_kept_keys(request, monkeypatch) -> None:
    """What the marker means."""
    if request.node.get_closest_marker("default_kept_keys") is not None:
        monkeypatch.setattr(hf_rfa.config, "DEFAULT_KEPT_KEYS", DEFAULT_KEPT_KEYS)


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A Llama with its weights as they are drawn, for which texts end; the same one every time."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 4096}
    model = llama(gain=1, **sizes)
    model.generation_config.eos_token_id = model.config.eos_token_id
    return model


@pytest.fixture
def base(tmp_path) -> Callable[[], LlamaForCausalLM]:
    """A function that loads the same Llama from the same folder every time."""
    build("llama").save_pretrained(tmp_path / "base")
    return lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()


@pytest.fixture
def encoder_folder(tmp_path) -> Path:
    """A folder with a tiny encoder for sentence-transformers."""
    return save_encoder(tmp_path / "encoder")


@pytest.fixture
def encoder(encoder_folder):
    """The encoder in `encoder_folder`."""
    pytest.importorskip("sentence_transformers")
    return load_encoder(encoder_folder)


@pytest.fixture
def labelled(tmp_path) -> Path:
    """A .jsonl file of 60 identities with four texts each."""
    path = tmp_path / "labelled.jsonl"
    rows = ({"who": who, "text": text} for who, text in identity_texts(60, 4))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def imported(monkeypatch) -> Iterator[Callable[..., ModuleType]]:
    """A function that imports a script as it is when it is run: from its own folder. The next test finds it new."""
    threads = torch.get_num_threads()

    def load(name: str, folder: Path = paths.SCRIPTS) -> ModuleType:
        monkeypatch.syspath_prepend(str(folder))
        return importlib.import_module(name)

    yield load
    torch.set_num_threads(threads)
    for name, module in list(sys.modules.items()):
        if paths.SCRIPTS in Path(getattr(module, "__file__", None) or "").parents:
            del sys.modules[name]
