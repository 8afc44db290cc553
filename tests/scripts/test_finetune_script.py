"""scripts/finetune.py: runs as written, resumes after a kill, and gives the same on two processes."""

import contextlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from families import PEFT_ASKS
from processes import ENVIRONMENT, ROOT, command, launch
from safetensors.torch import load_file
from tokenizers_of_tests import word_tokenizer, write_words
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.data import load_documents, tokenize_documents
from hf_rfa.data.document_batches import carried_batches, packed_batches
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.training import FinetuneConfig, finetune

SCRIPT = str(ROOT / "scripts" / "finetune.py")
WORKER = str(ROOT / "tests" / "worker_accelerate.py")
CONFIGS = ROOT / "scripts" / "accelerate"
FSDP, DEEPSPEED = [WORKER, str(CONFIGS / "fsdp2.yaml")], [WORKER, str(CONFIGS / "deepspeed_zero2.yaml")]


def in_this_process(arguments: list[str]) -> None:
    """The script without a process of its own, which takes seconds to start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        runpy.run_path(SCRIPT)["main"](arguments[1:])


@pytest.fixture
def run(tiny_llama, tmp_path):
    """Folders and a YAML file of a run that takes a second a step or less."""
    word_tokenizer().save_pretrained(tmp_path / "model")
    tiny_llama.save_pretrained(tmp_path / "model")
    write_words(tmp_path / "data.jsonl", (400, 900, 650, 700), torch.Generator().manual_seed(0))
    options = {
        "model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl"), "output": str(tmp_path / "run"),
        "context": 128, "window": 16, "sink_tokens": 2, "num_features": 8, "feature_map": "positive", "steps": 6,
        "kept_keys": 8,
        "batches_per_step": 2, "save_every": 2, "evaluate_every": 3, "evaluation_windows": 2, "progress": False,
        "softmax_heads": "0.25", "resample": "2", "learning_rate": 1e-2, "documents": "packed",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def arguments(folder: Path, output: str, **options) -> list[str]:
    given = [f"--{name}={value}" for name, value in options.items()]
    return [SCRIPT, str(folder / "run.yaml"), f"--output={folder / output}", *given]


def kill_when_saved(folder: Path, pattern: str, started: list[str], processes: int = 0) -> None:
    """Start it, and kill it without a word as soon as `folder` has what the pattern names."""
    doomed = subprocess.Popen(
        command(started, processes),
        env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not any(path.suffix != ".partial" for path in folder.glob(pattern)):
        assert time.monotonic() < deadline
        assert doomed.poll() is None
        time.sleep(0.01)
    # Not its process group: torch's launcher gives each rank a session of its own, and a rank that lives on writes.
    started_by_it = psutil.Process(doomed.pid).children(recursive=True)
    for process in (doomed, *started_by_it):
        with contextlib.suppress(psutil.NoSuchProcess):  # a rank that lost its peer ends by itself
            process.kill()
    for process in (doomed, *started_by_it):
        process.wait()


def progress(folder: Path, output: str) -> dict:
    return json.loads((folder / output / "progress.json").read_text())


def weights(folder: Path, output: str, stage: str = "final") -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in ("model.safetensors", "rfa_model.safetensors")
        for name, tensor in load_file(folder / output / stage / file).items()
    }


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, **tolerance, msg=lambda message, name=name: f"{name}: {message}"
        )


@pytest.mark.multi_process
def test_a_killed_run_goes_on_bit_for_bit_and_on_another_number_of_processes(run):
    in_this_process(arguments(run, "whole"))
    whole = progress(run, "whole")
    assert len(set(whole["losses"])) == 6
    assert [e["step"] for e in whole["evaluations"]] == [3, 6]
    card = (run / "whole" / "final" / "README.md").read_text()
    assert str(run) not in card
    assert "| | original | window only | every head linear | retrieval heads exact | fine-tuned |" in card
    assert "| perplexity, windows of 128 tokens |" in card
    assert hf_rfa.from_pretrained(run / "whole" / "final").config.vocab_size == 128
    columns = json.loads((run / "whole" / "columns.json").read_text())
    assert columns[4]["perplexity"]["128"] == pytest.approx(whole["evaluations"][-1]["perplexity"], rel=1e-6)
    expected = weights(run, "whole")
    omegas = [name for name in expected if name.endswith("omega")]
    assert omegas

    # The same number of processes: nothing differs, and what was calibrated is not calibrated again.
    kill_when_saved(run / "killed", "checkpoint-*", arguments(run, "killed", save_every=1))
    assert not (run / "killed" / "progress.json").exists()
    shutil.copytree(run / "killed", run / "killed-before")
    resumed = launch(arguments(run, "killed", resume=True))
    assert f"calibrate: taken from {run / 'killed' / 'calibrated'}" in resumed.stdout
    assert progress(run, "killed")["losses"] == whole["losses"]
    assert progress(run, "killed")["evaluations"] == whole["evaluations"]
    assert_same_weights(weights(run, "killed"), expected, rtol=0, atol=0)

    # One process, resumed on two with the same global batch: the same losses, the same draws, saved once.
    shutil.copytree(run / "killed-before", run / "more")
    launch(arguments(run, "more", resume=True), 2)
    assert progress(run, "more")["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert_same_weights(weights(run, "more"), expected, rtol=1e-3, atol=1e-4)
    assert sorted(path.name for path in (run / "more").glob("checkpoint-*")) == ["checkpoint-6"]
    assert not list((run / "more").rglob("*.partial"))

    # Two processes, resumed on one.
    kill_when_saved(run / "two", "checkpoint-*", arguments(run, "two", save_every=1), processes=2)
    in_this_process(arguments(run, "two", resume=True))
    assert progress(run, "two")["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert progress(run, "two")["tokens"] == whole["tokens"]
    found = weights(run, "two")
    assert_same_weights(found, expected, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(found[name], expected[name]) for name in omegas)  # drawn three times since the start


def test_attention_transfer_that_is_killed_resumes_and_fine_tuning_alone_starts_from_it(run):
    options = {"stages": "calibrate", "resample": "never", "distill_steps": 12, "save_every": 3}
    stages = ["--stages", "calibrate", "distill"]
    in_this_process([*arguments(run, "whole", **options), *stages])
    kill_when_saved(run / "killed", "distill.pt", [*arguments(run, "killed", **options), *stages])
    assert not (run / "killed" / "distilled").exists()
    in_this_process([*arguments(run, "killed", resume=True, **options), *stages])
    assert_same_weights(weights(run, "killed", "distilled"), weights(run, "whole", "distilled"), rtol=0, atol=0)

    alone = {"model": run / "whole" / "distilled", "stages": "finetune", "train": "adapter", "steps": 2}
    in_this_process(arguments(run, "alone", resample="never", learning_rate="1e-2", **alone))
    before, after = weights(run, "whole", "distilled"), weights(run, "alone")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".rfa." in name for name in changed)
    original = json.loads((run / "alone" / "columns.json").read_text())[0]
    assert original["name"] == "original"  # the folder that it started from, with softmax again
    assert original["kl_to_original"] == 0


@pytest.mark.multi_process
def test_fsdp2_gives_what_one_process_gives_and_resumes(run):
    options = {"steps": 4, "evaluate_every": 2}
    in_this_process(arguments(run, "one", **options))
    started = [*FSDP, *arguments(run, "sharded", save_every=1, **options)]
    kill_when_saved(run / "sharded", "checkpoint-*", started, processes=2)
    assert any((run / "sharded").glob("checkpoint-*/pytorch_model_fsdp_0"))  # sharded indeed
    launch([*FSDP, *arguments(run, "sharded", resume=True, **options)], 2)
    one, sharded = progress(run, "one"), progress(run, "sharded")
    assert sharded["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for found, expected in zip(sharded["evaluations"], one["evaluations"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert_same_weights(weights(run, "sharded"), weights(run, "one"), rtol=1e-3, atol=1e-4)
    assert "| fine-tuned |" in (run / "sharded" / "final" / "README.md").read_text()


@PEFT_ASKS
def test_lora_in_bfloat16_with_activation_checkpointing_and_wsd_is_merged(run):
    options = {"train": "lora", "lora_rank": 4, "mixed_precision": "bf16", "activation_checkpointing": True}
    in_this_process(arguments(run, "lora", steps=3, schedule="wsd", **options))
    before, after = weights(run, "lora", "calibrated"), weights(run, "lora")
    assert set(after) == set(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    projections = {name for name in after if "_proj" in name}
    assert projections <= changed <= projections | {name for name in after if ".rfa." in name}  # omega was redrawn
    assert len(set(progress(run, "lora")["losses"])) == 3


def test_the_original_after_the_same_tuning_is_one_more_column(run):
    options = {"steps": 2, "evaluate_every": 2, "resample": "never"}
    in_this_process(arguments(run, "both", baseline=True, **options))
    columns = {column["name"]: column for column in json.loads((run / "both" / "columns.json").read_text())}
    assert list(columns)[-2:] == ["fine-tuned", "original, same tuning"]
    assert columns["original, same tuning"]["kl_to_original"] > 0
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    batches = packed_batches(training_tokens(run), 128, 1, seed=0)
    expected = finetune(
        model, batches, FinetuneConfig(steps=2, learning_rate=1e-2, batches_per_step=2, progress=False)
    )
    assert progress(run, "both/baseline")["losses"] == pytest.approx(expected.losses, rel=1e-4)
    assert progress(run, "both")["losses"] != pytest.approx(expected.losses, rel=1e-6)
    tuned = AutoModelForCausalLM.from_pretrained(run / "both" / "baseline" / "final")
    torch.testing.assert_close(tuned.lm_head.weight, model.lm_head.weight, rtol=1e-3, atol=1e-4)


def test_a_stream_of_documents_is_trained_with_the_state_carried(run):
    options = {"streaming": True, "documents": "carried", "softmax_heads": "none", "resample": "never", "context": 64}
    more = {"distill_steps": 2, "steps": 3, "validation_documents": 1}
    stages = ["--stages", "calibrate", "distill", "finetune"]
    in_this_process([*arguments(run, "carried", **options, **more), *stages])
    model = hf_rfa.from_pretrained(run / "carried" / "distilled", dtype=torch.float32)
    # A stream keeps the documents' own order; so do the same ones in a generator.
    documents = (ids for _ in range(9) for ids in training_tokens(run))
    batches = carried_batches(documents, 64, 1, lanes=2)
    expected = finetune(
        model, batches, FinetuneConfig(steps=3, learning_rate=1e-2, batches_per_step=2, progress=False)
    )
    assert progress(run, "carried")["losses"] == pytest.approx(expected.losses, rel=1e-4)


def training_tokens(run: Path) -> list[torch.Tensor]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "model")
    return tokenize_documents(tokenizer, load_documents(run / "data.jsonl", "train"))[0]


def test_the_folder_is_uploaded_with_its_card(run, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    in_this_process(arguments(run, "pushed", steps=1, push_to_hub="owner/model"))
    assert calls[0] == ("create", "owner/model", True)
    assert calls[1][:2] == ("upload", "owner/model")
    pair = {"rfa_config.json", "rfa_model.safetensors"}
    assert calls[1][2] >= pair | {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.multi_process
def test_deepspeed_gives_what_one_process_gives_and_resumes(run):
    pytest.importorskip("deepspeed")
    options = {"steps": 4, "evaluate_every": 2, "batches_per_step": 4}
    in_this_process(arguments(run, "one", **options))
    started = [*DEEPSPEED, *arguments(run, "shared", save_every=1, **options)]
    kill_when_saved(run / "shared", "checkpoint-*", started, processes=2)
    launch([*DEEPSPEED, *arguments(run, "shared", resume=True, **options)], 2)
    one, shared = progress(run, "one"), progress(run, "shared")
    assert any((run / "shared").glob("checkpoint-*/**/*optim_states.pt"))  # DeepSpeed indeed
    assert shared["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for found, expected in zip(shared["evaluations"], one["evaluations"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    assert_same_weights(weights(run, "shared"), weights(run, "one"), rtol=1e-3, atol=1e-4)


@pytest.mark.multi_process
def test_one_document_on_two_processes_trains_like_on_one(run):
    options = {"documents": "random", "resample": "never", "batches_per_step": 1, "steps": 3, "evaluate_every": 3}
    options["kept_keys"] = 0
    in_this_process(arguments(run, "one", **options))
    launch(arguments(run, "two", sequence_parallel=2, **options), 2)
    assert progress(run, "two")["losses"] == pytest.approx(progress(run, "one")["losses"], rel=1e-5)


def test_random_documents_may_be_in_a_loop(run, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    script = runpy.run_path(SCRIPT)
    given = {"documents": "random", "context": 200, "batch_size": 4, "loop_probability": 1.0}
    options = script["Options"].from_dict({"model": "", "output": ""} | given)
    batch = next(script["make_batches"](options, [torch.arange(1000)]))
    assert batch.shape == (4, 200)
    assert all(len(row.unique()) <= 160 for row in batch)


@pytest.fixture
def main(monkeypatch):
    """`main` of the script in this process, with a calibration that must not be reached."""

    def reached(*args, **kwargs):
        raise AssertionError("work was done before the input was checked")

    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(hf_rfa, "convert", reached)
    script = runpy.run_path(SCRIPT)
    return lambda folder, output="bad", **options: script["main"](arguments(folder, output, **options)[1:])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"train": "everything"}, ConfigError, r"`train` must be one of .*Got 'everything'"),
        ({"stages": "sleep"}, ConfigError, r"`stages` must be some of .*Got 'sleep'"),
        ({"stages": "finetune"}, ConfigError, r"is not converted yet\. Got stages=\['finetune'\]"),
        ({"streaming": True, "documents": "random"}, ConfigError, "A stream has no random positions"),
        (
            {"documents": "packed", "loop_probability": 0.5},
            ConfigError,
            r"`loop_probability` changes the texts of documents=random only\. Got 0\.5 and documents=packed",
        ),
        ({"baseline": True, "documents": "carried"}, ConfigError, r"no state to carry .*Got documents=carried"),
        ({"baseline": True, "train": "adapter"}, ConfigError, r"no adapter\. Got train=adapter"),
        ({"baseline": True, "sequence_parallel": 2}, ConfigError, r"Got sequence_parallel=2"),
        ({"resample": "sometimes"}, ConfigError, r"`resample` must be one of .* or a whole number\. Got 'sometimes'"),
        ({"num_features": 0}, ConfigError, "`num_features` must be a positive integer"),
        ({"distill_steps": 0}, ConfigError, r"`distill_steps` must be a whole number >= 1\. Got '0'"),
        ({"sequence_parallel": 2}, ConfigError, r"Got sequence_parallel=2 and kept_keys=8\. Set kept_keys=0"),
        ({"kl_weight": 1, "sequence_parallel": 2}, ConfigError, "cannot run on a share of the tokens"),
        ({"step": 3}, ConfigError, r"unknown words: \['--step=3'\]\. 'step' may be meant as `steps`"),
        ({"context": 5000}, ConfigError, "No document reaches the context of 5000 tokens: the longest has 700"),
        ({"text_column": "body"}, ConfigError, r"no column 'body'\. Its columns are 'text'\. Set `text_column`"),
        ({"data": "missing.jsonl"}, FileNotFoundError, "No file or folder at 'missing.jsonl'"),
        ({"data": "emozilla/pg19"}, ConnectionError, "Could not load the dataset 'emozilla/pg19' .* a local folder"),
    ],
)
def test_bad_options_are_named_before_any_work(run, main, monkeypatch, options, error, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(error, match=message):
        main(run, **options)
    assert not (run / "bad").exists()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["", " \n"], "The train split of .* has no text: every document is empty"),
        (["w1", "w2", "w3"], "No document reaches the context of 128 tokens: the longest has 1"),
        (["w1"] * 18 + [" ".join(["w1"] * 400)] * 2, "No document has two tokens, one to see and one to predict"),
    ],
)
def test_empty_and_tiny_documents_are_named_before_any_work(run, main, texts, message):
    (run / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(ConfigError, match=message):
        main(run)
    assert not (run / "bad").exists()


def test_the_tokenizer_of_another_model_is_named_before_any_work(run, main):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "model")
    tokenizer.add_tokens([f"more{i}" for i in range(10)])
    tokenizer.save_pretrained(run / "model")
    with pytest.raises(ConfigError, match="The tokenizer has 138 tokens, the model embeddings for 128"):
        main(run)


def test_a_folder_that_takes_no_run_is_named_before_any_work(run, main, monkeypatch):
    with pytest.raises(CheckpointError, match=r"Cannot write to .*data\.jsonl/run.*Choose another `output`"):
        main(run, "data.jsonl/run")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("hf_rfa.training.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"Two checkpoints need .* has 0 MiB left"):
        main(run)


def test_another_run_in_the_same_folder_is_not_overwritten(run, main):
    (run / "bad").mkdir()
    with pytest.raises(AssertionError, match="work was done"):  # as far as the calibration that must not be reached
        main(run)
    with pytest.raises(ConfigError, match=r"holds a run already\. Go on with it by resume=true"):
        main(run)
    with pytest.raises(ConfigError, match=r"other settings: \{'num_features': 8\}\. Got \{'num_features': 16\}"):
        main(run, resume=True, num_features=16)


def test_a_run_of_a_version_with_fewer_options_is_resumed(run, main):
    (run / "bad").mkdir()
    with pytest.raises(AssertionError, match="work was done"):
        main(run)
    settings = json.loads((run / "bad" / "settings.json").read_text())
    del settings["loop_probability"]
    (run / "bad" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"other settings: \{.*'loop_probability': 0\.0"):
        main(run, resume=True, documents="random", loop_probability=0.5, context=200)
    with pytest.raises(AssertionError, match="work was done"):
        main(run, resume=True)


#: What settings.json of the run above was before options had types: texts where there now are numbers and None.
AS_TEXT = {"softmax_heads": "0.25", "resample": "2", "stages": ["calibrate", "finetune"], "trackers": []}


@pytest.mark.parametrize("heads", ["0.25", "none"])
def test_a_run_of_a_version_with_untyped_options_is_resumed(run, main, heads):
    (run / "bad").mkdir()
    with pytest.raises(AssertionError, match="work was done"):
        main(run, softmax_heads=heads)
    settings = json.loads((run / "bad" / "settings.json").read_text())
    assert settings["softmax_heads"] == (None if heads == "none" else 0.25)
    assert settings["resample"] == 2
    (run / "bad" / "settings.json").write_text(json.dumps(settings | AS_TEXT | {"softmax_heads": heads}))
    with pytest.raises(ConfigError, match=r"other settings: \{'resample': 2\}. Got \{'resample': 'never'\}"):
        main(run, resume=True, softmax_heads=heads, resample="never")
    with pytest.raises(AssertionError, match="work was done"):
        main(run, resume=True, softmax_heads=heads)


def test_the_configs_and_the_commands_of_the_documentation_are_read(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    options = runpy.run_path(SCRIPT)["Options"]
    # Those of finetune_embeddings.py are read in test_embedding_scripts.py.
    files = [path for path in (ROOT / "scripts" / "configs").iterdir() if not path.name.startswith("embeddings")]
    found = {path.name: parse_arguments(options, [str(path)]) for path in files}
    assert sorted(found) == ["books.yaml", "long_carried.yaml"]
    assert found["books.yaml"].finetuning.batches_per_step == 4
    assert found["books.yaml"].stages == ("calibrate", "distill", "finetune")
    assert found["long_carried.yaml"].conversion.softmax_heads is None
    document = (ROOT / "docs" / "long_documents.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"scripts/finetune\.py scripts/configs/(.*)", document)
    assert len(commands) >= 2
    for command_line in commands:
        parse_arguments(options, shlex.split(str(ROOT / "scripts" / "configs" / command_line), comments=True))


def test_an_unknown_key_of_the_yaml_file_is_named(run, main):
    (run / "run.yaml").write_text("modle: x\n")
    with pytest.raises(
        ConfigError, match=r"run\.yaml has unknown keys: \['modle'\]\. 'modle' may be meant as `model`"
    ):
        main(run)
