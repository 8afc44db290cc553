"""The benchmark's command at lengths at which it costs nothing: what its tables and its folder hold."""

import dataclasses
import json
import subprocess
import sys
import types

import pytest
import torch
from families import CACHE

import hf_rfa
from hf_rfa.runtime.arguments import cache_of

LLAMA = {"heads": 4, "key_heads": 1, "head_dim": 16, "num_features": 8, "window": 16}


@pytest.fixture
def benchmark(imported):
    return imported("benchmark")


def run(benchmark, folder, *options):
    """The rows of the JSON file, after the other two files were looked at."""
    benchmark.main([*options, "--output", str(folder)])
    (report,) = folder.glob("*.json")
    found = json.loads(report.read_text())
    assert found["command"].startswith("python scripts/benchmark.py ")
    assert found["torch"] == torch.__version__
    table = [line for line in report.with_suffix(".md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(found["rows"])
    assert len({line.count("|") for line in table}) == 1
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return found["rows"]


def test_times_have_a_row_for_each_pass_window_and_length(benchmark, tmp_path):
    rows = run(benchmark, tmp_path, "--lengths", "64", "130", "--repeats", "1", "--windows", "64", "0")
    found = [(row["pass"], row["window"], row["length"]) for row in rows]
    passes = ("forward", "forward+backward")
    assert found == [(which, window, n) for which in passes for window in (64, 0) for n in (64, 130)]
    assert all(list(row["seconds"]) == ["softmax", "RFA"] for row in rows)
    assert all(min(*row["seconds"].values(), row["floor_seconds"]) > 0 for row in rows)
    # Twice the tokens take twice the work at best.
    assert all(b["floor_seconds"] / a["floor_seconds"] == 130 / 64 for a, b in zip(rows[::2], rows[1::2], strict=True))


def test_times_in_bfloat16_beside_a_peer_and_with_grouped_heads(benchmark, tmp_path):
    options = ["--passes", "forward", "--lengths", "96", "--repeats", "1", "--clock", "cpu"]
    (row,) = run(
        benchmark, tmp_path, *options, "--dtype", "bfloat16", "--beside", "eager", "--heads", "4", "--key-heads", "2"
    )
    assert list(row["seconds"]) == ["softmax", "eager", "RFA"]
    assert json.loads((tmp_path / "time.json").read_text())["dtype"] == "bfloat16"


def test_the_floor_counts_what_the_table_says(benchmark):
    from benchmarks.floor import floor_seconds
    from benchmarks.setting import Setting

    fast_copy = {"matmul_flops": 1.0, "copy_bytes": torch.inf}
    m, dim, components, near = 64, 64, 128, 2 * 64 + 4
    forward = 4 * m * dim + 4 * components * (dim + 1) + 4 * near * dim
    assert floor_seconds("forward", Setting(), 10, fast_copy) == 8 * 10 * forward
    backward = 3 * 4 * m * dim + 3 * 4 * components * (dim + 1) + 2.5 * 4 * near * dim
    assert floor_seconds("forward+backward", Setting(), 10, fast_copy) == 8 * 10 * (forward + backward)
    grouped = 2 * m * dim * 1.25 + 2 * components * (dim + 1) * 1.25 + 4 * near * dim
    assert floor_seconds("forward", Setting(key_heads=2), 10, fast_copy) == 8 * 10 * grouped
    fast_product = {"matmul_flops": torch.inf, "copy_bytes": 1.0}
    assert floor_seconds("forward", Setting(), 10, fast_product) == 8 * 10 * 4 * dim * 4
    assert floor_seconds("forward+backward", Setting(dtype="bfloat16"), 10, fast_product) == 8 * 10 * 12 * dim * 2


@pytest.mark.parametrize(
    ("device", "which", "changes", "length", "goals"),
    [
        ("cpu", "forward", {}, 16384, ("≥ 14", "≤ 1.5")),
        ("cpu", "forward+backward", {"dtype": "bfloat16"}, 1024, ("≥ 1", "")),
        ("cpu", "forward", {"window": 0}, 16384, ("", "")),
        ("cpu", "forward", {"dtype": "float16"}, 16384, ("", "")),
        ("cuda", "forward+backward", {}, 16384, ("≥ 10", "≤ 2.5")),
        ("cuda", "forward", {"dtype": "float32"}, 65536, ("", "")),
    ],
)
def test_goals_stand_beside_the_calls_that_they_are_for(benchmark, device, which, changes, length, goals):
    from benchmarks import prefill
    from benchmarks.options import parse

    asked = benchmark._setting(parse(["--device", device], None))
    assert prefill.goals(device, which, dataclasses.replace(asked, **changes), length) == goals


def test_decoding_has_a_row_for_each_batch_and_context(benchmark, tmp_path):
    options = ["--contexts", "150", "300", "--batches", "1", "2", "--repeats", "1"]
    rows = run(benchmark, tmp_path, "--decode", *options)
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 150), (1, 300), (2, 150), (2, 300)]
    assert all(min(row["softmax_seconds"], row["rfa_seconds"]) > 0 for row in rows)


