"""The command line, from a folder with a model and a folder with texts to the written report; no network."""

import json
import math
import sys

import pytest
import torch
from families import llama
from PIL import Image
from tokenizers_of_tests import byte_tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

import hf_rfa
from hf_rfa import cli
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation import compare, perplexity
from hf_rfa.evaluation.results import EXACT, LINEAR, ORIGINAL, VARIANTS, WINDOW_ONLY, CompareSettings
from hf_rfa.options import options_of
from hf_rfa.runtime.arguments import cache_of
from hf_rfa.runtime.record import conversion_config


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A Llama of 2 layers with random weights and a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer(bos_token="<s>").save_pretrained(folder)
    llama(gain=1, vocab_size=258, hidden_size=64, intermediate_size=64, eos_token_id=None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, first in (("train", 0), ("validation", 500)):
        (folder / f"{name}.txt").write_text(" ".join(str(n) for n in range(first, first + 400)))
    return folder


@pytest.fixture(scope="module")
def run(model_folder, data_folder, tmp_path_factory):
    """The main job, once for the tests below: (result of the command, output folder)."""
    output = tmp_path_factory.mktemp("output")
    arguments = f"""compare --model {model_folder} --data {data_folder} --output {output} --num-features 8 --window 16
        --sink-tokens 2 --kept-keys 4 --softmax-heads 0.25 --contexts 128,256 --eval-windows 2 --copy-gaps 100
        --speed-contexts 64,300 --speed-repeats 1 --new-tokens 2 --calibration-batches 1 --steps 2 --batch-size 1
        --mixed-precision no --device cpu --threads 1"""
    return CliRunner().invoke(cli.app, arguments.split(), catch_exceptions=False, env={"COLUMNS": "160"}), output


@pytest.fixture(scope="module")
def figures(run):
    return json.loads((run[1] / "report.json").read_text())


def test_the_command_prints_the_tables_and_names_the_files(run):
    result, output = run
    assert result.exit_code == 0
    for text in (*VARIANTS, "perplexity @ 256", "KL to original", "cache @ 300 (MiB)", "After 2 steps of fine-tuning"):
        assert text in result.stdout
    assert {path.name for path in output.iterdir()} == {
        "report.md",
        "report.json",
        "perplexity.png",
        "cost.png",
        "kept_tokens.png",
        "model",
    }


def test_all_four_are_measured_before_and_after_the_same_fine_tuning(figures):
    for stage in ("calibrated", "finetuned"):
        assert list(figures[stage]) == list(VARIANTS)
    assert figures["training"][ORIGINAL]["steps"] == 2
    assert len({run["losses"][0] for run in figures["training"].values()}) > 1
    before, after = figures["calibrated"], figures["finetuned"]
    assert before[ORIGINAL]["kl_to_original"] == 0.0
    assert before[ORIGINAL]["greedy_agreement"] == 1.0
    assert after[ORIGINAL]["kl_to_original"] > 0  # from the untouched one
    assert before[WINDOW_ONLY]["kl_to_original"] > 0
    for name in VARIANTS:
        assert after[name]["perplexity"]["256"] < before[name]["perplexity"]["256"]


def test_bits_per_byte_follow_from_perplexity_and_bytes(figures):
    quality = figures["calibrated"][LINEAR]
    bits = math.log2(quality["perplexity"]["256"]) / figures["bytes_per_token"]
    assert quality["bits_per_byte"]["256"] == pytest.approx(bits)
    assert figures["bytes_per_token"] == pytest.approx(1.0, rel=1e-2)  # a token is a byte, but for <s>


def test_a_linear_cache_does_not_grow_and_exact_heads_are_counted(figures):
    sizes = {name: [speed["cache_bytes"] for speed in speeds] for name, speeds in figures["speed"].items()}
    assert sizes[ORIGINAL] == [2 * 2 * 2 * 16 * 4 * n for n in (64, 300)]
    assert sizes[LINEAR][0] == sizes[LINEAR][1]
    assert sizes[EXACT][0] < sizes[EXACT][1]
    assert figures["key_heads"] == 4
    assert len(figures["softmax_heads"]) == 1


def test_the_converted_model_is_written_as_it_was_measured(run, figures, data_folder):
    folder = run[1] / "model"
    model = hf_rfa.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)((data_folder / "validation.txt").read_text()).input_ids
    measured = perplexity(model, torch.tensor([0, *ids]), 256, max_windows=None)
    windows = figures["eval_tokens"] // 256
    assert windows == 2
    # The evaluated windows are spread over the text, here of a handful of windows: near, not equal.
    assert measured == pytest.approx(figures["finetuned"][EXACT]["perplexity"]["256"], rel=2e-2)


