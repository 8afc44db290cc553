"""Saving and loading: identical logits, never a silent redraw, and a clear word about every kind of damage."""

import copy
import json
import logging
import shutil

import pytest
import torch
from conversions import converted
from families import PEFT_ASKS, SHORT, attention_modules, build, inputs_for, lora, outputs_of, token_ids
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_rfa
from hf_rfa import CheckpointError, UnsupportedModelError
from hf_rfa.conversion.implementation import IMPLEMENTATION
from hf_rfa.runtime.record import conversion_config
from hf_rfa.saving.marks import MARK
from hf_rfa.saving.saved_files import digest

NAMES = ["llama", "gpt2", "gemma3", "gpt_oss", "deepseek_v3", "jamba", "bert", "vit", "bart"]
FAMILIES = pytest.mark.parametrize("family", NAMES)
PAIR = ["rfa_config.json", "rfa_model.safetensors"]
SAVES = {"ours": hf_rfa.save_pretrained, "its own": lambda model, folder: model.save_pretrained(folder)}


def altered(family="llama", **changes):
    """A converted model that no seed gives back: a redraw instead of a load cannot pass for it."""
    return alter(converted(family, **changes))


def alter(model):
    hf_rfa.resample(model, draw=3)
    for number, module in enumerate(attention_modules(model)):
        adapter = module.rfa
        generator = torch.Generator().manual_seed(number)
        adapter.omega += 0.1 * torch.randn(adapter.omega.shape, generator=generator)
        adapter.alpha.copy_(torch.linspace(0.3, 0.9, adapter.key_heads))
        adapter.gamma.copy_(torch.linspace(0.5, 2.0, adapter.key_heads))
    return model


def assert_same_model(loaded, model, inputs=None):
    inputs = inputs_for(model) if inputs is None else inputs
    assert type(loaded) is type(model)
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(model, inputs))
    assert conversion_config(loaded) == conversion_config(model)
    for one, two in zip(attention_modules(loaded), attention_modules(model), strict=True):
        for name, tensor in two.rfa.state_dict().items():
            assert torch.equal(one.rfa.state_dict()[name], tensor), name
            assert one.rfa.state_dict()[name].dtype == tensor.dtype, name
        assert one.rfa.draw_number == 3


def saved(folder, **changes):
    model = altered(**changes)
    hf_rfa.save_pretrained(model, folder)
    return model


def rewrite(path, **changes):
    values = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del values[name]
        else:
            values[name] = value
    path.write_text(json.dumps(values))


def retensor(folder, change):
    """Rewrite the conversion's tensors by a function of their dictionary."""
    path = folder / "rfa_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


# --- there and back --------------------------------------------------------------------------------------------------


@FAMILIES
def test_a_saved_model_comes_back(family, tmp_path):
    model = altered(family)
    hf_rfa.save_pretrained(model, tmp_path / "new" / "folder")
    assert_same_model(hf_rfa.from_pretrained(tmp_path / "new" / "folder"), model)


@FAMILIES
def test_the_models_own_save_pretrained_is_enough(family, tmp_path):
    model = altered(family)
    model.save_pretrained(tmp_path)
    assert_same_model(hf_rfa.from_pretrained(str(tmp_path)), model)


@FAMILIES
def test_the_conversion_alone_comes_back_with_its_base_model(family, tmp_path):
    base = build(family)
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base").eval()
    alter(hf_rfa.convert(model, SHORT, calibrate=False))
    hf_rfa.save_pretrained(model, tmp_path / "conversion", adapter_only=True)
    assert sorted(path.name for path in (tmp_path / "conversion").iterdir()) == PAIR
    assert_same_model(hf_rfa.from_pretrained(tmp_path / "conversion"), model)


def test_a_sharded_model_comes_back(tmp_path):
    model = altered()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_model(hf_rfa.from_pretrained(tmp_path), model)


def test_saving_twice_is_saving_once(tmp_path):
    model = saved(tmp_path / "one")
    again = hf_rfa.from_pretrained(tmp_path / "one")
    hf_rfa.save_pretrained(again, tmp_path / "two")
    shutil.rmtree(tmp_path / "one")
    assert_same_model(hf_rfa.from_pretrained(tmp_path / "two"), model)
    hf_rfa.save_pretrained(again, tmp_path / "two")
    assert_same_model(hf_rfa.from_pretrained(tmp_path / "two"), model)


