"""The two scripts run as written, and several processes give what one gives."""

import json
import re

import numpy as np
import pytest
import torch
from processes import ROOT, launch
from sentence_encoders import load_encoder

import hf_rfa
from hf_rfa.command_line import parse_arguments
from hf_rfa.embeddings import EmbeddingIndex
from hf_rfa.errors import ConfigError
from hf_rfa.runtime.record import is_converted

pytest.importorskip("sentence_transformers")
pytest.importorskip("faiss")
SCRIPTS = ROOT / "scripts"
SHORT = {
    "label_column": "who", "max_tokens": 24, "window": 4, "num_features": 8, "sink_tokens": 1, "kept_keys": 2,
    "calibration_texts": 2, "identities": 4, "passages": 2, "steps": 4, "save_every": 2, "learning_rate": 1e-3,
    "held_out_identities": 12, "progress": False, "resample": "2",
}  # fmt: skip


def arguments(folder, labelled, output, **options):
    given = {**SHORT, "model": folder, "data": labelled, "output": output} | options
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture
def main(imported):
    return imported("finetune_embeddings").main


def progress(folder):
    return json.loads((folder / "progress.json").read_text())


@pytest.mark.multi_process
def test_a_run_is_resumed_and_several_processes_give_what_one_gives(encoder_folder, labelled, tmp_path, main):
    main(arguments(encoder_folder, labelled, tmp_path / "one"))
    one = progress(tmp_path / "one")
    assert len(set(one["losses"])) == 4
    assert one["evaluations"][0].keys() == {"step", "VAL", "R@1 new->new", "R@1 new->old", "cosine to the original"}
    report = (tmp_path / "one" / "report.md").read_text()
    assert "| | original | before training | after training |" in report
    assert re.search(r"Triplets of the first batch: \d+\.\d% hard, \d+\.\d% semi-hard, \d+\.\d% easy", report)
    assert (tmp_path / "one" / "triplets.png").stat().st_size > 5000
    index = EmbeddingIndex.load(tmp_path / "one" / "old_index")
    assert len(index) == 48 * 4
    assert index.names[5] == "identity 1#5"
    final = load_encoder(tmp_path / "one" / "final")
    assert is_converted(final)

    script = str(SCRIPTS / "finetune_embeddings.py")
    launch([script, *arguments(encoder_folder, labelled, tmp_path / "two")], 2)
    two = progress(tmp_path / "two")
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert [c["hard"] for c in two["triplets"]] == [c["hard"] for c in one["triplets"]]
    pair = [load_encoder(tmp_path / name / "final").state_dict() for name in ("one", "two")]
    for name, tensor in pair[0].items():
        torch.testing.assert_close(pair[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)

    (tmp_path / "one" / "progress.json").unlink()
    main(arguments(encoder_folder, labelled, tmp_path / "one", steps=6, resume=True))
    more = progress(tmp_path / "one")["losses"]
    assert more[:4] == one["losses"]
    assert len(more) == 6


def test_the_original_is_trained_too_and_may_get_a_head(encoder_folder, labelled, tmp_path, main):
    main(
        arguments(
            encoder_folder, labelled, tmp_path / "run", convert=False, loss="triplet", dimension=8, data_share=0.5
        )
    )
    final = load_encoder(tmp_path / "run" / "final")
    assert not is_converted(final)
    assert final.get_embedding_dimension() == 8
    assert not (tmp_path / "run" / "old_index").exists()
    assert "| R@1 new->old | 1" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 8}, r"Got dimension=8 and loss=harmonic"),
        ({"identities": 50}, r"needs 50 identities with 2 texts each\. Got 48"),
        ({"loss": "triplets"}, r"`loss` must be one of"),
        ({"label_column": "author"}, r"no column 'author'"),
        ({"passages": 20}, r"needs 4 identities with 20 texts each\. Got 0"),
        ({"model": "cut"}, r"Got an encoder that cuts its own to 8 dimensions"),
        ({"data": "few"}, r"over 10 folds of held-out identities\. Got 4"),
    ],
)
def test_bad_options_are_named(encoder_folder, labelled, tmp_path, main, options, message):
    if options.get("model") == "cut":
        cut = load_encoder(encoder_folder)
        cut.truncate_dim = 8
        cut.save(str(tmp_path / "cut"))
        options = {"model": tmp_path / "cut"}
    if options.get("data") == "few":  # every fifth identity is held out
        few = tmp_path / "few.jsonl"
        few.write_text("".join(f'{{"who": "{n % 20}", "text": "some words {n}"}}\n' for n in range(40)))
        options = {"data": few}
    with pytest.raises(ConfigError, match=message):
        main(arguments(encoder_folder, labelled, tmp_path / "bad", **options))
    assert not (tmp_path / "bad" / "settings.json").exists()  # the corrected command may use the folder