def test_what_a_budget_bought_is_shown(model_folder, data_folder, tmp_path):
    arguments = f"""compare --model {model_folder} --data {data_folder} --output {tmp_path} --num-features 2
        --window 16 --sink-tokens 2 --budget 0.9 --budget-context 600 --contexts 256 --eval-windows 2 --copy-gaps 100
        --columns linear,exact --speed-contexts 64 --speed-repeats 1 --new-tokens 2 --calibration-batches 1 --steps 0
        --batch-size 1 --device cpu --threads 1"""
    result = CliRunner().invoke(cli.app, arguments.split(), catch_exceptions=False, env={"COLUMNS": "160"})
    figures, text = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.md").read_text()
    curve = figures["calibration"]["curve"]
    assert len(curve) > 1
    assert "bought since the row above" in result.stdout
    assert f"{curve[-1]['nats']:.5f}" in result.stdout
    assert "until a budget of 0.9 at 600 tokens was spent" in text
    assert f"| {curve[-1]['bytes'] / 2**20:.3f} | {curve[-1]['nats']:.5f} |" in text
    assert f"keeps up to {figures['calibration']['kept_keys']} far keys" in text
    with Image.open(tmp_path / "curve.png") as image:
        assert len(image.convert("RGB").getcolors(2**24)) > 10
    # The linear column keeps the keys that the budget gave each head.
    model = hf_rfa.from_pretrained(tmp_path / "model")
    kept = dict(conversion_config(model).head_kept_keys)
    assert len(kept) + len(figures["softmax_heads"]) == 4
    hf_rfa.set_softmax_heads(model, [])
    ids = torch.zeros(1, 256, dtype=torch.long)
    with torch.no_grad():
        cache = cache_of(model(input_ids=ids, use_cache=True))
    assert hf_rfa.cache_bytes(cache) == figures["calibrated"][LINEAR]["cache_bytes"]


def test_help_names_every_option():
    text = CliRunner().invoke(cli.app, ["compare", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    found = options_of(CompareSettings)
    assert len(found) == 33
    for name, each in found.items():
        assert f"--{name.replace('_', '-')} " in text
        assert each.help.split()[0] in text
    assert "(default: 512,1024,2048)" in text
    assert "compare" in CliRunner().invoke(cli.app, ["--help"]).stdout


@pytest.mark.parametrize(
    ("text", "heads"),
    [("auto", "auto"), ("0.25", 0.25), ("3:1", ((3, 1),)), ("3:1,0:0", ((0, 0), (3, 1))), ("none", None)],
)
def test_softmax_heads_on_the_command_line(text, heads):
    assert CompareSettings.from_dict({"model": "m", "softmax_heads": text}).conversion.softmax_heads == heads


@pytest.mark.parametrize("text", ["some", "3:1:2", "3:x", ""])
def test_softmax_heads_that_are_none(text):
    with pytest.raises(ConfigError, match="`softmax_heads` must be 'auto' or a number or int:int with commas"):
        CompareSettings.from_dict({"model": "m", "softmax_heads": text})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "long"], "`--contexts` must be whole numbers"),
        (["--contexts", "100,256"], "must divide the longest"),
        (["--contexts", "512"], "The model's positions end at 256"),
        (["--softmax-heads", "many"], "`--softmax-heads` must be 'auto' or a number or int:int with commas between"),
        (["--steps", "-1"], "`--steps` must be a whole number >= 0. Got '-1'"),
        (["--repeat-probability", "1.5"], "`--repeat-probability` must be a number >= 0 and <= 1"),
        (["--feature-map", "cubic"], "`feature_map` must be one of"),
        (["--data", "./nowhere"], "No file or folder"),
    ],
)
def test_mistakes_end_in_one_sentence(model_folder, data_folder, tmp_path, monkeypatch, capsys, arguments, message):
    usual = ["--model", str(model_folder), "--data", str(data_folder), "--contexts", "256", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["hf-rfa", "compare", *usual, *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_package_says_what_to_install(model_folder, monkeypatch, capsys):
    def fails(settings):
        raise ModuleNotFoundError("No module named 'datasets'")

    monkeypatch.setattr(cli, "compare", fails)
    monkeypatch.setattr("sys.argv", ["hf-rfa", "compare", "--model", str(model_folder)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "pip install 'hf_rfa[train]'" in capsys.readouterr().err


def test_serving_without_its_packages_says_what_to_install(model_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hf_rfa.serving.server", None)  # importing it fails
    monkeypatch.setattr("sys.argv", ["hf-rfa", "serve", str(model_folder)])
    with pytest.raises(SystemExit):
        cli.main()
    error = capsys.readouterr().err
    assert "pip install 'hf_rfa[serve]'" in error
    assert "hf_rfa[train]" not in error


def test_the_default_model_is_found_in_a_clone_and_in_an_installed_package(tmp_path, monkeypatch):
    package = tmp_path / "hf_rfa"
    package.mkdir()
    monkeypatch.setattr(hf_rfa, "__file__", str(package / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="embedded model is missing"):
        compare.default_model()
    for folder in (package / "_embedded" / "stdlib-llama", tmp_path / "examples" / "stdlib-llama"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        assert compare.default_model() == str(folder)


@pytest.mark.parametrize(("load", "threads"), [(0.1, 4), (1.4, 3), (9.0, 1)])
def test_busy_cores_get_no_thread(monkeypatch, load, threads):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert compare._idle_cores() == threads