def test_the_models_own_save_over_an_older_conversion_is_what_loads(tmp_path):
    """A Trainer that saves into the folder that it was started from must not bring the older omega back."""
    model = saved(tmp_path)
    for module in attention_modules(model):
        module.rfa.omega += 0.5
    model.save_pretrained(tmp_path)
    assert_same_model(hf_rfa.from_pretrained(tmp_path), model)


def test_exact_heads_layers_and_every_field_come_back(tmp_path):
    model = saved(
        tmp_path, feature_map="trigonometric", omega="gaussian", softmax_heads=[(0, 1)], layers=[0], seed=7,
        resample=5, window=4, sink_tokens=1,
    )  # fmt: skip
    loaded = hf_rfa.from_pretrained(tmp_path)
    assert_same_model(loaded, model)
    assert [module.rfa.converted for module in attention_modules(loaded)] == [True, False]
    assert [module.rfa.softmax_heads for module in attention_modules(loaded)] == [(1,), (0, 1)]


def test_a_calibrated_model_comes_back(tmp_path):
    model = converted("llama", softmax_heads=0.25)
    report = hf_rfa.calibrate(model, token_ids(2, 60))
    hf_rfa.resample(model, draw=3)
    hf_rfa.save_pretrained(model, tmp_path)
    loaded = hf_rfa.from_pretrained(tmp_path)
    assert_same_model(loaded, model)
    assert list(conversion_config(loaded).softmax_heads) == report.softmax_heads


def test_the_draw_goes_on_where_it_was(tmp_path):
    model = saved(tmp_path)
    loaded = hf_rfa.from_pretrained(tmp_path)
    assert hf_rfa.resample(loaded) == hf_rfa.resample(model) == 4
    assert torch.equal(outputs_of(loaded, inputs_for(model)), outputs_of(model, inputs_for(model)))


def test_a_loaded_model_generates_trains_and_reverts(tmp_path):
    model, ids = saved(tmp_path), token_ids()
    loaded = hf_rfa.from_pretrained(tmp_path)
    assert not loaded.training
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))
    loaded.train()(ids, labels=ids).loss.backward()
    hf_rfa.revert(loaded.eval())
    assert torch.equal(outputs_of(loaded, {"input_ids": ids}), outputs_of(build("llama"), {"input_ids": ids}))


def test_saving_changes_nothing(tmp_path):
    model = altered()
    before, tensors = outputs_of(model, inputs_for(model)), {k: t.clone() for k, t in model.state_dict().items()}
    hf_rfa.save_pretrained(model, tmp_path)
    assert torch.equal(outputs_of(model, inputs_for(model)), before)
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", torch.float64])
def test_a_dtype_for_the_weights_is_not_for_the_adapters(dtype, tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    saved(tmp_path / "conversion")
    loaded = hf_rfa.from_pretrained(tmp_path / "conversion", dtype=dtype)
    assert loaded.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype).eval()
    assert_same_model(loaded, alter(hf_rfa.convert(base, SHORT, calibrate=False)))


def test_a_bfloat16_model_keeps_float32_adapters_in_the_file(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16).eval()
    model = alter(hf_rfa.convert(base, SHORT, calibrate=False))
    for name, save in SAVES.items():
        folder = tmp_path / name
        save(model, folder)
        loaded = hf_rfa.from_pretrained(folder)
        assert loaded.dtype == torch.bfloat16
        assert_same_model(loaded, model)


def test_keyword_arguments_reach_the_models_own_loading(tmp_path):
    model = saved(tmp_path)
    loaded = hf_rfa.from_pretrained(tmp_path, device_map="cpu", use_safetensors=True, local_files_only=True)
    assert_same_model(loaded, model)


def test_the_loading_info_is_that_of_transformers(tmp_path):
    model = saved(tmp_path)
    loaded, info = hf_rfa.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_model(loaded, model)
    build("llama").save_pretrained(tmp_path / "plain")
    _, want = LlamaForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert info.keys() == want.keys()
    assert not any(info.values())


