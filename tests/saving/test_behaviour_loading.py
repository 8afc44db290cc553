"""Loading by every way that Transformers and Accelerate know: meta tensors, device maps, offload to CPU and disk."""

import copy

import accelerate
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from conversions import converted
from families import SHORT, build, inputs_for, outputs_of, token_ids
from packaging.version import Version

import hf_rfa
from hf_rfa import RFAConfig, UnsupportedModelError
from hf_rfa.runtime.adapters import require_adapters

SIX = pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss", "jamba", "bert"])
CPU = torch.device("cpu")
EVERYTHING_TO_DISK = pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.15"), reason="Accelerate refuses a device map that leaves nothing"
)


def to_disk(model):
    """A device map that leaves no weight in memory."""
    return {name: "disk" for name, child in model.named_children() if any(True for _ in child.parameters())}


def is_offloaded(model):
    return all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("how", [{"low_cpu_mem_usage": True}, {"device_map": "cpu"}, {"device_map": "auto"}], ids=str)
@SIX
def test_a_saved_model_loads_through_the_meta_device(family, how, tmp_path):
    model = converted(family)
    hf_rfa.resample(model, 3)  # a fresh conversion would not give these numbers
    hf_rfa.save_pretrained(model, tmp_path)
    loaded = hf_rfa.from_pretrained(tmp_path, **how)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(outputs_of(loaded, inputs_for(model)), outputs_of(model, inputs_for(model)))


@EVERYTHING_TO_DISK
@SIX
def test_a_saved_model_loads_onto_the_disk(family, tmp_path):
    model = converted(family)
    hf_rfa.resample(model, 3)
    hf_rfa.save_pretrained(model, tmp_path / "saved")
    loaded = hf_rfa.from_pretrained(tmp_path / "saved", device_map=to_disk(model), offload_folder=tmp_path / "offload")
    assert is_offloaded(loaded)
    assert all(not adapter.omega.is_meta for adapter in require_adapters(loaded))
    assert torch.equal(outputs_of(loaded, inputs_for(model)), outputs_of(model, inputs_for(model)))


@EVERYTHING_TO_DISK
@SIX
def test_a_model_that_lies_on_the_disk_is_converted_there(family, tmp_path):
    want = converted(family)
    build(family).save_pretrained(tmp_path / "saved")
    model = (
        type(want)
        .from_pretrained(tmp_path / "saved", device_map=to_disk(want), offload_folder=tmp_path / "offload")
        .eval()
    )
    softmax = outputs_of(model, inputs_for(want))
    hf_rfa.convert(model, SHORT, calibrate=False)
    assert is_offloaded(model)
    assert torch.equal(outputs_of(model, inputs_for(want)), outputs_of(want, inputs_for(want)))
    with pytest.warns(UserWarning, match="offloaded"):  # Transformers says that it needs the memory
        hf_rfa.save_pretrained(model, tmp_path / "again")
    again = hf_rfa.from_pretrained(tmp_path / "again")
    assert torch.equal(outputs_of(again, inputs_for(want)), outputs_of(want, inputs_for(want)))
    assert torch.equal(outputs_of(hf_rfa.revert(model), inputs_for(want)), softmax)


OFFLOADS = {
    "cpu_offload": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk_offload": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "dispatch_model": lambda model, folder: dispatch_model(
        model,
        {name: "cpu" if number % 2 else "disk" for number, name in enumerate(to_disk(model))},
        main_device="cpu",
        offload_dir=folder,
        force_hooks=True,
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("converted_first", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bert"])
def test_an_offloaded_model_gives_the_same_logits(family, converted_first, offload, tmp_path):
    model = converted(family)
    want = outputs_of(model, inputs_for(model))
    twin = copy.deepcopy(model) if converted_first else build(family)
    offload(twin, tmp_path)
    if not converted_first:
        hf_rfa.convert(twin, SHORT, calibrate=False)
    assert any(parameter.is_meta for parameter in twin.parameters())
    assert torch.equal(outputs_of(twin, inputs_for(model)), want)


@pytest.mark.filterwarnings("ignore:You are calling .generate.*device type different:UserWarning")  # before 5.23
def test_an_offloaded_model_calibrates_itself_and_generates(tmp_path):
    config = RFAConfig(window=16, num_features=16, sink_tokens=2)
    model, ids = build("llama"), token_ids()
    model.config.max_position_embeddings = 96  # the length of what it writes
    twin = hf_rfa.convert(copy.deepcopy(model), config)
    disk_offload(model, tmp_path, execution_device=CPU)
    hf_rfa.convert(model, config)
    options = {"do_sample": False, "max_new_tokens": 12}
    assert torch.equal(model.generate(ids, **options), twin.generate(ids, **options))
    assert hf_rfa.calibration_report(model).heads == hf_rfa.calibration_report(twin).heads


def test_adapters_that_were_offloaded_themselves_are_refused():
    model = converted()
    cpu_offload(model, execution_device=CPU, offload_buffers=True)
    with pytest.raises(UnsupportedModelError, match="offload_buffers"):
        outputs_of(model, inputs_for(model))