def test_softmax_is_left_out_of_decoding_where_it_has_not_the_memory(benchmark, tmp_path, capsys):
    # 8 heads of dim 64 in float32: 600 KiB after 150 tokens, 2.5 times of which are needed.
    options = ["--contexts", "150", "300", "--batches", "1", "--repeats", "1", "--memory-limit", "0.002"]
    rows = run(benchmark, tmp_path, "--decode", *options)
    assert [row["softmax_seconds"] is None for row in rows] == [False, True]
    assert "| 1 | 300 | - |" in capsys.readouterr().out


def test_a_whole_model_generates_with_a_cache_that_grows_for_softmax_alone(benchmark, tmp_path, monkeypatch):
    from benchmarks import generate

    monkeypatch.setattr(generate, "HIDDEN", 64)
    monkeypatch.setattr(generate, "PREFILL_CHUNK", 100)
    options = ["--contexts", "150", "260", "--batches", "1", "2", "--repeats", "1", "--heads", "4", "--head-dim", "16"]
    rows = run(benchmark, tmp_path, "--generate", *options)
    assert [(row["batch"], row["context"]) for row in rows] == [(1, 150), (1, 260), (2, 150), (2, 260)]
    for row in rows:
        assert row["rfa_cache_growth"] == 0
        assert row["softmax_cache_growth"] == 2 * 2 * row["batch"] * 16 * 4  # layers, k and v, rows, dim, bytes
        for name in ("softmax", "rfa"):
            assert row[f"{name}_seconds"] > row[f"{name}_forward_seconds"] > 0


def test_packed_documents_have_a_row_for_each_part_pass_and_length(benchmark, tmp_path, monkeypatch):
    from benchmarks import generate

    monkeypatch.setattr(generate, "HIDDEN", 64)
    options = ["--documents", "4", "30", "96", "--lengths", "64", "96", "--repeats", "1", "--clock", "cpu"]
    rows = run(benchmark, tmp_path, "--packed", *options, "--heads", "4", "--head-dim", "16")
    cases = [(64, 4), (64, 30), (96, 4), (96, 30), (96, 96)]  # a document must fit
    expected = [
        (part, which, *case) for part in ("attention", "model") for which in ("forward", "forward+backward")
        for case in cases
    ]  # fmt: skip
    assert [(row["part"], row["pass"], row["length"], row["document"]) for row in rows] == expected
    assert all(min(row["softmax_seconds"], row["rfa_seconds"]) > 0 for row in rows)


