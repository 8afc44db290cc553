"""Every file is found through one `Source`: a hub cache made of folders, with two revisions and a sub-folder."""

import shutil

import pytest
import torch
from conversions import redrawn, same_outputs
from families import PEFT_ASKS, SHORT, build, inputs_for, lora, outputs_of
from transformers import LlamaForCausalLM
from transformers.utils import cached_file

import hf_rfa
from hf_rfa import CheckpointError
from hf_rfa.checkpoint import holds_conversion, load_any
from hf_rfa.saving.source import HUB_OPTIONS, Source

SHA = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def snapshot(cache, repo, revision):
    """The folder of one revision in a hub cache, as `huggingface_hub` lays it out."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(SHA[revision])
    folder = root / "snapshots" / SHA[revision]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def version(seed, model=None):
    """A model of its own weights and its own draw."""
    model = build("llama") if model is None else model
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + seed)
    return redrawn(model, draw=seed + 1)


@pytest.fixture
def published(cache):
    """Two revisions of one repository, each with another conversion in a sub-folder."""
    models = {}
    for number, revision in enumerate(SHA):
        folder = snapshot(cache, "me/repo", revision)
        models[revision, None] = version(2 * number)
        models[revision, "inner"] = version(2 * number + 1)
        models[revision, None].save_pretrained(folder)
        models[revision, "inner"].save_pretrained(folder / "inner")
    return models


@pytest.mark.parametrize("load", [hf_rfa.from_pretrained, load_any])
@pytest.mark.parametrize("subfolder", [None, "inner"])
@pytest.mark.parametrize("revision", [None, "main", "v1", SHA["v1"]])
def test_revision_subfolder_and_cache_hold_for_every_file(load, revision, subfolder, published, cache):
    options = {"revision": revision, "subfolder": subfolder, "cache_dir": cache, "local_files_only": True}
    options = {key: value for key, value in options.items() if value is not None}
    want = published["v1" if revision in ("v1", SHA["v1"]) else "main", subfolder]
    others = [model for model in published.values() if model is not want]
    assert holds_conversion("me/repo", **options)
    loaded = load("me/repo", **options)
    assert same_outputs(loaded, want)
    assert not any(same_outputs(loaded, other) for other in others)


def test_a_subfolder_of_a_folder(published, cache):
    folder = snapshot(cache, "me/repo", "v1")
    assert same_outputs(hf_rfa.from_pretrained(folder, subfolder="inner"), published["v1", "inner"])
    assert same_outputs(hf_rfa.from_pretrained(folder), published["v1", None])


def test_every_option_reaches_every_file(published, cache, monkeypatch):
    """Each look-up hears of them; of the revision as the commit that was found first."""
    options = {"token": "secret", "force_download": False, "local_files_only": True, "cache_dir": cache}
    heard = []

    def listening(name, file, **given):
        heard.append((file, {key: given.get(key) for key in (*options, "revision", "subfolder")}))
        return cached_file(name, file, **given)

    monkeypatch.setattr("hf_rfa.saving.source.cached_file", listening)
    hf_rfa.from_pretrained("me/repo", revision="v1", subfolder="inner", **options)
    assert {"rfa_config.json", "rfa_model.safetensors", "config.json", "adapter_config.json"} <= {f for f, _ in heard}
    (_, first), *rest = heard
    assert first == {**options, "revision": "v1", "subfolder": "inner"}
    assert all(given == {**options, "revision": SHA["v1"], "subfolder": "inner"} for _, given in rest)


def test_a_branch_that_moves_meanwhile_does_not_mix_two_states(published, cache, monkeypatch):
    """After the first file, the branch points to another commit."""
    moved = []

    def moving(name, file, **given):
        found = cached_file(name, file, **given)
        (snapshot(cache, "me/repo", "main").parent.parent / "refs" / "main").write_text(SHA["v1"])
        moved.append(file)
        return found

    monkeypatch.setattr("hf_rfa.saving.source.cached_file", moving)
    loaded = hf_rfa.from_pretrained("me/repo", cache_dir=cache, local_files_only=True)
    assert len(moved) > 1
    assert same_outputs(loaded, published["main", None])


@pytest.mark.parametrize("load", [hf_rfa.from_pretrained, load_any])
def test_a_revision_that_is_not_there_is_named(load, published, cache):
    with pytest.raises(CheckpointError, match=r"'me/repo' \(revision 'v9'"):
        load("me/repo", revision="v9", cache_dir=cache, local_files_only=True)


def test_a_revision_without_a_conversion_is_named(published, cache):
    (snapshot(cache, "me/repo", "v1") / "rfa_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"'me/repo' \(revision 'v1'\) holds no conversion"):
        hf_rfa.from_pretrained("me/repo", revision="v1", cache_dir=cache, local_files_only=True)
    with pytest.raises(CheckpointError, match=r"'me/repo' \(revision 'v1'\) was converted"):
        load_any("me/repo", revision="v1", cache_dir=cache, local_files_only=True)
    assert same_outputs(load_any("me/repo", cache_dir=cache, local_files_only=True), published["main", None])


@pytest.fixture
def based(cache):
    """A base model in two revisions, loaded at the second, to be saved without its weights."""
    for number, revision in enumerate(SHA):
        model = build("llama")
        with torch.no_grad():
            model.model.norm.weight.mul_(1 + number)
        model.save_pretrained(snapshot(cache, "me/base", revision))

    def load(**options):
        return LlamaForCausalLM.from_pretrained("me/base", cache_dir=cache, local_files_only=True, **options).eval()

    return load


def test_a_conversion_alone_has_its_own_revision_and_its_base_model_another(based, cache):
    """The conversion's revision is not the base model's: that one was noted when it was saved."""
    model = hf_rfa.convert(based(revision="v1"), SHORT, calibrate=False)
    hf_rfa.resample(model, draw=5)
    folder = snapshot(cache, "me/conversion", "main")
    hf_rfa.save_pretrained(model, folder, adapter_only=True, base_revision="v1")
    other = hf_rfa.convert(based(), SHORT, calibrate=False)
    hf_rfa.save_pretrained(other, snapshot(cache, "me/conversion", "v1"), adapter_only=True)
    options = {"cache_dir": cache, "local_files_only": True}
    loaded = hf_rfa.from_pretrained("me/conversion", **options)
    assert same_outputs(loaded, model)
    assert same_outputs(hf_rfa.from_pretrained("me/conversion", revision="v1", **options), other)
    assert not same_outputs(model, other)
    # What we have loaded remembers where from.
    hf_rfa.save_pretrained(loaded, snapshot(cache, "me/again", "main"), adapter_only=True)
    assert same_outputs(hf_rfa.from_pretrained("me/again", **options), model)


@PEFT_ASKS
@pytest.mark.filterwarnings("ignore:Could not find a config file in me/base:UserWarning")  # PEFT asks the hub itself
@pytest.mark.parametrize("place", [{}, {"subfolder": "inner"}, {"revision": "v1"}], ids=str)
def test_a_lora_is_found_where_its_conversion_is(place, based, cache):
    models = {}
    for number, (revision, inner) in enumerate((("main", ""), ("main", "inner"), ("v1", ""))):
        model = lora(hf_rfa.convert(based(), SHORT, calibrate=False))
        hf_rfa.resample(model, draw=number + 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.mul_(1 + number)
        hf_rfa.save_pretrained(model, snapshot(cache, "me/lora", revision) / inner)
        models[revision, inner] = model
    want = models[place.get("revision", "main"), place.get("subfolder", "")]
    loaded = hf_rfa.from_pretrained("me/lora", cache_dir=cache, local_files_only=True, **place)
    assert type(loaded) is type(want)
    assert [same_outputs(loaded, model) for model in models.values()] == [model is want for model in models.values()]


def test_lm_eval_passes_the_options_on(published, cache, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    import hf_rfa.lm_eval

    seen = {}
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", lambda pretrained, **more: seen.update(model=pretrained))
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **more: {"results": {}})
    monkeypatch.setattr("hf_rfa.lm_eval.AutoTokenizer.from_pretrained", lambda name, **more: seen.update(tokens=more))
    hub = {"revision": "v1", "cache_dir": cache, "local_files_only": True}
    hf_rfa.lm_eval.evaluate("me/repo", ["nothing"], hub=hub)
    assert same_outputs(seen["model"].cpu(), published["v1", None])
    assert seen["tokens"] == hub


def test_what_a_source_takes_of_keyword_arguments():
    given = dict.fromkeys(HUB_OPTIONS, "x") | {"dtype": "float32", "device_map": "cpu"}
    source = Source.of("me/repo", given)
    assert {**source.hub, **source.code} == dict.fromkeys(HUB_OPTIONS, "x")
    base = source.elsewhere("me/base", "r", None)
    assert base.options == {k: "x" for k in HUB_OPTIONS if k not in ("subfolder", *source.code)} | {"revision": "r"}
    assert Source.of("me/repo", {"token": False, "revision": None}).options == {"token": False}


def test_a_copied_snapshot_is_a_folder_like_others(published, cache, tmp_path):
    shutil.copytree(snapshot(cache, "me/repo", "v1"), tmp_path / "copy")
    assert same_outputs(hf_rfa.from_pretrained(tmp_path / "copy"), published["v1", None])
    model = published["v1", None]
    assert torch.equal(outputs_of(model, inputs_for(model)), outputs_of(model, inputs_for(model)))
