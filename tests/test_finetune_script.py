"""scripts/finetune.py: runs as written, resumes after a kill, and gives the same on two processes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import ENVIRONMENT, ROOT, command, launch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_rfa

SCRIPT = str(ROOT / "scripts" / "finetune.py")


@pytest.fixture
def run(tiny_llama, tmp_path):
    """Folders and a YAML file of a run that takes a second a step or less."""
    words = {f"w{i}": i for i in range(128)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path / "model")
    tiny_llama.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{i}" for i in torch.randint(128, (n,), generator=generator)) for n in (400, 900, 650, 700)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = {
        "model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl"), "output": str(tmp_path / "run"),
        "context": 128, "window": 16, "sink_tokens": 2, "num_features": 8, "feature_map": "positive", "steps": 6,
        "batches_per_step": 2, "save_every": 2, "evaluate_every": 3, "evaluation_windows": 2, "progress": False,
        "softmax_heads": "0.25", "resample": "2", "learning_rate": 1e-2, "documents": "packed",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    return tmp_path


def arguments(folder: Path, output: str, **options) -> list[str]:
    given = [f"--{name}={value}" for name, value in options.items()]
    return [SCRIPT, str(folder / "run.yaml"), f"--output={folder / output}", *given]


def progress(folder: Path, output: str) -> dict:
    return json.loads((folder / output / "progress.json").read_text())


def weights(folder: Path, output: str) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in ("model.safetensors", "rfa_model.safetensors")
        for name, tensor in load_file(folder / output / "final" / file).items()
    }


@pytest.mark.multi_process
def test_a_run_that_is_killed_resumes_and_two_processes_give_the_same(run):
    launch(arguments(run, "whole"))
    whole = progress(run, "whole")
    assert len(set(whole["losses"])) == 6
    assert [e["step"] for e in whole["evaluations"]] == [3, 6]
    assert "| perplexity, windows of 128 tokens |" in (run / "whole" / "final" / "README.md").read_text()
    assert hf_rfa.from_pretrained(run / "whole" / "final").config.vocab_size == 128

    # Two processes, the same global batch; killed without a word as soon as a checkpoint is there.
    killed = subprocess.Popen(
        command(arguments(run, "killed", save_every=1), 2),
        env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not any(p.suffix != ".partial" for p in (run / "killed").glob("checkpoint-*")):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (run / "killed" / "progress.json").exists()

    # Resumed on one process.
    launch(arguments(run, "killed", resume=True))
    resumed = progress(run, "killed")
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert resumed["tokens"] == whole["tokens"]
    found, expected = weights(run, "killed"), weights(run, "whole")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    omegas = [name for name in expected if name.endswith("omega")]
    assert omegas
    assert all(torch.equal(found[name], expected[name]) for name in omegas)  # drawn three times since the start


@pytest.mark.multi_process
def test_one_document_on_two_processes_trains_like_on_one(run):
    options = {"documents": "random", "resample": "never", "batches_per_step": 1, "steps": 3, "evaluate_every": 3}
    launch(arguments(run, "one", **options))
    launch(arguments(run, "two", sequence_parallel=2, **options), 2)
    assert progress(run, "two")["losses"] == pytest.approx(progress(run, "one")["losses"], rel=1e-5)


def test_bad_options_are_named(run):
    for extra, message in (
        ({"train": "everything"}, "`train` must be of"),
        ({"stages": "sleep"}, "`stages` must be of"),
        ({"context": 5000}, "No document reaches the context of 5000 tokens"),
    ):
        failed = launch(arguments(run, "bad", **extra), check=False)
        assert failed.returncode != 0
        assert message in failed.stderr
        assert not (run / "bad").exists()
