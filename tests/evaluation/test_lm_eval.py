"""lm-evaluation-harness on a converted folder, with a task of one local file."""

import json
import os
import subprocess
import sys

import pytest
from conversions import redrawn
from families import llama
from tokenizers_of_tests import byte_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model with its tokenizer, and a task."""
    root = tmp_path_factory.mktemp("harness")
    redrawn(llama(vocab_size=258)).save_pretrained(root / "model")
    byte_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(root / "model")
    rows = [{"question": "a question far longer than the window", "word": " two"}, {"question": "three", "word": " 4"}]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "tiny.yaml").write_text(
        f"task: tiny_local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {root / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{word}}'\n"
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
    )
    return root


@pytest.mark.filterwarnings("default")  # the harness and its imports warn about themselves
def test_a_local_task_runs_by_our_command_and_by_its_own(folder, tmp_path):
    """Its own runs in a process that knows nothing of hf_rfa but the file in the folder."""
    from hf_rfa.lm_eval import evaluate

    ours = evaluate(str(folder / "model"), ["tiny_local"], include_path=str(folder))["tiny_local"]["perplexity,none"]
    assert 1 < ours < float("inf")
    command = f"""{sys.executable} -m lm_eval --model hf --tasks tiny_local --include_path {folder} --device cpu
        --model_args pretrained={folder / "model"},trust_remote_code=True,dtype=float32 --output_path {tmp_path}"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command.split(), capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr[-4000:]
    (report,) = tmp_path.glob("**/results_*.json")
    theirs = json.loads(report.read_text())["results"]["tiny_local"]["perplexity,none"]
    assert theirs == pytest.approx(ours, rel=1e-6)