@PEFT_ASKS
def test_the_loading_info_beside_a_lora(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = lora(alter(hf_rfa.convert(LlamaForCausalLM.from_pretrained(tmp_path / "base"), SHORT, calibrate=False)))
    hf_rfa.save_pretrained(model, tmp_path / "both")
    loaded, info = hf_rfa.from_pretrained(tmp_path / "both", output_loading_info=True)
    assert_same_model(loaded, model, {"input_ids": token_ids(), "use_cache": False})
    assert not any(info.values())


def test_loading_leaves_the_class_as_it_was(tmp_path):
    saved(tmp_path)
    before = dict(vars(LlamaForCausalLM))
    hf_rfa.from_pretrained(tmp_path)
    with pytest.raises(TypeError):
        hf_rfa.from_pretrained(tmp_path, no_such_argument=1)
    assert dict(vars(LlamaForCausalLM)) == before


def test_loading_does_not_touch_the_random_state(tmp_path):
    saved(tmp_path)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    hf_rfa.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


# --- PEFT ------------------------------------------------------------------------------------------------------------


@PEFT_ASKS
@pytest.mark.parametrize("converted_first", [True, False])
def test_a_lora_and_a_conversion_share_a_folder(converted_first, tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    model = (
        lora(hf_rfa.convert(base, SHORT, calibrate=False))
        if converted_first
        else hf_rfa.convert(lora(base), SHORT, calibrate=False)
    )
    alter(model)
    hf_rfa.save_pretrained(model, tmp_path / "both")
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert {*PAIR, "adapter_config.json", "adapter_model.safetensors"} <= names
    assert not {"config.json", "model.safetensors"} & names
    assert not [key for key in load_file(tmp_path / "both" / "adapter_model.safetensors") if "rfa" in key]
    loaded = hf_rfa.from_pretrained(tmp_path / "both")
    assert_same_model(loaded, model, {"input_ids": token_ids(), "use_cache": False})
    merged = loaded.merge_and_unload()
    want = outputs_of(model, {"input_ids": token_ids(), "use_cache": False})
    assert_close(outputs_of(merged, {"input_ids": token_ids(), "use_cache": False}), want, atol=1e-5, rtol=0)


@PEFT_ASKS
def test_a_merged_lora_saves_as_a_whole_model(tmp_path):
    model = alter(lora(converted()).merge_and_unload())
    hf_rfa.save_pretrained(model, tmp_path)
    assert_same_model(hf_rfa.from_pretrained(tmp_path), model)


# --- what cannot be saved --------------------------------------------------------------------------------------------


def test_an_unconverted_model_is_not_saved(tmp_path):
    with pytest.raises(UnsupportedModelError, match="not converted"):
        hf_rfa.save_pretrained(build("llama"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_conversion_alone_of_a_model_from_nowhere_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="Save the whole model"):
        hf_rfa.save_pretrained(altered(), tmp_path / "new", adapter_only=True)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"Cannot write to .*file"):
            hf_rfa.save_pretrained(altered(), folder)


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "rfa_model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="Cannot write"):
        hf_rfa.save_pretrained(altered(), tmp_path)


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    saved(folder)
    return folder


@pytest.fixture
def folder(whole_folder, tmp_path):
    """A saved conversion to be damaged."""
    shutil.copytree(whole_folder, tmp_path / "saved")
    return tmp_path / "saved"


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


DAMAGE = {
    "truncated tensors": (
        lambda f: (f / PAIR[1]).write_bytes((f / PAIR[1]).read_bytes()[:-40]), "damaged: copy or save it again"),
    "cut header": (lambda f: (f / PAIR[1]).write_bytes((f / PAIR[1]).read_bytes()[:20]), "truncated or damaged"),
    "empty tensors": (lambda f: (f / PAIR[1]).write_bytes(b""), "truncated or damaged"),
    "garbage json": (lambda f: (f / PAIR[0]).write_text("{'no': json"), "damaged: save the model again"),
    "binary json": (lambda f: (f / PAIR[0]).write_bytes(b"\xff\xfe\x00\x80"), "damaged: save the model again"),
    "empty json": (lambda f: (f / PAIR[0]).write_text(""), "damaged: save the model again"),
    "json list": (lambda f: (f / PAIR[0]).write_text("[1, 2]"), "must hold a JSON object"),
    "newer version": (lambda f: rewrite(f / PAIR[0], format_version=3), "format version 3.*pip install -U hf_rfa"),
    "no version": (lambda f: rewrite(f / PAIR[0], format_version=None), "format_version.*Save the model again"),
    "version in words": (lambda f: rewrite(f / PAIR[0], format_version="one"), "format_version.*Save the model again"),
    "no config": (lambda f: rewrite(f / PAIR[0], rfa=None), r"lacks \['rfa'\].*Save the model again"),
    "config in words": (lambda f: rewrite(f / PAIR[0], rfa="positive"), "cannot be read"),
    "impossible config": (lambda f: rewrite(f / PAIR[0], rfa={"format_version": 1, "window": -1}), "window.*Set 64"),
    "unknown field": (lambda f: rewrite(f / PAIR[0], rfa={"format_version": 1, "speed": 9}), "speed"),
    "newer config": (lambda f: rewrite(f / PAIR[0], rfa={"format_version": 3}), "pip install -U hf_rfa"),
    "unknown class": (lambda f: rewrite(f / PAIR[0], architecture="NoSuchModel"), "NoSuchModel.*model_class.*upgrade"),
    "missing tensor": (lambda f: retensor(f, lambda t: t.pop(first(t, "omega"))), "1 tensors are missing.*base model"),
    "extra tensor": (
        lambda f: retensor(f, lambda t: t.update(more=torch.zeros(1))), "1 do not belong there.*base model"),
    "other shape": (
        lambda f: retensor(f, lambda t: t.update({first(t, "omega"): torch.zeros(2, 9, 8)})),
        r"has shape \(2, 9, 8\); the model needs \(2, 16, 8\)"),
    "NaN": (
        lambda f: retensor(f, lambda t: t[first(t, "omega")].fill_(float("nan"))), "not finite.*save the model again"),
    "infinity": (
        lambda f: retensor(f, lambda t: t[first(t, "alpha")].fill_(float("inf"))), "not finite.*save the model again"),
    "other config of the model": (
        lambda f: rewrite(f / PAIR[0], rfa={"format_version": 1, "num_features": 8}), "has shape .* the model needs"),
    "layers that the model lacks": (
        lambda f: rewrite(f / PAIR[0], rfa={"format_version": 1, "layers": [5]}), "layers"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_with_what_to_do(damage, message, folder):
    damage(folder)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        hf_rfa.from_pretrained(folder)


def test_the_undamaged_folder_loads(folder):
    """Else the test above could pass for another reason."""
    hf_rfa.from_pretrained(folder)


def test_a_conversion_from_before_far_parts_had_a_limit_attends_as_it_did(tmp_path):
    model = altered()
    hf_rfa.save_pretrained(model, tmp_path)
    tensors = {key: t for key, t in load_file(tmp_path / PAIR[1]).items() if not key.endswith("far_limit")}
    assert len(tensors) < len(load_file(tmp_path / PAIR[1]))
    save_file(tensors, tmp_path / PAIR[1], metadata={"format": "pt"})
    rewrite(tmp_path / PAIR[0], digest=digest(tensors))
    config = json.loads((tmp_path / "config.json").read_text())
    rewrite(tmp_path / "config.json", rfa_config={**config["rfa_config"], "pair": digest(tensors)})
    loaded = hf_rfa.from_pretrained(tmp_path)
    assert_same_model(loaded, model)
    for module in attention_modules(model):
        module.rfa.set_kernel(module.rfa.feature_maps, far_limit=torch.full_like(module.rfa.gamma, 1e-3))
    inputs = inputs_for(model)
    assert (outputs_of(model, inputs) - outputs_of(loaded, inputs)).abs().max() > 1e-5  # a limit would show


def test_the_conversion_of_a_copy_is_its_own(tmp_path):
    model = altered()
    twin = copy.deepcopy(model)
    for module in attention_modules(twin):
        module.rfa.omega += 0.5
    twin.save_pretrained(tmp_path)
    assert_same_model(hf_rfa.from_pretrained(tmp_path), twin)


@pytest.mark.parametrize("name", PAIR)
def test_without_one_of_its_two_files_a_folder_does_not_load(name, folder):
    """Not even by drawing omega again."""
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        hf_rfa.from_pretrained(folder)


def test_missing_weights_of_the_conversion_are_named(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = hf_rfa.convert(LlamaForCausalLM.from_pretrained(tmp_path / "base"), SHORT, calibrate=False)
    hf_rfa.save_pretrained(model, tmp_path / "conversion", adapter_only=True)
    (tmp_path / "conversion" / PAIR[1]).unlink()
    with pytest.raises(CheckpointError, match=r"lacks .*Save the model again"):
        hf_rfa.from_pretrained(tmp_path / "conversion")


def test_a_missing_base_model_is_named(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = hf_rfa.convert(LlamaForCausalLM.from_pretrained(tmp_path / "base"), SHORT, calibrate=False)
    hf_rfa.save_pretrained(model, tmp_path / "conversion", adapter_only=True)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(CheckpointError, match="base"):
        hf_rfa.from_pretrained(tmp_path / "conversion")


def test_a_conversion_that_does_not_name_its_base_model_says_what_to_do(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = hf_rfa.convert(LlamaForCausalLM.from_pretrained(tmp_path / "base"), SHORT, calibrate=False)
    hf_rfa.save_pretrained(model, tmp_path / "conversion", adapter_only=True)
    rewrite(tmp_path / "conversion" / PAIR[0], base={"name": None})
    with pytest.raises(CheckpointError, match="which base model"):
        hf_rfa.from_pretrained(tmp_path / "conversion")


def test_another_base_model_is_refused(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = hf_rfa.convert(LlamaForCausalLM.from_pretrained(tmp_path / "base"), SHORT, calibrate=False)
    hf_rfa.save_pretrained(model, tmp_path / "conversion", adapter_only=True)
    shutil.rmtree(tmp_path / "base")
    build("qwen3").save_pretrained(tmp_path / "base")  # heads of another dim
    with pytest.raises(CheckpointError, match="not the one that the conversion was saved from"):
        hf_rfa.from_pretrained(tmp_path / "conversion")


def test_truncated_weights_of_the_model_itself_are_named(tmp_path):
    altered().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        hf_rfa.from_pretrained(tmp_path)


def test_missing_weights_of_the_model_itself_are_named(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        hf_rfa.from_pretrained(tmp_path)


def test_a_shard_that_is_missing_is_named(tmp_path):
    altered().save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    lost = next(file for key, file in index.items() if key.endswith("rfa.omega"))
    (tmp_path / lost).unlink()
    with pytest.raises(CheckpointError, match=lost):
        hf_rfa.from_pretrained(tmp_path)


def test_a_folder_without_a_conversion_is_said_to_be_one(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no conversion.*hf_rfa\.convert"):
        hf_rfa.from_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no conversion"):
        hf_rfa.from_pretrained(tmp_path / "empty")


def test_a_path_that_is_no_folder_is_said_to_be_none(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            hf_rfa.from_pretrained(path)


def test_a_hub_id_that_is_not_found_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr("hf_rfa.saving.source.cached_file", unreachable)
    with pytest.raises(CheckpointError, match=r"somebody/something.*the hub cannot be reached"):
        hf_rfa.from_pretrained("somebody/something")


# --- a converted folder never loads as softmax in silence ------------------------------------------------------------


class _Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def transformers_warnings():
    handler, logger = _Messages(), logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield handler.messages
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_plain_load_of_a_converted_folder_is_the_converted_model(save, tmp_path, transformers_warnings):
    """What happens where nothing has imported hf_rfa: `test_loads_everywhere`."""
    model = altered()
    save(model, tmp_path)
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    assert transformers_warnings == []


def test_the_attention_alone_does_not_answer():
    """As where a model is built from the config of a converted one."""
    with pytest.raises(UnsupportedModelError, match=r"hf_rfa\.from_pretrained"):
        AutoModelForCausalLM.from_config(altered().config)(token_ids())


def test_the_mark_in_the_config_is_the_name_of_our_attention():
    assert MARK == {"attn_implementation": IMPLEMENTATION}


def test_our_own_load_is_silent(tmp_path, transformers_warnings):
    for name, save in SAVES.items():
        save(altered(), tmp_path / name)
        hf_rfa.from_pretrained(tmp_path / name)
    assert transformers_warnings == []


def test_a_folder_that_was_reverted_before_saving_is_a_plain_one(tmp_path, transformers_warnings):
    model = hf_rfa.revert(altered())
    model.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert transformers_warnings == []
    assert "rfa" not in (tmp_path / "config.json").read_text()


def test_the_upload_of_the_models_own_save_holds_the_conversion(tmp_path, monkeypatch):
    model, uploads = altered(), []

    def upload(repo_id, **options):
        uploads.append((repo_id, options, sorted(path.name for path in (tmp_path / "mine").iterdir())))

    monkeypatch.setattr(model, "push_to_hub", upload, raising=False)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="somebody/mine", private=True)
    ((repo_id, options, files),) = uploads
    assert (repo_id, options) == ("somebody/mine", {"private": True})
    assert set(PAIR) | {"config.json", "model.safetensors"} <= set(files)


def test_a_conversion_that_cannot_be_written_by_the_models_own_save_is_named(tmp_path):
    (tmp_path / "rfa_model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="Cannot write"):
        altered().save_pretrained(tmp_path)
