"""The benchmark of the server, on a tiny model."""

import json

import pytest
from servers import tiny_model, tokenizer

import hf_rfa
from hf_rfa.errors import ConfigError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    original, converted = (tmp_path_factory.mktemp(name) for name in ("original", "converted"))
    tiny_model(original=True).save_pretrained(original)
    hf_rfa.save_pretrained(tiny_model(), converted)
    tokenizer().save_pretrained(original)
    return original, converted


def test_both_models_answer_every_load_that_fits(imported, folders, tmp_path, capsys):
    serving = imported("benchmark_serving")
    original, converted = folders
    # The original takes 2 layers x 2 key heads x 8 dims x (key, value) x 4 bytes a token.
    limit = 100 * 2 * 2 * 8 * 2 * 4 / 2**30
    serving.main(
        f"--model {original} --converted {converted} --prompts 20,100 --concurrent 1,2 --new-tokens 3 --clock cpu "
        f"--limit-gib {limit} --output {tmp_path}".split()
    )
    rows = json.loads((tmp_path / "serving.json").read_text())["rows"]
    assert [(row["prompt"], row["requests"], row["model"]) for row in rows] == [
        (prompt, requests, model) for prompt in (20, 100) for requests in (1, 2) for model in ("original", "converted")
    ]
    sizes = {(row["model"], row["prompt"]): row["bytes"] for row in rows}
    assert sizes["original", 100] == 5 * sizes["original", 20] == limit * 2**30
    assert sizes["converted", 100] < 3 * sizes["converted", 20]  # one of four heads grows
    assert [row["requests"] for row in rows if row["model"] == "original" and "seconds" not in row] == [2]
    for row in rows:
        if "seconds" in row:
            assert row["tokens_per_second"] == pytest.approx(3 * row["requests"] / row["seconds"])
            assert row["prompt_tokens_per_second"] == pytest.approx(row["requests"] * row["prompt"] / row["seconds"])
            assert row["first_token"] > 0
    assert "does not fit" in (tmp_path / "serving.md").read_text()
    assert capsys.readouterr().out.count("| original |") == 4


def test_a_run_in_parts_gives_one_table_and_other_settings_are_refused(imported, folders, tmp_path, capsys):
    benchmark = imported("benchmark_serving")
    command = f"--model {folders[0]} --converted {folders[1]} --new-tokens 3 --clock cpu --output {tmp_path}"
    for loads in ("--prompts 20 --concurrent 2", "--prompts 9 --concurrent 1,2", "--prompts 20 --concurrent 2"):
        benchmark.main(f"{command} {loads}".split())
    found = json.loads((tmp_path / "serving.json").read_text())
    assert [(row["prompt"], row["requests"], row["model"]) for row in found["rows"]] == [
        (prompt, requests, model)
        for prompt, requests in ((9, 1), (9, 2), (20, 2))
        for model in ("original", "converted")
    ]
    assert [row["command"][-30:] for row in found["rows"]][-1].endswith("--prompts 20 --concurrent 2")
    page = (tmp_path / "serving.md").read_text()
    assert page.count("python scripts/") == 2
    assert page.count("| original |") == 3
    with pytest.raises(ConfigError, match="other settings"):
        benchmark.main(f"{command} --prompts 20 --concurrent 2 --new-tokens 4".split())


def test_seconds_of_a_step_are_those_in_which_all_requests_are_there(imported):
    together = imported("benchmark_serving").together
    assert together([[1.0, 2.0, 3.0, 4.0, 5.0], [2.5, 4.5, 6.5]]) == pytest.approx((5 - 2.5) / 3)
    assert together([[1.0, 2.0], [3.0, 4.0]]) is None