def test_packed_softmax_and_rfa_compute_the_same_where_all_keys_are_near(benchmark):
    from benchmarks.generate import models
    from benchmarks.packed import attention_calls, model_call
    from benchmarks.setting import Setting

    setting = Setting(heads=4, key_heads=2, head_dim=16, num_features=8)
    for document, same in ((30, True), (128, True), (300, False)):
        for which in ("forward", "forward+backward"):
            softmax, rfa = (call() for call in attention_calls(setting, which, 300, document))
            pairs = zip(softmax, rfa, strict=True)
            assert all(torch.allclose(*pair, atol=1e-4) for pair in pairs) == same
    setting = Setting(**LLAMA)
    original, converted = models(setting, layers=1)
    for document, same in ((5, True), (32, True), (64, False)):
        logits = [model_call(model, "forward", 64, document)().logits for model in (original, converted)]
        assert torch.allclose(*logits, atol=1e-4) == same
    model_call(converted, "forward+backward", 64, 5)()
    assert all(p.grad is None for p in converted.parameters())


def test_goals_of_packed_documents_are_for_training_steps_of_the_model(benchmark):
    from benchmarks.packed import goal

    assert [goal("model", "forward+backward", n) for n in (4, 16, 64, 256, 1024, 4096)] == [
        "≤ 1.2", "≤ 1.2", "≤ 1.2", "", "< 1", "< 1",
    ]  # fmt: skip
    assert goal("model", "forward", 4) == goal("attention", "forward+backward", 4) == ""


def test_the_context_that_is_filled_in_is_the_one_of_the_prompt(benchmark):
    from benchmarks.device import Meter
    from benchmarks.generate import models, prefill_contexts, timed_generate
    from benchmarks.setting import Setting

    _, model = models(Setting(**LLAMA))
    prompt = torch.arange(101)[None]
    cache = prefill_contexts(model, prompt, (40, 100))[100]
    assert cache.get_seq_length() == 100
    timed_generate(Meter("cpu"), model, cache, prompt, steps=3)
    whole = cache_of(model(prompt[:, :100], use_cache=True))
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        model(tokens[:, 100:104], **{CACHE: whole})
    assert cache.get_seq_length() == 104
    for layer, expected in zip(cache.layers, whole.layers, strict=True):
        torch.testing.assert_close(layer.state.kv_state, expected.state.kv_state)


def test_memory_is_measured_in_a_process_of_its_own(benchmark, tmp_path):
    options = ["--passes", "forward", "--lengths", "4096", "--longest-softmax", "1"]
    (row,) = run(benchmark, tmp_path, "--memory", *options)
    assert row["peak_bytes"]["softmax"] is None
    output = 8 * 4096 * 64 * 4  # bytes
    assert row["floor_bytes"] == output
    assert output <= row["peak_bytes"]["RFA"] < 10 * output


def test_a_method_beyond_the_memory_limit_is_told_apart_from_one_that_fails(benchmark, monkeypatch):
    from benchmarks import memory
    from benchmarks.setting import Setting

    # One matrix of scores is 0.5 GiB.
    assert memory.peak_bytes("eager", Setting(), "forward", 4096, limit=0.25) is None
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="ZeroDivisionError")
    monkeypatch.setattr(memory.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match=r"eager, forward, N = 64 failed in a process of its own:\nZeroDivision"):
        memory.peak_bytes("eager", Setting(), "forward", 64, limit=1.0)


