"""Classes of one's own: registered, remote code, or neither."""

import shutil
import sys
import textwrap

import pytest
import torch
from conversions import redrawn, same_outputs
from families import PEFT_ASKS, llama, lora, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_rfa
from hf_rfa import CheckpointError

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 99}
INPUTS = {"input_ids": token_ids(), "use_cache": False}


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnLlama(LlamaForCausalLM):
    """Answers otherwise than a Llama, so that loading it as one shows."""

    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits + 1
        return found


@pytest.fixture
def registered():
    AutoConfig.register("own_llama", OwnConfig)
    AutoModelForCausalLM.register(OwnConfig, OwnLlama)
    yield
    del CONFIG_MAPPING._extra_content["own_llama"]
    del AutoModelForCausalLM._model_mapping._extra_content[OwnConfig]


def own():
    torch.manual_seed(0)
    return OwnLlama(OwnConfig(**SIZE)).eval()


def assert_same(loaded, model):
    assert type(loaded) is type(model)
    assert same_outputs(loaded, model)


@pytest.mark.usefixtures("registered")
def test_a_registered_class_is_found(tmp_path):
    model = redrawn(own())
    hf_rfa.save_pretrained(model, tmp_path)
    assert_same(hf_rfa.from_pretrained(tmp_path), model)


@pytest.mark.usefixtures("registered")
@PEFT_ASKS
@pytest.mark.parametrize("adapter_only", [True, False])
def test_a_registered_class_without_its_weights_is_found(adapter_only, tmp_path):
    own().save_pretrained(tmp_path / "base")
    model = redrawn(OwnLlama.from_pretrained(tmp_path / "base").eval())
    model = model if adapter_only else lora(model)
    hf_rfa.save_pretrained(model, tmp_path / "saved", adapter_only=adapter_only)
    assert_same(hf_rfa.from_pretrained(tmp_path / "saved"), model)


def test_a_class_that_nobody_knows_is_asked_for(tmp_path):
    model = redrawn(own())
    hf_rfa.save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)test_model_class\.OwnLlama.*model_class=OwnLlama.*register"):
        hf_rfa.from_pretrained(tmp_path)
    assert_same(hf_rfa.from_pretrained(tmp_path, model_class=OwnLlama), model)


def test_a_class_with_the_name_of_one_of_transformers_is_not_taken_for_it(tmp_path):
    namesake = type("LlamaForCausalLM", (OwnLlama,), {"__module__": "mine"})
    model = redrawn(namesake(OwnConfig(**SIZE)).eval())
    hf_rfa.save_pretrained(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"mine\.LlamaForCausalLM"):
        hf_rfa.from_pretrained(tmp_path)
    assert_same(hf_rfa.from_pretrained(tmp_path, model_class=namesake), model)


def test_the_model_class_may_be_another_one_of_the_same_weights(tmp_path):
    model = redrawn(llama())
    hf_rfa.save_pretrained(model, tmp_path)

    class Traced(LlamaForCausalLM):
        pass

    assert isinstance(hf_rfa.from_pretrained(tmp_path, model_class=Traced), Traced)


CODE = """
    from transformers import LlamaConfig, LlamaForCausalLM

    class RemoteConfig(LlamaConfig):
        model_type = "remote_llama"

    class RemoteLlama(LlamaForCausalLM):
        config_class = RemoteConfig

        def forward(self, *args, **kwargs):
            found = super().forward(*args, **kwargs)
            found.logits = found.logits + 1
            return found
"""


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A folder with its own code, as one would get it from the hub."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = tmp_path / "remote"
    torch.manual_seed(0)
    llama().save_pretrained(folder)
    (folder / "modeling_remote.py").write_text(textwrap.dedent(CODE))
    config = (folder / "config.json").read_text().replace('"llama"', '"remote_llama"').replace("LlamaFor", "RemoteFor")
    auto = '{"AutoConfig": "modeling_remote.RemoteConfig", "AutoModelForCausalLM": "modeling_remote.RemoteLlama"}'
    (folder / "config.json").write_text(config.replace("{", f'{{"auto_map": {auto},', 1))
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@PEFT_ASKS
@pytest.mark.parametrize("kind", ["whole", "alone", "lora"])
def test_remote_code_is_loaded_when_it_is_trusted(kind, remote, tmp_path):
    model = redrawn(AutoModelForCausalLM.from_pretrained(remote, trust_remote_code=True).eval())
    model = lora(model) if kind == "lora" else model
    folder = tmp_path / "saved"
    hf_rfa.save_pretrained(model, folder, adapter_only=kind == "alone")
    with pytest.raises(CheckpointError, match=r"(?s)modeling_remote\.RemoteLlama.*trust_remote_code=True"):
        hf_rfa.from_pretrained(folder)
    if kind == "whole":  # nothing is left of the folder that it came from
        shutil.rmtree(remote)
        assert same_outputs(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True), model)
    loaded = hf_rfa.from_pretrained(folder, trust_remote_code=True)
    assert same_outputs(loaded, model)
    base = loaded.get_base_model() if kind == "lora" else loaded
    assert type(base).__name__ == "RemoteLlama"
