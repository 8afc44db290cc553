"""Converted folders in vLLM: the same greedy tokens as in Transformers, for prompts that come and go.

vLLM runs in a process of its own, once for all tests: it takes long to start, and leaves a process changed.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import paths
import pytest
import torch
from families import llama
from transformers import MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

import hf_rfa
from hf_rfa import RFAConfig

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.multi_process,
]
VOCABULARY, NEW = 256, 24
#: Seconds on the wall for one process of vLLM with all that it starts; alone on two cores it needs a tenth of them.
LIMIT = 1800
#: vLLM's attention on CPUs takes heads of 32 dims and more.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 128,
    "max_position_embeddings": 1024,
}  # fmt: skip
SHORT = {"window": 8, "num_features": 16, "sink_tokens": 2, "kept_keys": 5}
EXACT = [(0, 1), (1, 0), (1, 1)]
UNLIKE = {"head_kept_keys": {(0, 0): 9, (2, 1): 0}, "softmax_heads": [(0, 1)]}
#: Conversions by name: their settings, the number of prompts, what is passed to vLLM, the model's class.
FOLDERS = {
    "exact heads": ({"softmax_heads": EXACT}, 64, {}, None),
    "linear only": ({}, 16, {}, None),
    "heads that keep other numbers": (UNLIKE, 16, {}, None),
    "pure": ({"window": 0, "kept_keys": 0, "sink_tokens": 0}, 16, {}, None),
    "every second layer": ({"layers": [0, 2]}, 8, {}, None),
    "cached prefixes": ({"softmax_heads": EXACT}, 16, {"enable_prefix_caching": True}, None),
    "few pages": ({"softmax_heads": EXACT}, 8, {"num_gpu_blocks_override": 20}, None),
    "mistral": ({"softmax_heads": EXACT}, 4, {}, MistralForCausalLM),
    "qwen2": ({"softmax_heads": EXACT}, 4, {}, Qwen2ForCausalLM),
    "qwen3": ({"softmax_heads": EXACT}, 4, {}, Qwen3ForCausalLM),
}  # fmt: skip


def prompts_of(name, count):
    """Ragged prompts; with cached prefixes they begin alike, for any number of tokens."""
    generator = torch.Generator().manual_seed(1)

    def draw(length):
        return torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()

    def length(longest):
        return int(torch.randint(3, longest, (), generator=generator))

    if name != "cached prefixes":
        return [draw(length(200)) for _ in range(count)]
    common = draw(290)
    return [common[: length(290)] + draw(length(60)) for _ in range(count)]


def write(folder, settings, model_class):
    changes = {} if model_class is None else {"model_class": model_class}
    if model_class is MistralForCausalLM:
        changes["sliding_window"] = None
    if model_class is Qwen3ForCausalLM:
        changes["head_dim"] = 32
    model = hf_rfa.convert(llama(**SIZES, **changes), RFAConfig(**{**SHORT, **settings}), calibrate=False)
    hf_rfa.save_pretrained(model, folder)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What vLLM answered, by the name of the folder, with the folder and the prompts."""
    root, jobs = tmp_path_factory.mktemp("folders"), {}
    for number, (name, (settings, count, options, model_class)) in enumerate(FOLDERS.items()):
        folder = root / str(number)
        write(folder, settings, model_class)
        jobs[name] = {"folder": str(folder), "prompts": prompts_of(name, count), "new": NEW, "options": options}
    return served(root, jobs)


def served(root, jobs):
    (root / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, paths.TESTS / "worker_vllm.py", root / "jobs.json", root / "answers.json"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    # Into a file: a pipe would end with the last of vLLM's processes only, and a rank that is stuck never does.
    with (root / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = process.wait(LIMIT)
        finally:
            with suppress(ProcessLookupError):  # none of them is left
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, (root / "log.txt").read_text()[-9000:]
    found = json.loads((root / "answers.json").read_text())
    return {name: {**job, **answer} for (name, job), answer in zip(jobs.items(), found, strict=True)}


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_tokens_are_those_of_transformers(answers, name):
    check(answers[name])


@pytest.mark.parametrize("name", ["linear only", "exact heads"])
def test_two_ranks_answer_as_one(tmp_path, name):
    """Each has one of the two key heads of a layer; with exact heads their layers are unlike."""
    write(tmp_path / "model", FOLDERS[name][0], None)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    job = {"folder": str(tmp_path / "model"), "prompts": prompts_of(name, 6), "new": NEW, "options": options}
    answer = served(tmp_path, {name: job})[name]
    exact = FOLDERS[name][0].get("softmax_heads", [])
    for rank, layers in enumerate(answer["layers"]):
        kinds = ["exact" if (layer, rank) in exact else "linear" for layer in range(SIZES["num_hidden_layers"])]
        expected = [f"model.layers.{layer}.self_attn.attn.{kind}_head{rank}" for layer, kind in enumerate(kinds)]
        assert layers == expected
    assert len(answer["layers"]) == 2
    check(answer)


def check(answer):
    """The greedy tokens are those of `model.generate`."""
    model = hf_rfa.from_pretrained(answer["folder"]).eval()
    for number, prompt in enumerate(answer["prompts"]):
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=None)
        assert answer["tokens"][number] == ids[0, len(prompt) :].tolist(), f"prompt {number} of {len(prompt)} tokens"
    assert len({token for tokens in answer["tokens"] for token in tokens}) > 20  # the model does not repeat itself


def test_prefixes_were_cached(answers):
    assert max(answers["cached prefixes"]["cached"]) >= 128  # a block
    assert max(answers["exact heads"]["cached"]) == 0
