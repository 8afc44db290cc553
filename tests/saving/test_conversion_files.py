"""The conversion's two files: what they say, and adapters that are spread over processes."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from conversions import converted
from families import SHORT, build
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import LlamaForCausalLM

import hf_rfa
from hf_rfa import CheckpointError
from hf_rfa.config import FORMAT_VERSION


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_conversion_beside_weights_and_without(tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    model = hf_rfa.convert(LlamaForCausalLM.from_pretrained(tmp_path / "base"), SHORT, calibrate=False)
    model.save_pretrained(tmp_path / "whole")
    hf_rfa.save_pretrained(model, tmp_path / "alone", adapter_only=True)
    whole, alone = (json.loads((tmp_path / kind / "rfa_config.json").read_text()) for kind in ("whole", "alone"))
    assert whole["format_version"] == alone["format_version"] == FORMAT_VERSION
    assert (whole["architecture"], whole["module"]) == ("LlamaForCausalLM", LlamaForCausalLM.__module__)
    assert whole["base"] is None
    assert alone["base"]["name"] == str(tmp_path / "base")
    assert "rfa_config" not in alone["base"]["config"]
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["attn_implementation"] == "rfa"
    assert config["rfa_config"] == {**whole["rfa"], "pair": whole["digest"]}
    assert whole["digest"] == alone["digest"]


def test_nothing_of_a_save_stays_in_the_model(tmp_path):
    model = converted()
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    after = model.config.to_dict()
    changed = {key for key in after if before.get(key) != after[key]}
    assert changed == {"architectures", "dtype"}  # as Transformers does to every model that it saves


def test_saving_the_same_model_twice_gives_the_same_files(tmp_path):
    model = converted()
    for folder in ("one", "two"):
        model.save_pretrained(tmp_path / folder)
    names = sorted(os.listdir(tmp_path / "one"))
    assert names == sorted(os.listdir(tmp_path / "two"))
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_adapters_that_are_spread_come_from_the_gathered_tensors(one_process, tmp_path):
    """Under FSDP each process holds a part of a learned omega; the caller hands all of it over."""
    model = converted()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = model.model.layers[0].self_attn.rfa
    adapter.omega = distribute_tensor(adapter.omega, one_process)
    with pytest.raises(CheckpointError, match=r"omega is spread over the processes.*state_dict"):
        model.save_pretrained(tmp_path / "refused", state_dict={"lm_head.weight": whole["lm_head.weight"]})
    model.save_pretrained(tmp_path / "saved", state_dict=dict(whole))
    tensors = load_file(tmp_path / "saved" / "rfa_model.safetensors")
    name = "model.layers.0.self_attn.rfa.omega"
    assert torch.equal(tensors[name], whole[name])