def test_peers_have_times_memory_and_errors(benchmark, tmp_path, monkeypatch):
    from benchmarks.peers import operators as peers

    def peak_bytes(name, setting, which, length, limit):
        return None if name == "eager" and which != "forward" else 2**20

    monkeypatch.setattr(peers, "peak_bytes", peak_bytes)
    rows = run(benchmark, tmp_path, "--peers", "eager", "--lengths", "64", "200", "--repeats", "1")
    names = ["softmax", "rfa", "rfa-pure", "rfa-pure-unbiased", "eager"]
    assert [(row["length"], row["method"]) for row in rows] == [(n, name) for n in (64, 200) for name in names]
    errors = {(row["length"], row["method"]): row["error"] for row in rows}
    for length in (64, 200):
        assert errors[length, "eager"]["1.0"] < 1e-5
        # The unbiased estimate grows worse with the logits; 64 tokens all lie in the exact window.
        assert 0 < errors[length, "rfa-pure-unbiased"]["0.25"] < errors[length, "rfa-pure-unbiased"]["1.0"]
    assert errors[64, "rfa"]["1.0"] < 1e-5 < errors[200, "rfa"]["1.0"] < errors[200, "rfa-pure"]["1.0"]
    eager = [row for row in rows if row["method"] == "eager"]
    assert all(row["seconds"]["forward"] > 0 and row["seconds"]["forward+backward"] is None for row in eager)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "performer"], "performer cannot run: .*pip install performer-pytorch==1.1.4"),
        (["--peers", "fla-gla"], "fla-gla cannot run: .*--device cuda"),
        (["--beside", "fla-linear"], "fla-linear cannot run: "),
        (["--device", "cuda"], "--device cuda needs a GPU that torch can see"),
    ],
)
def test_what_cannot_run_here_says_why(benchmark, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "performer_pytorch", None)
    with pytest.raises(SystemExit, match=message):
        benchmark.main([*options, "--lengths", "64"])


def test_without_names_peers_that_cannot_run_are_named(benchmark, monkeypatch, capsys):
    from benchmarks.peers.operators import chosen_peers
    from benchmarks.setting import Setting

    monkeypatch.setitem(sys.modules, "performer_pytorch", None)
    assert chosen_peers([], Setting()) == ["eager"]
    told = capsys.readouterr().out
    assert "performer is not in the table: performer-pytorch is not installed" in told
    assert "fla-linear is not in the table: " in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decode", "--lengths", "64"], "--lengths says nothing to the mode 'decode'"),
        (["--contexts", "64"], "--contexts says nothing to the mode 'time'"),
        (["--decode", "--generate"], "not allowed with argument"),
        (["--peers", "flash"], "invalid choice: 'flash'"),
        (["--repeats", "0"], "--repeats takes numbers from 1 on. Got 0"),
        (["--lengths", "128", "64"], "--lengths must ascend. Got 128 64"),
        (["--documents", "4"], "--documents says nothing to the mode 'time'"),
        (["--packed", "--documents", "16", "4"], "--documents must ascend. Got 16 4"),
        (["--packed", "--documents", "128", "--lengths", "64"], "--documents must fit into --lengths. Got 128 and 64"),
        (["--heads", "4", "--key-heads", "3"], "--key-heads must divide --heads. Got 3 and 4"),
        (["--device", "cuda", "--clock", "cpu"], "--clock is of the CPU"),
    ],
)
def test_options_that_say_nothing_are_refused(benchmark, capsys, options, message):
    with pytest.raises(SystemExit):
        benchmark.main(options)
    assert message in capsys.readouterr().err


def test_a_gpu_is_timed_by_its_events(benchmark, monkeypatch):
    """The order of the calls of CUDA, which no machine of these tests has."""
    from benchmarks import device

    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("wait")

        def elapsed_time(self, end):
            return 250.0  # ms

    cuda = types.SimpleNamespace(
        is_available=lambda: True, Event=Event, synchronize=lambda: calls.append("wait for all"),
        reset_peak_memory_stats=lambda: calls.append("reset"), memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 700, get_device_name=lambda: "a GPU",
    )  # fmt: skip
    monkeypatch.setattr(device.torch, "cuda", cuda)
    meter = device.Meter("cuda")
    assert meter.seconds(lambda: calls.append("call")) == 0.25
    assert calls == ["record", "call", "record", "wait"]
    assert device.gpu_peak_bytes(lambda: calls.append("call")) == 600
    assert calls[4:] == ["wait for all", "reset", "call", "wait for all"]
    meter.now()
    assert calls[-1] == "wait for all"
    assert meter.name() == "a GPU"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [[], ["--memory"], ["--peers"]])
