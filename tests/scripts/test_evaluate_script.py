"""scripts/evaluate.py: the four columns and any checkpoints, with the numbers that the library gives; model cards."""

import json
import math
import runpy
import shutil
import sys

import pytest
import torch
from conversions import adapters
from families import llama
from processes import ROOT
from tokenizers_of_tests import word_tokenizer, write_words
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import hf_rfa
from hf_rfa.checkpoint import load_any
from hf_rfa.data import evaluation_windows, load_documents, tokenize_documents
from hf_rfa.errors import CheckpointError, ConfigError
from hf_rfa.evaluation import copy_perplexity, kl_divergence, perplexity
from hf_rfa.evaluation.columns import Column, markdown_table, untrained_columns
from hf_rfa.evaluation.document_perplexity import document_perplexity, sliding_window_nll, streaming_nll
from hf_rfa.evaluation.model_card import write_model_card
from hf_rfa.evaluation.results import EXACT, LINEAR, ORIGINAL, VARIANTS, WINDOW_ONLY
from hf_rfa.runtime.record import CONFIG_FIELD

WORDS = 128
PNG = b"\x89PNG"


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A folder with an original, a checkpoint of a conversion whose weights were changed, and documents."""
    folder = tmp_path_factory.mktemp("setting")
    # Attention that looks somewhere, so that no two columns are the same.
    model = llama(gain=8, vocab_size=WORDS, hidden_size=64, intermediate_size=64, max_position_embeddings=2048)
    model.save_pretrained(folder / "original")
    word_tokenizer(WORDS).save_pretrained(folder / "original")
    generator = torch.Generator().manual_seed(0)
    (folder / "data").mkdir()
    for split, lengths in (("train", (600, 500)), ("validation", (900, 700))):
        write_words(folder / "data" / f"{split}.jsonl", lengths, generator, WORDS)
    trained = hf_rfa.convert(
        AutoModelForCausalLM.from_pretrained(folder / "original"),
        hf_rfa.RFAConfig(num_features=8, window=16, sink_tokens=2, softmax_heads=[(1, 1)]),
        calibrate=False,
    )
    with torch.no_grad():
        trained.lm_head.weight.mul_(0.9)
    hf_rfa.save_pretrained(trained, folder / "trained")
    return folder


@pytest.fixture(scope="module")
def report(setting):
    """report.json of one run of the script on all that it can measure; the folder has the rest."""
    with pytest.MonkeyPatch.context() as patch:
        run_script(
            patch, "--original", setting / "original", "--data", setting / "data", "--output", setting / "report",
            "--checkpoints", f"trained={setting / 'trained'}", setting / "original",
            "--contexts", 64, 256, "--windows", 3, "--stride", 128,
            "--document_tokens", 500, "--copy_gaps", 50, "--passkey", 128, "--speed", 64, 128,
            "--window", 16, "--num_features", 8,
        )  # fmt: skip
    return json.loads((setting / "report" / "report.json").read_text())


def held_out(setting):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(setting / "original")
    return tokenize_documents(tokenizer, load_documents(setting / "data", "validation"))


def test_the_columns_are_the_four_and_the_checkpoints(setting, report):
    last = f"{setting.name}/original"  # two names of the folder, for want of another
    assert [column["name"] for column in report["columns"]] == [*VARIANTS, "trained", last]
    assert report["columns"][-1] == report["columns"][0] | {"name": last, "kl_to_original": pytest.approx(0, abs=1e-6)}
    assert report["settings"]["stride"] == 128
    assert str(setting) not in json.dumps(report) + (setting / "report" / "report.md").read_text()
    kl = [column["kl_to_original"] for column in report["columns"]]
    assert kl[0] == 0
    assert len(set(kl[:5])) == 5  # each is another model
    assert kl[3] < kl[1]


def test_its_numbers_are_those_of_the_library(setting, report):
    documents, num_bytes = held_out(setting)
    tokens = evaluation_windows(documents, 256, 3).flatten()
    together = torch.cat(documents)
    original = AutoModelForCausalLM.from_pretrained(setting / "original").eval()
    trained = hf_rfa.from_pretrained(setting / "trained")
    for model, column in ((original, report["columns"][0]), (trained, report["columns"][4])):
        for context in (64, 256):
            expected = perplexity(model, tokens, context)
            assert column["perplexity"][str(context)] == pytest.approx(expected, rel=1e-6)
            bits = math.log2(expected) * len(together) / sum(num_bytes)
            assert column["bits_per_byte"][str(context)] == pytest.approx(bits, rel=1e-6)
        assert column["copy_perplexity"]["50"] == pytest.approx(copy_perplexity(model, together, 50), rel=1e-6)
        whole = [ids[:500] for ids in documents]
        sliding = document_perplexity([sliding_window_nll(model, ids, 256, 128) for ids in whole])
        assert column["sliding_perplexity"] == pytest.approx(sliding, rel=1e-6)
        assert [(cell["length"], cell["depth"]) for cell in column["passkey"]] == [
            (128, depth) for depth in (0.0, 0.25, 0.5, 0.75)
        ]
    assert report["columns"][0]["streaming_perplexity"] is None  # its cache would hold every token
    streaming = document_perplexity([streaming_nll(trained, ids[:500]) for ids in documents])
    assert report["columns"][4]["streaming_perplexity"] == pytest.approx(streaming, rel=1e-6)
    kl = kl_divergence(original, trained, tokens, 256)
    assert report["columns"][4]["kl_to_original"] == pytest.approx(kl, rel=1e-6)


def test_cache_bytes_say_that_a_linear_model_does_not_grow(report):
    speed = report["speed"]
    assert list(speed) == ["64", "128"]
    original, linear = ([speed[n][name]["cache_bytes"] for n in ("64", "128")] for name in (ORIGINAL, LINEAR))
    assert original == [2 * 2 * 2 * 16 * n * 4 for n in (64, 128)]  # layers, keys and values, heads, dim, float32
    assert linear[0] == linear[1]


def test_the_table_and_the_plots_show_the_same(setting, report):
    table = (setting / "report" / "report.md").read_text()
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in table.splitlines() if "|" in line}
    assert [cell.strip() for cell in lines[""]] == [column["name"] for column in report["columns"]]
    shown = [float(cell) for cell in lines["perplexity, windows of 256 tokens"]]
    assert shown == pytest.approx([column["perplexity"]["256"] for column in report["columns"]], abs=5e-4)
    assert lines["perplexity, whole documents, state carried"][0].strip() == "—"
    assert float(lines["cache after 128 tokens, MiB"][0]) == pytest.approx(0.06, abs=0.005)
    assert table.endswith(
        "\nWindow 16: a query of an untrained conversion sees 16 to 32 tokens and the first 4 exactly.\n"
    )
    curve = report["curve"]  # of softmax_heads="auto"
    assert len(curve) > 1
    assert f"| {curve[-1]['bytes'] / 2**20:.3f} | {curve[-1]['nats']:.5f} | exact: " in table
    for name in ("perplexity_by_position.png", "cost.png", "curve.png"):
        assert (setting / "report" / name).read_bytes().startswith(PNG)


def test_a_context_that_no_document_reaches_is_named_before_any_work(setting, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="No document reaches the context of 5000 tokens: the longest has 900"):
        run_script(
            monkeypatch, "--original", setting / "original", "--data", setting / "data", "--output", tmp_path / "r",
            "--contexts", 5000,
        )  # fmt: skip
    assert not (tmp_path / "r").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Cannot write to .* Choose another --output"):
        run_script(
            monkeypatch, "--original", setting / "original", "--data", setting / "data", "--output",
            tmp_path / "file" / "r", "--contexts", 64,
        )  # fmt: skip


def test_two_columns_of_one_name_are_refused(setting, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"Two columns are called 'original'\. Name the folder"):
        run_script(
            monkeypatch, "--original", setting / "original", "--data", setting / "data", "--output", tmp_path / "r",
            "--checkpoints", f"original={setting / 'trained'}",
        )  # fmt: skip


def test_a_converted_folder_without_its_conversion_is_no_softmax_checkpoint(setting, tmp_path):
    shutil.copytree(setting / "trained", tmp_path / "torn")
    (tmp_path / "torn" / "rfa_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"was converted, but rfa_config\.json is not there"):
        load_any(tmp_path / "torn")


def test_untrained_columns_share_the_weights_and_leave_the_calibrated_model_alone(setting):
    original = AutoModelForCausalLM.from_pretrained(setting / "original").eval()
    calibrated = hf_rfa.from_pretrained(setting / "trained")
    columns = untrained_columns(original, calibrated)
    assert list(columns) == list(VARIANTS)
    assert columns[WINDOW_ONLY].lm_head.weight is original.lm_head.weight
    assert columns[LINEAR].lm_head.weight is calibrated.lm_head.weight
    assert not hasattr(original.config, CONFIG_FIELD)
    assert [a.softmax_heads for a in adapters(calibrated)] == [(), (1,)]
    assert [a.softmax_heads for a in adapters(columns[LINEAR])] == [(), ()]
    ids = torch.randint(WORDS, (1, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = {name: model(ids).logits for name, model in columns.items()}
        again = calibrated(ids).logits
    assert torch.equal(logits[EXACT], again)
    assert not torch.allclose(logits[LINEAR], logits[EXACT], atol=1e-3)
    # Up to the end of the second chunk the window sees everything.
    torch.testing.assert_close(logits[WINDOW_ONLY][:, :32], logits[ORIGINAL][:, :32], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits[WINDOW_ONLY][:, 64:], logits[ORIGINAL][:, 64:], atol=1e-3)
    hf_rfa.set_softmax_heads(calibrated, [])
    assert list(untrained_columns(original, calibrated)) == [ORIGINAL, WINDOW_ONLY, LINEAR]


def column(name, **figures):
    known = {"perplexity": {64: 3.0}, "bits_per_byte": {64: 1.5}, "by_position": [], "kl_to_original": 0.25}
    known |= {"copy_perplexity": {}, "far_recovery": None}
    return Column(name=name, **(known | {"greedy_agreement": 0.5} | figures))


def test_markdown_leaves_out_rows_that_nothing_was_measured_for():
    table = markdown_table([column("a"), column("b", sliding_perplexity=4.0, stride=32)])
    assert "| perplexity, sliding window over whole documents, stride 32 | — | 4.000 |" in table
    assert "state carried" not in table
    assert "far recovery" not in table
    assert "| KL to the original, nats/token | 0.2500 | 0.2500 |" in table


def test_a_model_card_names_the_model_its_data_its_settings_and_holds_the_table(setting, tmp_path):
    table = markdown_table([column(name) for name in (*VARIANTS, "fine-tuned")])
    path = write_model_card(
        tmp_path, base_model=str(setting / "original"), table=table, data="books",
        settings={"context": 64, "model": str(setting / "original")},
    )  # fmt: skip
    card = path.read_text()
    assert json.loads(card.split("```json")[1].split("```")[0]) == {"context": 64, "model": "original"}
    head = card.split("---")[1]
    assert "library_name: hf_rfa" in head
    assert "base_model: original\n" in head  # no path of the machine that made it
    assert str(setting) not in card
    assert "trained on `books`" in card
    assert table in card
    hub = write_model_card(tmp_path, base_model="owner/name", table=table, settings={}, data="d").read_text()
    assert "base_model: owner/name\n" in hub
