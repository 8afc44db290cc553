"""scripts/benchmarks/peers: prompts, our answers and the table of them beside those of another environment."""

import ast
import json

import paths
import pytest
import torch
from families import llama
from tokenizers_of_tests import byte_tokenizer

import hf_rfa
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.continuation import continuation_kl

FOLDER = paths.SCRIPTS / "benchmarks" / "peers"


def english(words: int) -> str:
    return " ".join(f"The w{n * 17 % 1000} is here." if n % 5 == 0 else f"and then {n % 7}" for n in range(words))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    model = llama(gain=8, vocab_size=258, hidden_size=64, eos_token_id=None, max_position_embeddings=2048)
    model.save_pretrained(folder / "original")
    byte_tokenizer().save_pretrained(folder / "original")
    config = hf_rfa.RFAConfig(num_features=8, window=16, kept_keys=8)
    hf_rfa.save_pretrained(hf_rfa.convert(model, config, calibrate=False), folder / "converted")
    (folder / "data").mkdir()
    for split in ("train", "validation"):
        (folder / "data" / f"{split}.txt").write_text(english(10_000))
    return folder


def test_both_answer_the_same_prompts_and_the_table_shows_them(setting, imported):
    original, prompts_file = setting / "original", setting / "prompts.json"
    imported("prompts", FOLDER).main(
        f"""--model {original} --data {setting / "data"} --output {prompts_file} --tasks needle_multikey
        --task_lengths 900 --task_documents 1 --continuations 2 --continuation_lengths 200 --continuation_tokens 40
        --texts 1""".split()
    )
    prompts = json.loads(prompts_file.read_text())
    assert str(setting) not in json.dumps(prompts)
    assert [len(each["ids"]) for each in prompts["continuations"]] == [160, 160]
    assert prompts["continuations"][0]["ids"] != prompts["continuations"][1]["ids"]
    assert len(prompts["documents"][0]["questions"]) == 4
    assert len(prompts["texts"]) == 1

    ours = setting / "ours.json"
    imported("ours", FOLDER).main(
        f"--prompts {prompts_file} --original {original} --models rfa={setting / 'converted'} --output {ours}".split()
    )
    columns = json.loads(ours.read_text())["columns"]
    assert list(columns) == ["original", "rfa"]
    assert columns["original"]["share"] == 1.0
    assert columns["rfa"]["share"] < 1.0
    models = [llama(gain=8, vocab_size=258, hidden_size=64, eos_token_id=None, max_position_embeddings=2048)]
    models.append(hf_rfa.from_pretrained(setting / "converted"))
    given = prompts["continuations"][1]
    expected = continuation_kl(*models, torch.tensor(given["ids"]), torch.tensor(given["continuation"]))
    assert columns["rfa"]["kl"][1] == pytest.approx(expected, rel=1e-4)

    # What the other environment writes: a press that answers all but the last question, and one that cannot.
    tokenizer = byte_tokenizer()
    right = [tokenizer(each["answers"][0]).input_ids for each in prompts["documents"][0]["questions"]]
    peers = {
        "SnapKV at 25 %": {"share": 0.25, "kl": [0.5, 0.25], "answers": [[*right[:3], []]]},
        "DuoAttention at 10 %": {"share": None, "kl": [None, None], "answers": [None]},
    }
    (setting / "kvpress.json").write_text(json.dumps({"columns": peers}))
    table = imported("table", FOLDER)
    arguments = ["--prompts", str(prompts_file), "--model", str(original), "--output", str(setting / "table.md")]
    table.main([*arguments, "--answers", str(ours), str(setting / "kvpress.json")])
    text = (setting / "table.md").read_text()
    assert "|  | share of the KV bytes | KL at 200, nats/token | needle_multikey, 900 (4 questions) |" in text
    assert "| SnapKV at 25 % | 0.250 | 0.3750 | 75 % (30 to 95) |" in text
    assert "| DuoAttention at 10 % | — | — | — |" in text
    assert "| original | 1.000 | 0.0000 | " in text
    with pytest.raises(ConfigError, match="different names"):
        table.main([*arguments, "--answers", str(ours), str(ours)])


def test_what_runs_in_the_other_environment_imports_nothing_of_this_package():
    tree = ast.parse((FOLDER / "kvpress_answers.py").read_text())
    names = [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    names += [alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names]
    assert {name.partition(".")[0] for name in names} <= {
        "argparse", "json", "time", "pathlib", "torch", "transformers", "kvpress", "importlib",
    }  # fmt: skip