def test_tables_of_a_gpu(benchmark, tmp_path, mode):
    rows = run(benchmark, tmp_path, *mode, "--device", "cuda", "--lengths", "256", "1024", "--heads", "4")
    assert rows
    if not mode:
        assert all({"softmax", "RFA triton", "RFA chunked"} <= set(row["seconds"]) for row in rows)


def test_fla_gets_its_layout_and_its_normaliser(benchmark, monkeypatch):
    """With kernels of its interface that are written out, since its own need a GPU."""
    from benchmarks.methods import pass_call, relative_error
    from benchmarks.setting import Setting

    def chunk_simple_gla(q, k, v, scale=None):
        weights = scale * torch.einsum("bihk,bjhk->bhij", q, k).tril()
        return torch.einsum("bhij,bjhv->bihv", weights, v), None

    def chunk_linear_attn(q, k, v, scale=None, normalize=True):
        assert normalize
        total = chunk_simple_gla(q, k, torch.ones_like(v), scale)[0]
        return chunk_simple_gla(q, k, v, scale)[0] / total, None

    for name, function in (("linear_attn", chunk_linear_attn), ("simple_gla", chunk_simple_gla)):
        module = types.SimpleNamespace(**{function.__name__: function})
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    setting = Setting(heads=2, key_heads=2, head_dim=16, num_features=500)
    assert relative_error("fla-linear", setting, 80, 0.01) < 0.02 < relative_error("fla-linear", setting, 80, 1.0)
    assert relative_error("fla-gla", setting, 80, 0.25) is None
    tensors = setting.tensors(80, backward=True)
    for name in ("fla-linear", "fla-gla"):
        query, key, value = pass_call("forward+backward", name, setting, tensors)()
        assert query.shape == key.shape == (1, 80, 2, 1000)
        assert value.shape == (1, 80, 2, 16)


def test_softmax_of_a_gpu_is_flash_attention(benchmark, monkeypatch):
    from benchmarks import methods
    from benchmarks.setting import Setting
    from torch.nn.attention import SDPBackend

    asked = []
    original = methods.sdpa_kernel
    monkeypatch.setattr(methods, "sdpa_kernel", lambda kernel: asked.append(kernel) or original(kernel))
    tensors = Setting(heads=2, key_heads=2).tensors(70)
    expected = methods.method_call("softmax", Setting(heads=2, key_heads=2), tensors)[0]()
    setting = Setting(heads=2, key_heads=2, device="cuda", dtype="bfloat16")
    torch.testing.assert_close(methods.method_call("softmax", setting, tensors)[0](), expected)
    assert asked == [SDPBackend.FLASH_ATTENTION]


def test_features_of_fla_estimate_the_kernel(benchmark):
    """Their products are exp(q.k / sqrt D) up to one factor a tensor."""
    from benchmarks.methods import positive_features

    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(50, 16, generator=generator) / 2 for _ in range(2))
    omega = torch.randn(200_000, 16, generator=generator)
    estimate = positive_features(query, omega) @ positive_features(key, omega).mT
    exact = (query @ key.mT / 16**0.5).exp()
    torch.testing.assert_close(estimate / estimate.mean(), exact / exact.mean(), rtol=0.05, atol=0)


def test_variants_of_rfa_are_the_operators_own(benchmark):
    from benchmarks.methods import method_call
    from benchmarks.setting import Setting

    setting = Setting(heads=2, key_heads=2, head_dim=16, num_features=8)
    tensors = setting.tensors(200)
    pure, _ = method_call("rfa-pure", setting, tensors)
    options = setting.rfa_options()
    expected = hf_rfa.rfa_attention_reference(*tensors, **{**options, "window": 0, "sink_tokens": 0})
    torch.testing.assert_close(pure().double(), expected, rtol=1e-4, atol=1e-5)
