"""`hf-rfa convert`: a folder with a model becomes a folder with its conversion."""

import dataclasses
import re

import pytest
from conversions import same_outputs
from families import llama
from tokenizers_of_tests import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from typer.testing import CliRunner

import hf_rfa
from hf_rfa import RFAConfig, cli
from hf_rfa.commands.settings import ConvertSettings
from hf_rfa.options import options_of
from hf_rfa.runtime.record import conversion_config

SMALL = "--window 16 --num-features 8 --sink-tokens 2 --softmax-heads 0:1 --head-kept-keys 1:0:3 --layer-features 1:12"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    model = llama(vocab_size=258, max_position_embeddings=96, tie_word_embeddings=False)
    model.save_pretrained(folder)
    byte_tokenizer(bos_token="<s>").save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})


def test_a_folder_is_converted(original, tmp_path):
    before = {path.name: path.read_bytes() for path in original.iterdir()}
    output = tmp_path / "new" / "converted"
    result = run(original, output, *SMALL.split())
    assert result.exit_code == 0, result.output
    for said in ("Loading", "a text that it writes itself", "Saving", "Done", "calibrated on", str(output)):
        assert said in result.output
    model = hf_rfa.from_pretrained(output)
    config = conversion_config(model)
    assert (config.window, config.num_features, config.softmax_heads) == (16, 8, ((0, 1),))
    assert (config.head_kept_keys, config.layer_features) == ((((1, 0), 3),), ((1, 12),))
    assert hf_rfa.calibration_report(model).tokens == 4 * 96
    assert same_outputs(AutoModelForCausalLM.from_pretrained(output), model)
    assert AutoTokenizer.from_pretrained(output)("abc").input_ids == byte_tokenizer()("abc").input_ids
    assert "hf_rfa.from_pretrained" in (output / "README.md").read_text()
    assert same_outputs(hf_rfa.revert(model), LlamaForCausalLM.from_pretrained(original))
    assert {path.name: path.read_bytes() for path in original.iterdir()} == before


def test_texts_of_ones_own_calibrate(original, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(map(str, range(400))))
    data = f"--data {tmp_path / 'text.txt'} --context 80 --calibration-batches 3 --batch-size 1 --dtype float32"
    result = run(original, tmp_path / "converted", *SMALL.split(), *data.split())
    assert result.exit_code == 0, result.output
    assert "text.txt" in result.output
    assert hf_rfa.calibration_report(hf_rfa.from_pretrained(tmp_path / "converted")).tokens == 3 * 80


def test_a_pattern_is_written_and_applied(original, tmp_path):
    pattern = tmp_path / "pattern.json"
    assert run(original, tmp_path / "first", *SMALL.split(), "--save-pattern", pattern).exit_code == 0
    other = "--window 16 --num-features 8 --sink-tokens 2 --softmax-heads auto"
    result = run(original, tmp_path / "second", *other.split(), "--pattern", pattern)
    assert result.exit_code == 0, result.output
    config = conversion_config(hf_rfa.from_pretrained(tmp_path / "second"))
    assert (config.softmax_heads, config.head_kept_keys) == (((0, 1),), (((1, 0), 3),))
    assert config.layer_features is None  # a pattern says nothing of features


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "none.json"], "Cannot read the pattern 'none.json'"),
        (["--context", "200", "--data", "stdlib"], "positions end at 96.*--context 96"),
        (["--feature-map", "cubic"], "`feature_map` must be one of"),
        (["--head-kept-keys", "1:3"], "`--head-kept-keys` must be"),
        (["--window", "60"], "nothing lies beyond two windows"),
        (["--device", "nowhere"], "`--device` must be.*Got 'nowhere'"),
        (["--device", "cuda:99"], "CUDA devices here. Got `--device cuda:99`"),
    ],
)
def test_mistakes_leave_nothing(arguments, message, original, tmp_path):
    result = run(original, tmp_path / "converted", *arguments)
    assert result.exit_code != 0
    assert re.search(message, str(result.exception), re.DOTALL)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("kind", ["file in it", "file"])
def test_an_output_that_is_used_is_refused_before_any_work(kind, tmp_path):
    output = tmp_path / "output"
    if kind == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / "mine").write_text("mine")
    result = run(tmp_path / "no model at all", output)
    assert "OUTPUT must be" in str(result.exception)


def test_an_output_that_cannot_be_written_is_refused_before_any_work(original, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = run(original, tmp_path / "file" / "new" / "output")
    assert "Saving" not in result.output
    assert "Converting" not in result.output
    assert re.search("nothing can be written to '.*file'", str(result.exception))


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_a_model_that_is_no_folder_is_named(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = run(tmp_path / name, tmp_path / "output")
    assert re.search(f"MODEL must be a folder.*Got '.*{name}'", str(result.exception))


def test_a_converted_model_is_not_converted_again(original, tmp_path):
    assert run(original, tmp_path / "one", *SMALL.split()).exit_code == 0
    assert "converted already" in str(run(tmp_path / "one", tmp_path / "two", *SMALL.split()).exception)


def test_a_model_without_a_tokenizer_says_so(tmp_path):
    llama(max_position_embeddings=96).save_pretrained(tmp_path / "original")
    result = run(tmp_path / "original", tmp_path / "converted", *SMALL.split())
    assert result.exit_code == 0, result.output
    assert "no tokenizer" in result.output


def test_every_field_of_the_config_is_an_option():
    known = options_of(ConvertSettings)
    assert {field.name for field in dataclasses.fields(RFAConfig)} <= set(known)
    text = CliRunner().invoke(cli.app, ["convert", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    for name in known:
        assert (name.upper() if name in ("model", "output") else f"--{name.replace('_', '-')} ") in text
