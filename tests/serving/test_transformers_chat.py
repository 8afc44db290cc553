"""`transformers chat`, a client that knows nothing of hf_rfa, before the servers that know converted folders."""

import os
import subprocess
import sys

import pytest
from paths import ROOT
from servers import NAME, Running, free_port, generated, prompt_of, serving, tiny_model, tokenizer, wait_until_healthy

import hf_rfa

PROMPTS = [prompt_of(40), prompt_of(21)]


def chat(url, name, *flags, typed):
    """What a terminal shows of a chat in which these lines are typed."""
    # The client refuses every address, this machine's too, where the hub may not be asked. COLUMNS: no line is broken.
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "COLUMNS": "4000", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "transformers.cli.transformers", "chat", name, url, *flags]
    return subprocess.run(
        command, input="".join(f"{line}\n" for line in typed), env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip


def answers_in(shown, name):
    """The lines after each line that names the model."""
    lines = [line.strip() for line in shown.splitlines()]
    return [lines[number + 1] for number, line in enumerate(lines) if line == f"<{name}>:"]


def expected(model):
    """The answers of a chat of two turns, by `generate`: the second prompt holds the first turn."""
    prompt, said = "", []
    for text, count in zip(PROMPTS, (12, 5), strict=True):
        prompt += f"w9 {text} "
        said.append(tokenizer().decode(generated(model, f"{prompt}w10", count)))
        prompt += f"w9 {said[-1]} "
    return said


# "n": not to go on with an answer that reached its limit.
TYPED = [PROMPTS[0], "n", "!set max_new_tokens=5", PROMPTS[1], "n", "!exit"]
FLAGS = ["do_sample=False", "max_new_tokens=12"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.multi_process
@pytest.mark.parametrize("path", ["", "/v1"])
def test_it_chats_with_our_server(model, path):
    with serving(model) as server:
        seen = chat(server.url + path, NAME, *FLAGS, typed=TYPED)
    assert seen.returncode == 0, seen.stderr
    assert answers_in(seen.stdout, NAME) == expected(model)
    assert expected(model) != expected(tiny_model(original=True))


@pytest.mark.multi_process
def test_our_server_tells_it_what_is_wrong(model):
    with serving(model) as server:
        seen = chat(server.url, "another", typed=["!exit"])
        assert "There is no model 'another' here. Ask for 'tiny'." in seen.stderr
        seen = chat(server.url, NAME, "num_beams=4", typed=["w3", "!exit"])
        assert "`generation_config.num_beams` is not supported. Got 4." in seen.stderr


@pytest.mark.multi_process
def test_transformers_own_server_answers_with_the_converted_model(model, tmp_path):
    """It is told to run the code in the folder, which imports hf_rfa."""
    folder = tmp_path / "folder"
    hf_rfa.save_pretrained(model, folder)
    tokenizer().save_pretrained(folder)
    running = Running(free_port())
    arguments = ["serve", "--trust-remote-code", "--host", "127.0.0.1", "--port", str(running.port), "--device", "cpu"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *arguments],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until_healthy(running, process)
        seen = chat(running.url, str(folder), *FLAGS, typed=TYPED)
    finally:
        process.kill()
        process.wait()
    assert seen.returncode == 0, seen.stderr + (tmp_path / "server.log").read_text()
    assert answers_in(seen.stdout, str(folder)) == expected(model)
