"""What may be given as batches: `convert(calibrate=)`, `calibrate` and `distill` take and refuse the same."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conversions import converted
from datasets import Dataset, DatasetDict
from families import SHORT, build, inputs_for, token_ids
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

import hf_rfa
from hf_rfa import ConfigError
from hf_rfa.calibration.batches import batches_of, call_arguments

ROWS = token_ids(2, 90)
PADDED = {
    "input_ids": torch.cat([torch.full((2, 7), 2), ROWS], dim=1).tolist(),
    "attention_mask": torch.cat([torch.zeros(2, 7), torch.ones(2, 90)], dim=1).long().tolist(),
    "text": ["one", "two"],
}
#: Each is the two rows of ROWS.
ONE_BATCH = {
    "tensor": ROWS, "int32": ROWS.int(), "uint8": ROWS.to(torch.uint8), "array": ROWS.numpy(), "list of one": [ROWS],
    "int16 array": ROWS.numpy().astype(np.int16), "array in a list": [ROWS.numpy()],
    "loader": DataLoader(ROWS, batch_size=2),
}  # fmt: skip
SINGLE_ROWS = {
    "lists of ids": ROWS.tolist(), "tuples": tuple(tuple(row) for row in ROWS.tolist()), "1-D tensors": list(ROWS),
    "1-D arrays": list(ROWS.numpy()), "numbers of NumPy": [list(row) for row in ROWS.numpy()],
    "dataset": Dataset.from_dict({"input_ids": ROWS.tolist()}),
    "dataset of tensors": Dataset.from_dict({"input_ids": ROWS.tolist()}).with_format("torch"),
    "streamed dataset": Dataset.from_dict({"input_ids": ROWS.tolist()}).to_iterable_dataset(),
    "padded dataset": Dataset.from_dict(PADDED), "batches of one": list(ROWS.split(1)),
}  # fmt: skip
ARGUMENTS = {
    "tensors": {"input_ids": ROWS}, "lists": {"input_ids": ROWS.tolist()}, "arrays": {"input_ids": ROWS.numpy()},
    "tokenizer's": BatchEncoding({"input_ids": ROWS.tolist(), "attention_mask": np.ones((2, 90), dtype=np.int64)}),
    "with plain values": {"input_ids": ROWS, "use_cache": True, "labels": None},
}  # fmt: skip


def given(batches):
    """A generator, too, is read once."""
    return (batch for batch in batches)


@pytest.mark.parametrize("batches", ONE_BATCH.values(), ids=ONE_BATCH)
def test_one_batch(batches):
    (batch,) = batches_of(batches, build("llama"), name="batches")
    assert torch.equal(batch, ROWS)
    assert batch.dtype == torch.int64


@pytest.mark.parametrize("batches", SINGLE_ROWS.values(), ids=SINGLE_ROWS)
def test_single_rows(batches):
    one, two = batches_of(batches, build("llama"), name="batches")
    assert torch.equal(torch.cat([one, two]), ROWS)


def test_rows_of_unlike_lengths():
    batches = list(batches_of([[1, 2, 3], torch.tensor([4, 5])], build("llama"), name="batches"))
    assert [batch.tolist() for batch in batches] == [[[1, 2, 3]], [[4, 5]]]
    (batch,) = batches_of({"input_ids": [1, 2, 3]}, build("llama"), name="batches")  # tokenizer("a text")
    assert batch.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("batch", ARGUMENTS.values(), ids=ARGUMENTS)
def test_the_models_arguments(batch):
    model = build("llama")
    for batches in (batch, [batch], given([batch])):
        (read,) = batches_of(batches, model, name="batches")
        assert torch.equal(read["input_ids"], ROWS)
        assert set(read) == set(batch)
        arguments = call_arguments(model, read)
        assert arguments["use_cache"] is read.get("use_cache", False)
        model(**arguments)


@pytest.mark.parametrize("batches", [*ONE_BATCH.values(), *SINGLE_ROWS.values()], ids=[*ONE_BATCH, *SINGLE_ROWS])
def test_all_of_them_calibrate_alike(batches):
    want = hf_rfa.calibration_report(converted("llama", calibrate=ROWS))
    model = converted("llama", calibrate=batches)
    assert hf_rfa.calibration_report(model).tokens == want.tokens == 180
    for got, head in zip(hf_rfa.calibration_report(model).heads, want.heads, strict=True):
        assert (got.layer, got.key_head, got.feature_map, got.alpha, got.gamma) == (
            head.layer, head.key_head, head.feature_map, head.alpha, head.gamma
        )  # fmt: skip
        assert got.cost == pytest.approx(head.cost, rel=1e-4, abs=1e-9)


def test_distill_takes_rows_too():
    model = converted()
    assert hf_rfa.distill(model, SINGLE_ROWS["dataset"], hf_rfa.DistillConfig(steps=2, progress=False)).steps == 2
    assert hf_rfa.distill(model, iter([ROWS.numpy()]), hf_rfa.DistillConfig(steps=1, progress=False)).steps == 1


TEXTS = r"Got a text: 'some.*pass `\[tokenizer\(text\)"
WRONG = {
    "a text": ("some text", TEXTS),
    "bytes": (b"some text", "Got a text"),
    "texts": (["some text", "another"], TEXTS),
    "texts as an array": (np.array(["a", "b"]), "must hold integers. Got <U1"),
    "a row": (ROWS[0], r"shape \(batch, seq\). Got shape \(90,\). A single row of ids is `ids\[None\]`"),
    "a row as an array": (ROWS[0].numpy(), r"Got shape \(90,\)"),
    "a row as a list": ([1, 2, 3], r"\[0\]` must be token ids. Got int: 1. A single row of ids is `\[ids\]`"),
    "three dimensions": (ROWS[None], r"Got shape \(1, 2, 90\)"),
    "floats": (ROWS.float(), "must hold integers. Got torch.float32"),
    "float array": (ROWS.numpy() / 2, "must hold integers. Got float64"),
    "float list": ([[1.5, 2.0]], "Got list"),
    "bools": (ROWS > 3, "must hold integers. Got torch.bool"),
    "nothing": ([], r"at least one batch. Got none \(list\)"),
    "an empty generator": (iter(()), "at least one batch. Got none"),
    "an empty dataset": (Dataset.from_dict({"input_ids": []}), "at least one batch. Got none"),
    "an empty row": ([[]], r"must hold tokens. Got shape \(1, 0\)"),
    "an empty batch": (ROWS[:0], r"must hold tokens. Got shape \(0, 90\)"),
    "None": (None, "Got NoneType"),
    "a number": (1, "Got int: 1"),
    "a path": (Path("texts.txt"), "Got PosixPath: texts.txt"),
    "a module": (torch.nn.ModuleList(), "Got ModuleList"),
    "beyond the vocabulary": (torch.full((1, 90), 99), "ids of this model's tokens, 0 to 98. Got 99"),
    "negative": (torch.full((1, 90), -100), "Got -100"),
    "beyond it in arguments": ({"input_ids": torch.full((1, 90), 99)}, r"\['input_ids'\]` must hold ids .* Got 99"),
    "beyond it in a list": ([ROWS, torch.full((1, 90), 99)], r"\[1\]` must hold ids of this model's tokens"),
    "on the meta device": (ROWS.to("meta"), "no values"),
    "an empty dictionary": ({}, "Got an empty dictionary"),
    "a dictionary of texts": ({"text": ["a", "b"]}, "holds 'text', which is no tensor and cannot be made one"),
    "ragged arguments": ({"input_ids": [[1, 2], [3]]}, "cannot be made one.*Pad the rows"),
    "no tensor": ({"use_cache": False}, r"must hold a tensor. Got \['use_cache'\]"),
    "a dataset of texts": (Dataset.from_dict({"text": ["a", "b"]}), "must hold tensors.* Got 'text' of type str"),
    "splits": (DatasetDict({"train": Dataset.from_dict({"input_ids": [[1]]})}), "Got 'train' of type Dataset"),
    "pairs": (DataLoader(TensorDataset(ROWS)), "Got list"),
    "a mask of another length": ([{"input_ids": [1, 2], "attention_mask": [1]}], r"shape of its input_ids, \(2,\)"),
}


@pytest.mark.parametrize(("batches", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_batch_is_refused_before_anything_is_changed(batches, message):
    model = build("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    implementation = model.config._attn_implementation
    with pytest.raises(ConfigError, match=rf"`calibrate.*{message}"):
        hf_rfa.convert(model, SHORT, calibrate=batches)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["texts", "a row", "floats", "beyond the vocabulary", "None", "nothing"])
def test_by_calibrate_and_distill_too(name):
    model = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches, message = WRONG[name]
    with pytest.raises(ConfigError, match=f"`batches.*{message}"):
        hf_rfa.calibrate(model, batches)
    with pytest.raises(ConfigError, match=f"`batches.*{message}"):
        hf_rfa.distill(model, batches, hf_rfa.DistillConfig(steps=1, progress=False))
    assert_close(model.state_dict(), before, atol=0, rtol=0)


def test_a_model_of_images_says_what_it_takes():
    with pytest.raises(ConfigError, match=r"takes no token ids.*'pixel_values'"):
        converted("vit", calibrate=ROWS)
    pixels = inputs_for(build("vit"))["pixel_values"]
    with pytest.raises(ConfigError, match=r"Pass it as an argument of the model: \{'pixel_values': tensor\}"):
        converted("vit", calibrate=pixels)
    model = hf_rfa.convert(build("vit"), dataclasses.replace(SHORT, window=4), calibrate={"pixel_values": pixels})
    assert hf_rfa.calibration_report(model).heads


def test_arguments_that_the_model_does_not_have_are_named():
    model = build("vit")
    with pytest.raises(ConfigError, match=r"arguments of ViT.*Got \[1\]"):
        list(batches_of({1: ROWS}, model, name="batches"))


@pytest.mark.parametrize("example_inputs", ["text", ROWS, [1]])
def test_example_inputs_are_a_dictionary(example_inputs):
    with pytest.raises(ConfigError, match=r"`example_inputs` must be a dictionary of the model's arguments. Got"):
        hf_rfa.convert(build("llama"), SHORT, calibrate=False, example_inputs=example_inputs)