def test_another_run_is_not_overwritten(encoder_folder, labelled, tmp_path, main):
    main(arguments(encoder_folder, labelled, tmp_path / "run", steps=1))
    with pytest.raises(ConfigError, match="holds a run already"):
        main(arguments(encoder_folder, labelled, tmp_path / "run", steps=1))
    with pytest.raises(ConfigError, match=r"other settings: \{'margin': 0\.2\}"):
        main(arguments(encoder_folder, labelled, tmp_path / "run", steps=1, margin=0.3, resume=True))


def test_the_report_has_every_table(encoder_folder, labelled, tmp_path, imported):
    # Some identities have fewer texts than a head's batch takes of each: no batch has them.
    rows = [row for number, row in enumerate(labelled.read_text().splitlines()) if number not in (1, 2, 45, 46)]
    labelled.write_text("\n".join(rows))
    script = imported("evaluate_embeddings")
    given = {
        "original": encoder_folder, "data": labelled, "output": tmp_path / "report", "label_column": "who",
        "max_tokens": 24, "window": 4, "num_features": 8, "sink_tokens": 1, "kept_keys": 2, "calibration_texts": 2,
        "steps": 5,
        "passages": 4, "dimensions": "8,32",
        "shares": "0.1,1", "share_dimension": 8, "identities": 4, "lengths": "400", "folds": 6,
    }  # fmt: skip
    script.main([f"--{name}={value}" for name, value in given.items()])
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert list(found["directions"]) == ["old → old", "new → new", "new → old", "old → new"]
    old, new_to_old = found["directions"]["old → old"], found["directions"]["new → old"]
    assert old["queries"] == 24
    assert old["of_old_interval"] == [1, 1]
    assert new_to_old["of_old"] == pytest.approx(new_to_old["recall"]["1"] / old["recall"]["1"])
    assert new_to_old["of_old_interval"][0] <= new_to_old["of_old"] <= new_to_old["of_old_interval"][1]
    assert found["encoders"]["old"]["cosine"] == pytest.approx(1)
    assert found["encoders"]["new"]["cosine"] > 0.9
    assert [p["bytes"] for p in found["precisions"].values()] == [128, 32]
    assert [h["texts"] for h in found["shares"].values()] == [16, 188]
    assert found["cost"]["softmax"]["400"]["seconds"] > 0
    assert found["cost"]["every head linear"]["400"]["peak_bytes"] > 0
    text = (tmp_path / "report" / "report.md").read_text()
    for named in ("figure 8", "table 5", "table 6", "8 bits", "V-measure"):
        assert named in text
    assert {path.name for path in (tmp_path / "report").glob("*.png")} == {"roc.png", "dimensions.png", "shares.png"}
    assert str(tmp_path) not in (tmp_path / "report" / "report.json").read_text()


def test_a_trained_encoder_is_measured_too(encoder_folder, labelled, tmp_path, imported):
    encoder = load_encoder(encoder_folder)
    hf_rfa.convert(encoder, hf_rfa.RFAConfig(num_features=8, window=4), calibrate=False)
    weight = encoder[0].model.embeddings.word_embeddings.weight
    weight.data += weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    encoder.save(str(tmp_path / "new"))
    script = imported("evaluate_embeddings")
    given = {"original": encoder_folder, "new": tmp_path / "new", "data": labelled, "output": tmp_path / "r"}
    given |= {"label_column": "who", "folds": 6} | dict.fromkeys(("dimensions", "shares", "lengths"), "")
    script.main([f"--{name}={value}" for name, value in given.items()])
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert "cost" not in found
    assert "dimensions" not in found
    assert 0.3 < found["encoders"]["new"]["cosine"] < 0.99
    assert len({direction["ndcg"] for direction in found["directions"].values()}) == 4
    given |= {"original": tmp_path / "new"}
    del given["new"]
    with pytest.raises(ConfigError, match="original is converted already"):
        script.main([f"--{name}={value}" for name, value in given.items()])


def test_the_configuration_is_read(imported):
    options = parse_arguments(
        imported("finetune_embeddings").Options, [str(SCRIPTS / "configs" / "embeddings_books.yaml")]
    )
    assert options.metric.loss == "harmonic"
    assert np.isclose(options.metric.learning_rate, 2e-5)
