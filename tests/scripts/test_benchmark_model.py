"""The benchmark of whole models: both are timed on the same tokens, and their caches are told."""

import re

import pytest
import torch

import hf_rfa

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024,
}  # fmt: skip
SMALL = "--dtype float32 --context 200 --steps 2 --repeats 1 --clock cpu".split()


@pytest.fixture
def script(imported, monkeypatch):
    script = imported("benchmark_model")
    monkeypatch.setitem(script.SHAPES, "tiny", TINY)
    return script


def lines(text):
    """(heading, name) of each line of figures -> its numbers."""
    found, heading = {}, ""
    for line in text.splitlines()[1:]:
        if not line.startswith("  "):
            heading = line
            continue
        *numbers, name = line.split()
        found[heading, name] = [float(n.replace(",", "")) for n in numbers if re.fullmatch(r"[\d.,]+", n)]
    return found


def test_a_shape_with_half_of_its_heads_exact(script, capsys):
    script.main(["--shape", "tiny", "--exact", "0.5", "--batch", "1", "2", *SMALL])
    found = lines(capsys.readouterr().out)
    assert [heading for heading, name in found if name == "converted"] == [
        "prefill",
        "decoding, 1 rows",
        "decoding, 2 rows",
    ]
    for heading in ("decoding, 1 rows", "decoding, 2 rows"):
        milliseconds, speed, times = found[heading, "converted"]
        assert times == pytest.approx(found[heading, "original"][0] / milliseconds, rel=0.1, abs=0.01)
        assert speed == pytest.approx(int(heading.split()[1]) * 2 / milliseconds * 1e3, rel=0.01)


def test_folders_of_ones_own(script, capsys, tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "original")
    hf_rfa.convert(tiny_llama, hf_rfa.RFAConfig(window=16), calibrate=False)
    hf_rfa.save_pretrained(tiny_llama, tmp_path / "converted")
    folders = ["--model", str(tmp_path / "original"), "--converted", str(tmp_path / "converted")]
    script.main([*folders, "--batch", "1", *SMALL])
    assert ("prefill", str(tmp_path / "converted")) in lines(capsys.readouterr().out)
    assert torch.get_num_threads() == 1


def test_an_unknown_shape_is_named(script):
    with pytest.raises(SystemExit, match=r"--shape must be one of smollm2-135m, llama-1b, tiny\. Got huge"):
        script.main(["--shape", "huge", *SMALL])
