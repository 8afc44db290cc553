"""Columns of the same bytes hold the same bytes, and are what their names say; the comparison shows them and tasks."""

import json

import pytest
from conversions import adapters, converted
from families import llama, token_ids
from test_tasks import english
from tokenizers_of_tests import byte_tokenizer

import hf_rfa
from hf_rfa import RFAConfig
from hf_rfa.errors import ConfigError
from hf_rfa.evaluation import report
from hf_rfa.evaluation.columns import untrained_columns
from hf_rfa.evaluation.compare import compare
from hf_rfa.evaluation.equal_bytes import bytes_after
from hf_rfa.evaluation.results import (
    COLUMNS,
    EXACT,
    LINEAR,
    ORIGINAL,
    SAME_BYTES,
    SAME_KEPT,
    SAME_SPLIT,
    SAME_WINDOW,
    CompareSettings,
    column_titles,
)

CONTEXT = 200
#: Bytes of one token of one key head: key and value of dim 16, float32.
TOKEN = 2 * 16 * 4
HEADS = 4
CONFIGS = {
    "features": RFAConfig(num_features=32, window=16, sink_tokens=2, kept_keys=0, softmax_heads=[(1, 1)]),
    "kept keys": RFAConfig(num_features=16, window=16, sink_tokens=2, kept_keys=24, softmax_heads=[(0, 0), (1, 1)]),
    "kept keys per head": RFAConfig(
        num_features=16, window=16, sink_tokens=2, kept_keys=8, head_kept_keys={(0, 1): 40}, softmax_heads=[(1, 0)]
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def columns(request):
    original = llama(hidden_size=64, max_position_embeddings=512)
    assert original.config.num_key_value_heads * original.config.num_hidden_layers == HEADS
    calibrated = hf_rfa.convert(
        llama(hidden_size=64, max_position_embeddings=512), CONFIGS[request.param], calibrate=False
    )
    ids = token_ids(1, CONTEXT)[0]
    return untrained_columns(original, calibrated, tuple(COLUMNS), ids), ids


def test_they_hold_the_same_bytes_within_one_token_per_head(columns):
    models, ids = columns
    assert list(models) == [ORIGINAL, *COLUMNS.values()]
    target = bytes_after(models[EXACT], ids)
    for name in SAME_BYTES:
        kept = 16 if name == SAME_KEPT else 0  # position, decay and mass of a kept key
        assert abs(bytes_after(models[name], ids) - target) <= HEADS * (TOKEN + kept), name
    assert target < bytes_after(models[ORIGINAL], ids)


def test_they_are_what_their_names_say(columns):
    models, _ = columns
    exact, window, split, kept = (adapters(models[name]) for name in (EXACT, SAME_WINDOW, SAME_SPLIT, SAME_KEPT))
    for name in SAME_BYTES:
        assert all((adapter.kernel.gamma == 0).all() for adapter in adapters(models[name]))
        assert models[name].lm_head.weight is models[ORIGINAL].lm_head.weight
    assert all(adapter.softmax_heads == () and adapter.kept_keys == 0 for adapter in window)
    assert [adapter.softmax_heads for adapter in split] == [adapter.softmax_heads for adapter in exact]
    assert [adapter.softmax_heads for adapter in kept] == [adapter.softmax_heads for adapter in exact]
    assert all(adapter.kept_keys == 0 for adapter in split)
    assert window[0].config.window > split[0].config.window >= 16
    assert kept[0].config.window == exact[0].config.window
    assert kept[0].config.kept_keys > exact[0].config.kept_keys
    more = kept[0].config.kept_keys - exact[0].config.kept_keys
    others = {head: number + more for head, number in exact[0].config.head_kept_keys or ()}
    assert dict(kept[0].config.head_kept_keys or ()) == others


def test_without_exact_heads_the_split_is_the_window(columns):
    original, ids = columns[0][ORIGINAL], columns[1]
    calibrated = converted(llama(hidden_size=64, max_position_embeddings=512))
    assert list(untrained_columns(original, calibrated, tuple(COLUMNS), ids)) == [
        title for title in (ORIGINAL, *COLUMNS.values()) if title not in (EXACT, SAME_SPLIT)
    ]


def test_what_cannot_be_is_said(columns):
    models, ids = columns
    with pytest.raises(ConfigError, match="Columns of the same bytes need the tokens"):
        untrained_columns(models[ORIGINAL], models[EXACT], ("same_window",))
    with pytest.raises(ConfigError, match=r"`columns` must be some of window, .* Got \['wide'\]"):
        column_titles(["wide"])
    with pytest.raises(ConfigError, match="`columns` must be some of"):
        CompareSettings(model="m", columns=("wide",))
    # One feature of one component and no kept keys: there is nothing to keep a key in place of.
    least = {"num_features": 1, "feature_map": "positive", "window": 16, "sink_tokens": 2, "kept_keys": 0}
    small = converted(llama(hidden_size=64, max_position_embeddings=512), **least)
    with pytest.raises(ConfigError, match=r"needs at least .* bytes of cache after 200 tokens"):
        untrained_columns(models[ORIGINAL], small, ("same_kept",), ids)


def test_columns_come_in_one_order_behind_the_original():
    assert column_titles(("same_kept", "linear")) == [ORIGINAL, LINEAR, SAME_KEPT]


def test_the_comparison_measures_the_columns_and_tasks_that_are_asked_for(tmp_path):
    folder, data = tmp_path / "model", tmp_path / "data"
    data.mkdir()
    byte_tokenizer(bos_token="<s>").save_pretrained(folder)
    llama(vocab_size=258, hidden_size=64, eos_token_id=None, max_position_embeddings=2048).save_pretrained(folder)
    for split in ("train", "validation"):
        (data / f"{split}.txt").write_text(english(1500))
    settings = CompareSettings.from_dict({
        "model": str(folder), "data": str(data), "output": str(tmp_path / "out"), "columns": "exact,same_split",
        "tasks": "needle_multikey", "task_lengths": "900", "task_documents": "1", "contexts": "128",
        "eval_windows": "1", "copy_gaps": "20", "speed_contexts": "64", "speed_repeats": "1", "new_tokens": "1",
        "steps": "1", "batch_size": "1", "calibration_batches": "1", "num_features": "8", "window": "16",
        "sink_tokens": "2", "softmax_heads": "1:0", "threads": "1", "device": "cpu", "mixed_precision": "no",
    })  # fmt: skip
    comparison, model, _ = compare(settings, progress=False)
    names = [ORIGINAL, EXACT, SAME_SPLIT]
    assert list(comparison.calibrated) == list(comparison.finetuned) == list(comparison.speed) == names
    sizes = [comparison.calibrated[name].cache_bytes for name in names]
    assert sizes[0] == 128 * HEADS * TOKEN
    assert abs(sizes[1] - sizes[2]) <= 3 * TOKEN
    for quality in comparison.calibrated.values():
        (score,) = quality.tasks
        assert (score.task, score.length, score.samples) == ("needle_multikey", 900, 4)
    assert [adapter.softmax_heads for adapter in adapters(model)] == [(), (0,)]
    report.write_report(comparison, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| needle_multikey, 900 tokens, 4 questions | " in text
    assert "| cache @ 128 (MiB) | 0.062 |" in text
    assert "**exact heads, window of the same bytes**" in text
    assert "**kept keys, no features**" not in text
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["calibrated"][EXACT]["tasks"][0]["samples"] == 4
    assert saved["settings"]["columns"] == ["exact", "same_split"]
