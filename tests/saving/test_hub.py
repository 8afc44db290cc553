"""`push_to_hub` of a converted model, to a hub made of folders, and back."""

import inspect
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from conversions import redrawn, same_outputs
from families import SHORT
from families import llama as tiny
from transformers import AutoModelForCausalLM

import hf_rfa
from hf_rfa.runtime.record import RECORD


class FolderHub:
    """Stands for `HfApi`: repositories are folders, laid out as `huggingface_hub` lays its cache out.

    Each method's arguments are checked against those of the real one.
    """

    def __init__(self, cache):
        self.cache, self.created = cache, {}

    def __getattr__(self, name):
        real, answer = inspect.signature(getattr(huggingface_hub.HfApi, name)), ANSWERS[name]

        def method(*args, **kwargs):
            given = real.bind(self, *args, **kwargs)
            given.apply_defaults()
            return answer(SimpleNamespace(hub=self, **{k: v for k, v in given.arguments.items() if k != "self"}))

        return method

    def root(self, repo):
        return self.cache / f"models--{repo.replace('/', '--')}"

    def snapshot(self, repo, revision):
        return self.root(repo) / "snapshots" / f"{len(revision or 'main'):040x}"


def create_repo(given):
    assert given.exist_ok
    given.hub.created[given.repo_id] = given.private
    return SimpleNamespace(repo_id=given.repo_id)


def create_branch(given):
    given.hub.snapshot(given.repo_id, given.branch).mkdir(parents=True, exist_ok=given.exist_ok)


def file_exists(given):
    return (given.hub.snapshot(given.repo_id, given.revision) / given.filename).exists()


def upload_folder(given):
    folder = given.hub.snapshot(given.repo_id, given.revision)
    shutil.copytree(given.folder_path, folder, dirs_exist_ok=True)
    (given.hub.root(given.repo_id) / "refs").mkdir(exist_ok=True)
    (given.hub.root(given.repo_id) / "refs" / (given.revision or "main")).write_text(folder.name)
    return SimpleNamespace(oid=folder.name, commit_message=given.commit_message)


ANSWERS = {each.__name__: each for each in (create_repo, create_branch, file_exists, upload_folder)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FolderHub(tmp_path / "hub")
    monkeypatch.setattr("hf_rfa.saving.hub.HfApi", lambda **options: hub)
    return hub


def at(hub):
    return {"cache_dir": hub.cache, "local_files_only": True}


@pytest.mark.parametrize("load", [hf_rfa, AutoModelForCausalLM])
def test_a_pushed_model_comes_back(load, hub):
    model, other = redrawn(tiny(), draw=3), redrawn(tiny(), draw=4)
    done = model.push_to_hub("me/repo", private=True, commit_message="First", max_shard_size="20KB")
    assert (done.commit_message, hub.created) == ("First", {"me/repo": True})
    assert len(list(hub.snapshot("me/repo", None).glob("model-*.safetensors"))) > 1
    other.push_to_hub("me/repo", revision="another")
    assert same_outputs(load.from_pretrained("me/repo", **at(hub)), model)
    assert same_outputs(load.from_pretrained("me/repo", revision="another", **at(hub)), other)


def test_the_models_own_save_pushes_it_too(hub, tmp_path):
    model = redrawn(tiny())
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/repo", tags=["mine"])
    assert same_outputs(hf_rfa.from_pretrained("me/repo", **at(hub)), model)
    assert '"mine"' in (hub.snapshot("me/repo", None) / "README.md").read_text()


def test_the_card_says_what_it_is_and_how_to_load_it(hub):
    model = tiny(max_position_embeddings=96)
    model.config._name_or_path = "owner/original"
    model = hf_rfa.convert(model, hf_rfa.RFAConfig(window=16, num_features=16, softmax_heads=[(0, 1)], kept_keys=5))
    model.push_to_hub("me/repo", tags="mine")
    card = huggingface_hub.ModelCard.load(hub.snapshot("me/repo", None) / "README.md")
    assert card.data.base_model == "owner/original"
    assert card.data.library_name == "transformers"
    assert {"hf_rfa", "custom_code", "mine"} <= set(card.data.tags)
    assert 'hf_rfa.from_pretrained("me/repo")' in card.text
    assert "A query sees 16 to 32 tokens and the first 4 exactly and up to 5 far ones" in card.text
    assert "1 of 4 key heads stay exact softmax" in card.text
    assert '"kept_keys": 5' in card.text
    assert '"seed"' not in card.text  # nothing that is as always


def test_a_card_of_ones_own_stays(hub):
    model = redrawn(tiny())
    model.push_to_hub("me/repo")
    card = hub.snapshot("me/repo", None) / "README.md"
    assert "random-feature attention" in card.read_text()
    card.write_text("written by hand")
    model.push_to_hub("me/repo")
    assert card.read_text() == "written by hand"


def test_a_reverted_model_is_pushed_by_transformers(hub, monkeypatch):
    asked = []
    monkeypatch.setattr("transformers.PreTrainedModel.push_to_hub", lambda self, repo: asked.append(repo))
    model = redrawn(tiny())
    body = model.model  # a part of a converted model
    body.push_to_hub("me/body")
    hf_rfa.revert(model).push_to_hub("me/plain")
    assert asked == ["me/body", "me/plain"]
    assert RECORD not in hf_rfa.convert(model, SHORT, calibrate=False).model.__dict__
