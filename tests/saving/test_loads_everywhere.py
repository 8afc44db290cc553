"""A converted folder in programs that know nothing of it: the converted model, or an error; never softmax.

With `import hf_rfa` anywhere in the process (as here) every class of Transformers loads it. What holds without that
import is asked in another process, in which hf_rfa is first not installed, and then is.
"""

import json
import os
import subprocess
import sys
import textwrap
import warnings
from importlib.util import find_spec

import pytest
import torch
from conversions import redrawn, same_outputs
from families import PEFT_ASKS, SHORT, build, inputs_for, lora, outputs_of, token_ids
from families import llama as tiny
from safetensors.torch import save_file
from tokenizers_of_tests import byte_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    pipeline,
)

import hf_rfa
from hf_rfa import CheckpointError, ConfigError
from hf_rfa.runtime.adapters import require_adapters
from hf_rfa.runtime.record import is_converted
from hf_rfa.saving.marks import CODE_FILE

INPUTS = {"input_ids": token_ids(), "use_cache": False}


@pytest.fixture(scope="module")
def llama():
    return redrawn(tiny(vocab_size=258))


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    """A causal LM and its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    tokenizer = byte_tokenizer(bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


# --- with hf_rfa imported --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"device_map": "cpu"}, {"dtype": torch.float32}, {"attn_implementation": "rfa"}])
@pytest.mark.parametrize("load", [AutoModelForCausalLM, LlamaForCausalLM, hf_rfa])
def test_causal_models_load_by_every_class(load, how, llama, folder):
    if load is hf_rfa and "attn_implementation" in how:
        pytest.skip("asks Transformers")
    loaded, info = load.from_pretrained(folder, output_loading_info=True, **how)
    assert type(loaded) is type(llama)
    assert same_outputs(loaded, llama)
    assert not info["missing_keys"]
    assert [a.draw_number for a in require_adapters(loaded)] == [a.draw_number for a in require_adapters(llama)]


@pytest.mark.parametrize(
    ("auto", "family"),
    [
        (AutoModelForMaskedLM, "bert"), (AutoModelForSeq2SeqLM, "bart"), (AutoModelForImageClassification, "vit"),
        (AutoModelForCausalLM, "gemma3"), (AutoModelForCausalLM, "jamba"),
    ],
)  # fmt: skip
def test_other_families_load_by_their_auto_class(auto, family, tmp_path):
    model = build(family)
    if family in ("bert", "vit"):  # with a head
        torch.manual_seed(0)
        model = auto.from_config(model.config).eval()
    model = redrawn(model)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(outputs_of(loaded, inputs_for(model)), outputs_of(model, inputs_for(model)))


def test_another_head_on_the_same_weights(llama, folder):
    """Without a head the prefix of all names goes; with another one it stays."""
    body = AutoModel.from_pretrained(folder)
    assert type(body) is type(llama.model)
    assert torch.equal(outputs_of(body, INPUTS), outputs_of(llama.model, INPUTS))
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    assert classifier.num_labels == 3
    assert torch.equal(outputs_of(classifier.model, INPUTS), outputs_of(llama.model, INPUTS))


def test_a_head_on_a_body_without_one(tmp_path):
    torch.manual_seed(0)
    body = redrawn(BertForMaskedLM(build("bert").config).eval().bert)
    body.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert torch.equal(outputs_of(loaded.bert, inputs_for(body)), outputs_of(body, inputs_for(body)))


def test_a_pipeline_writes_what_the_model_writes(llama, folder):
    generator = pipeline("text-generation", model=str(folder), device="cpu")
    assert is_converted(generator.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "a text that is longer than the window of sixteen tokens, so that some of it is far"
    prompt = tokenizer(text, return_tensors="pt")
    want = llama.generate(**prompt, max_new_tokens=8, do_sample=False)
    said = generator(text, max_new_tokens=8, do_sample=False)
    assert said[0]["generated_text"] == tokenizer.decode(want[0], skip_special_tokens=True)


def test_what_transformers_serve_and_chat_do(llama, folder):
    """They look the class up by the name that the config has, and pass `attn_implementation=None`."""
    import transformers

    config = AutoConfig.from_pretrained(folder, attn_implementation=None)
    loaded = getattr(transformers, config.architectures[0]).from_pretrained(folder, attn_implementation=None)
    assert same_outputs(loaded, llama)


def test_softmax_is_not_to_be_had_by_naming_it(folder):
    for auto in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(CheckpointError, match=r"attn_implementation='sdpa'.*hf_rfa\.revert"):
            auto.from_pretrained(folder, attn_implementation="sdpa")


def test_a_config_made_by_hand_does_not_hide_the_conversion(llama, folder):
    config = LlamaConfig.from_dict({k: v for k, v in llama.config.to_dict().items() if k != "rfa_config"})
    assert same_outputs(LlamaForCausalLM.from_pretrained(folder, config=config), llama)
    assert same_outputs(LlamaForCausalLM.from_pretrained(folder, config=str(folder)), llama)


def test_arguments_by_position_are_asked_for_by_name(folder):
    with pytest.raises(ConfigError, match="by position"):
        LlamaForCausalLM.from_pretrained(folder, "something")


def test_the_class_of_a_converted_model_loads_as_its_original(llama, folder):
    assert same_outputs(type(llama).from_pretrained(folder), llama)


def test_a_folder_without_its_conversion_says_which_files_to_copy(folder, tmp_path):
    for path in folder.iterdir():
        if not path.name.startswith("rfa_"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"copy rfa_config\.json and rfa_model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_is_not_there_is_transformers_affair(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        LlamaForCausalLM.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="JSON"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_other_models_load_as_before(base):
    plain = base()
    assert not is_converted(plain)
    again = AutoModelForCausalLM.from_pretrained(plain.config._name_or_path)
    assert same_outputs(again, plain)


# --- what the files say ----------------------------------------------------------------------------------------------


def test_a_config_saved_alone_is_marked_too(llama, folder, tmp_path):
    llama.config.save_pretrained(tmp_path)
    alone, whole = (json.loads((each / "config.json").read_text()) for each in (tmp_path, folder))
    for key in ("model_type", "auto_map", "attn_implementation", "rfa_original"):
        assert alone[key] == whole[key]
    assert alone["model_type"] == "hf_rfa"
    assert (tmp_path / CODE_FILE).read_text() == (folder / CODE_FILE).read_text()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llama"


def test_parts_of_a_composite_config_are_marked(tmp_path):
    """A class for the text part alone reads its part of the config."""
    from tiny_models import Case, tiny_model

    model = redrawn(tiny_model(Case("encoder", "gemma3", "Gemma3Model")))
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["text_config"]["attn_implementation"] == "rfa"
    assert values["text_config"]["model_type"] == "gemma3_text"
    assert same_outputs(AutoModel.from_pretrained(tmp_path), model)


def test_after_revert_a_folder_is_an_ordinary_one(base, tmp_path):
    model = redrawn(base())
    model.save_pretrained(tmp_path / "converted")
    plain = hf_rfa.revert(AutoModelForCausalLM.from_pretrained(tmp_path / "converted"))
    plain.save_pretrained(tmp_path / "reverted")
    assert not [path.name for path in (tmp_path / "reverted").iterdir() if "rfa" in path.name]
    assert "rfa" not in (tmp_path / "reverted" / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "reverted")
    assert not is_converted(loaded)
    assert same_outputs(loaded, base())
    plain.save_pretrained(tmp_path / "converted")  # over its conversion, whose small files stay there
    assert not is_converted(AutoModelForCausalLM.from_pretrained(tmp_path / "converted"))


def test_folders_of_older_versions_load(llama, folder, tmp_path):
    """Those had no type of their own: with hf_rfa imported they load, too."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / CODE_FILE).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"], config["rfa_original"]
    for old in ({"attn_implementation": "rfa"}, {"attn_implementation": None}):  # before that, not even this mark
        values = {k: v for k, v in {**config, "model_type": "llama", **old}.items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if "attn_implementation" not in values:
            noted = json.loads((tmp_path / "rfa_config.json").read_text())
            noted = {key: noted[key] for key in ("rfa", "architecture", "calibration", "scope")}
            (tmp_path / "rfa_config.json").write_text(json.dumps({"format_version": 1, **noted}))
            values["rfa_config"].pop("pair")
            (tmp_path / "config.json").write_text(json.dumps(values))
        for load in (hf_rfa, AutoModelForCausalLM, LlamaForCausalLM):
            assert same_outputs(load.from_pretrained(tmp_path), llama)


# --- a LoRA ----------------------------------------------------------------------------------------------------------


@PEFT_ASKS
def test_a_lora_of_a_converted_model_does_not_load_onto_softmax(base, tmp_path):
    peft = pytest.importorskip("peft")
    model = lora(redrawn(base()))
    model.save_pretrained(tmp_path / "lora")
    assert same_outputs(hf_rfa.from_pretrained(tmp_path / "lora"), model)
    with pytest.raises(CheckpointError, match=r"hf_rfa\.from_pretrained"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"hf_rfa\.from_pretrained"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    for refused in (
        lambda: peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora"),
        lambda: base().load_adapter(tmp_path / "lora"),
    ):
        with pytest.raises(ValueError, match=r"Invalid task type.*pip install hf_rfa"):
            refused()


@PEFT_ASKS
def test_a_lora_of_an_older_version_does_not_load_onto_softmax_either(base, tmp_path):
    """Where hf_rfa is imported; its own file does not say it."""
    peft = pytest.importorskip("peft")
    model = lora(redrawn(base()))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    task = values["auto_mapping"].pop("hf_rfa_task_type")
    path.write_text(json.dumps({**values, "task_type": task, "auto_mapping": None}))
    assert same_outputs(hf_rfa.from_pretrained(tmp_path), model)
    for refused in (
        lambda: peft.PeftModel.from_pretrained(base(), tmp_path),
        lambda: peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        lambda: LlamaForCausalLM.from_pretrained(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=r"hf_rfa\.from_pretrained"):
            refused()


@PEFT_ASKS
def test_transformers_own_load_adapter_takes_the_conversion_over(base, tmp_path):
    pytest.importorskip("peft")
    model = lora(redrawn(base()))
    model.save_pretrained(tmp_path)
    fresh = hf_rfa.convert(base(), SHORT, calibrate=False)
    fresh.load_adapter(tmp_path)
    assert same_outputs(fresh, model)


@PEFT_ASKS
def test_a_lora_beside_its_whole_converted_base(base, tmp_path):
    pytest.importorskip("peft")
    redrawn(base()).save_pretrained(tmp_path)
    model = lora(AutoModelForCausalLM.from_pretrained(tmp_path))
    hf_rfa.save_pretrained(model, tmp_path)
    assert same_outputs(hf_rfa.from_pretrained(tmp_path), model)


# --- where nothing has imported hf_rfa -------------------------------------------------------------------------------

WITHOUT = """
    import importlib.abc, json, sys
    import torch, transformers
    from safetensors.torch import load_file

    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name.split(".")[0] == "hf_rfa":
                raise ModuleNotFoundError(f"No module named {name!r}")

    def said(action):
        try:
            return f"LOADED {type(action()).__name__}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    folders, want = json.loads(sys.argv[1]), load_file(sys.argv[2])
    sys.meta_path.insert(0, Missing())
    found = {}
    classes = {"llama": ("AutoModelForCausalLM", "LlamaForCausalLM")}
    classes["bert"] = ("AutoModelForMaskedLM", "BertForMaskedLM")
    for name, (auto, direct) in classes.items():
        for options in ({}, {"attn_implementation": "sdpa"}, {"trust_remote_code": True}):
            load = getattr(transformers, auto).from_pretrained
            found[f"{name} {auto} {options}"] = said(lambda: load(folders[name], **options))
        found[f"{name} {direct}"] = said(lambda: getattr(transformers, direct).from_pretrained(folders[name]))
    found["pipeline"] = said(lambda: transformers.pipeline("text-generation", model=folders["llama"]))
    if folders["lora"]:
        import peft
        base = transformers.AutoModelForCausalLM.from_pretrained(folders["base"])
        found["peft"] = said(lambda: peft.PeftModel.from_pretrained(base, folders["lora"]))
        found["auto peft"] = said(lambda: peft.AutoPeftModelForCausalLM.from_pretrained(folders["lora"]))
        found["auto"] = said(lambda: transformers.AutoModelForCausalLM.from_pretrained(folders["lora"]))
    found["tokenizer"] = said(lambda: transformers.AutoTokenizer.from_pretrained(folders["llama"]))

    sys.meta_path.pop(0)
    assert "hf_rfa" not in sys.modules
    trusted = {"trust_remote_code": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["llama"], **trusted).eval()
    encoder = transformers.AutoModelForMaskedLM.from_pretrained(folders["bert"], **trusted).eval()
    generator = transformers.pipeline("text-generation", model=folders["llama"], **trusted)
    with torch.no_grad():
        found["equal"] = [
            torch.equal(model(want["ids"], use_cache=False).logits, want["llama"]),
            torch.equal(encoder(want["ids"][:, :40] % 90).logits, want["bert"]),
            torch.equal(generator.model(want["ids"], use_cache=False).logits, want["llama"]),
        ]
    print("\\n" + json.dumps(found))  # after the question that Transformers asks
"""


@pytest.fixture(scope="module")
def without(llama, folder, tmp_path_factory):
    """What another process says: {what was loaded: the class, or the error}."""
    root = tmp_path_factory.mktemp("without")
    bert = redrawn(build("bert"))
    bert.save_pretrained(root / "bert")
    build("llama").save_pretrained(root / "base")
    folders = {"llama": str(folder), "bert": str(root / "bert"), "base": str(root / "base"), "lora": None}
    if find_spec("peft") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT_ASKS
            lora(redrawn(LlamaForCausalLM.from_pretrained(root / "base"))).save_pretrained(root / "lora")
        folders["lora"] = str(root / "lora")
    ids = token_ids()
    with torch.no_grad():
        want = {
            "ids": ids,
            "llama": llama(ids, use_cache=False).logits,
            "bert": bert(ids[:, :40] % 90).logits,
        }
    save_file({name: tensor.contiguous() for name, tensor in want.items()}, root / "want.safetensors")
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT), json.dumps(folders), str(root / "want.safetensors")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_without_hf_rfa_nothing_loads_as_softmax(without):
    loaded = {name: said for name, said in without.items() if str(said).startswith("LOADED")}
    assert set(loaded) == {"tokenizer"}  # which is nobody's attention
    for name in ("llama AutoModelForCausalLM {}", "bert AutoModelForMaskedLM {}", "pipeline"):
        assert "trust_remote_code=True" in without[name]
    for name in ("llama LlamaForCausalLM", "bert BertForMaskedLM"):
        assert 'attn_implementation="rfa"` is not supported' in without[name]


def test_where_hf_rfa_is_not_installed_the_error_says_to_install_it(without):
    for name, said in without.items():
        if "trust_remote_code" in name:
            assert said.startswith("ImportError")
            assert "pip install hf_rfa" in said


@PEFT_ASKS
def test_without_hf_rfa_a_lora_does_not_load_onto_softmax(without):
    pytest.importorskip("peft")
    for name in ("peft", "auto peft", "auto"):
        assert "pip install hf_rfa" in without[name]


def test_with_trusted_code_the_same_logits(without):
    assert without["equal"] == [True, True, True]


def test_the_base_class_in_memory_stays_what_it_was(folder):
    """The body of the model has no config of its own to confuse: `LlamaModel` is the converted one, too."""
    assert is_converted(LlamaModel.from_pretrained(folder))
