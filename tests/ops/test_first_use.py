"""Whether the Triton kernels are used unasked: the whole decision, in Triton's interpreter, the CPU as the device.

The times are made up, since the interpreter's say nothing.
"""

import dataclasses
import json
import logging
import os
import subprocess
import sys

import paths
import pytest
import torch
from operator_inputs import random_inputs

from hf_rfa import ConfigError, rfa_attention
from hf_rfa.ops import dispatch
from hf_rfa.ops.arguments import operator_arguments
from hf_rfa.ops.call import OperatorCall
from hf_rfa.ops.first_use import check, decision
from hf_rfa.ops.first_use.decision import FirstUse
from hf_rfa.ops.first_use.kind import Kind, size_class
from hf_rfa.ops.first_use.verdicts import Verdict, VerdictFolder
from hf_rfa.runtime.quiet import plain_torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands in for a GPU")
OPTIONS = {"feature_map": "hyperbolic", "window": 4, "sink_tokens": 1}


def call_of(length=20, dtype=torch.float32, **options):
    inputs = random_inputs(length, dim=16, value_dim=16, num_features=4, dtype=dtype, heads=1, key_heads=1, batch=1)
    objects = operator_arguments(**inputs, **OPTIONS | options)
    return OperatorCall.of(*(inputs[name] for name in ("query", "key", "value")), *objects)


@pytest.fixture
def folder(tmp_path):
    return VerdictFolder(tmp_path / "verdicts")


@pytest.fixture
def times(monkeypatch):
    """Seconds that the runs of a check take: PyTorch, Triton, and again with the backward pass."""
    left = []

    def seconds(run, device):
        if not left:
            left.extend([6.0, 1.0, 8.0, 2.0])
        return left.pop(0)

    monkeypatch.setattr(check, "seconds", seconds)


@pytest.fixture
def checks(monkeypatch):
    """The kinds that were checked."""
    found, whole = [], decision.check
    monkeypatch.setattr(decision, "check", lambda kind, call: found.append(kind) or whole(kind, call))
    return found


def asked(folder):
    """A process that has asked nothing yet."""
    return FirstUse(folder, devices=("cpu",))


@pytest.mark.usefixtures("times")
def test_kernels_that_agree_and_are_faster_are_used_and_that_is_remembered(folder, checks, caplog):
    first = asked(folder)
    with caplog.at_level(logging.INFO, "hf_rfa"):
        assert first.serve(call_of())
        assert first.serve(call_of(19))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("triton: error ")
    assert "4.0 times the form in PyTorch" in line  # the passes that come off worst
    assert asked(folder).serve(call_of())  # as another process
    assert len(checks) == 1
    saved = json.loads(folder.file(checks[0]).read_text())["verdict"]
    assert saved["speed"] == 4.0
    assert 0 < saved["error"] < 1e-5


def test_kernels_that_are_slower_are_not_used_and_nobody_is_warned(folder, checks, monkeypatch):
    monkeypatch.setattr(decision, "check", lambda kind, call: checks.append(kind) or Verdict(error=1e-6, speed=0.7))
    assert not asked(folder).serve(call_of())
    assert not asked(folder).serve(call_of())
    assert len(checks) == 1


@pytest.mark.usefixtures("times")
@pytest.mark.parametrize("task", ["causal", "decode"])
def test_kernels_that_forget_the_limit_of_the_far_part_are_not_used(folder, monkeypatch, task):
    """Every calibrated model has one, so that the check must look at it."""
    from hf_rfa.ops.triton import causal, decoding

    call = call_of(far_limit=torch.tensor([0.2]))
    assert asked(folder).serve(call, task)
    for module in (causal, decoding):
        name = "triton_causal" if module is causal else "_prepared"
        right = getattr(module, name)

        def without(given, *rest, right=right, module=module):
            far = given.far if module is causal else given
            far = dataclasses.replace(far, far_limit=None)
            return right(given.replace(far=far) if module is causal else far, *rest)

        monkeypatch.setattr(module, name, without)
    with pytest.warns(UserWarning, match="output: relative error"):
        assert not asked(VerdictFolder(folder.file(Kind.of(call, task)).parent / "new")).serve(call, task)


@pytest.mark.usefixtures("times")
@pytest.mark.parametrize("broken", ["output", "gradient of key"])
def test_kernels_that_disagree_are_not_used(folder, checks, monkeypatch, broken):
    from hf_rfa.ops.triton import launch_gradients
    from hf_rfa.ops.triton.launch import Launch

    if broken == "output":
        right = Launch.forward
        monkeypatch.setattr(Launch, "forward", lambda self: (right(self)[0] * 1.001, *right(self)[1:]))
    else:

        class Wrong:
            """The kernel, on half of the gradient of the far sums."""

            def __getitem__(self, grid):
                def run(*tensors, **sizes):
                    tensors[19].mul_(0.5)
                    return whole[grid](*tensors, **sizes)

                return run

        whole = launch_gradients.key_gradients
        monkeypatch.setattr(launch_gradients, "key_gradients", Wrong())
    with pytest.warns(UserWarning, match=rf"{broken}.*: relative error"):
        assert not asked(folder).serve(call_of())
    with pytest.warns(UserWarning, match=broken):  # the next process is told, too, and checks nothing
        assert not asked(folder).serve(call_of())
    assert len(checks) == 1


def test_a_nan_is_an_error():
    assert check.relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")


@pytest.mark.usefixtures("times")
def test_kernels_that_do_not_compile_are_not_used(folder, checks, monkeypatch):
    from hf_rfa.ops.triton.launch import Launch

    class CompilationError(Exception):
        pass

    def compiles(self):
        raise CompilationError("at 3:14:\n    x = y\nregisters ran out")

    monkeypatch.setattr(Launch, "forward", compiles)
    with pytest.warns(UserWarning, match="compiling: CompilationError: registers ran out"):
        assert not asked(folder).serve(call_of())
    assert folder.read(checks[0]).failed == "compiling"


@pytest.mark.usefixtures("times")
@pytest.mark.parametrize("form", ["chunked_form", "triton_form"])
def test_without_memory_to_check_them_they_are_not_used_this_time(folder, checks, monkeypatch, form):
    def full(call):
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(check, form, full)
        first = asked(folder)
        with pytest.warns(UserWarning, match="memory: Tried to allocate 2 GiB"):
            assert not first.serve(call_of())
    assert not first.serve(call_of())
    assert asked(folder).serve(call_of())  # the next process has more
    assert len(checks) == 2


@pytest.mark.usefixtures("times")
@pytest.mark.parametrize("content", ["", "{", "[]", '{"kind": {}, "verdict": {}}', '{"verdict": 3}', "wrong type"])
def test_a_damaged_file_is_written_anew(folder, checks, monkeypatch, content):
    good = Verdict(error=1e-6, speed=3.0)
    monkeypatch.setattr(decision, "check", lambda kind, call: checks.append(kind) or good)
    kind = Kind.of(call_of(), "causal")
    folder.write(kind, good)
    if content == "wrong type":
        content = folder.file(kind).read_text().replace("3.0", '"fast"')
    folder.file(kind).write_text(content)
    with pytest.warns(UserWarning, match="cannot be read.*written anew"):
        assert asked(folder).serve(call_of())
    assert checks == [kind]
    assert folder.read(kind) == good


def test_a_folder_that_cannot_be_written_costs_a_check_each_time(tmp_path, checks, monkeypatch):
    monkeypatch.setattr(decision, "check", lambda kind, call: checks.append(kind) or Verdict(error=1e-6, speed=3.0))
    (tmp_path / "file").write_text("")
    for _ in range(2):
        with pytest.warns(UserWarning, match="cannot be kept.*TRITON_CACHE_DIR"):
            assert asked(VerdictFolder(tmp_path / "file")).serve(call_of())
    assert len(checks) == 2


def test_two_processes_at_once(tmp_path):
    """Both write while both read: each finds a whole verdict, and no file is left over."""
    text = (
        "import sys, warnings; warnings.simplefilter('error'); sys.path.insert(0, 'tests/ops'); "
        "from test_first_use import *; folder = VerdictFolder(Path(sys.argv[1])); "
        "kind = Kind.of(call_of(), 'causal')\n"
        "for speed in range(40):\n"
        "    folder.write(kind, Verdict(error=1e-6, speed=2.0 + speed))\n"
        "    assert folder.read(kind).passed\n"
    )
    path = os.pathsep.join([str(paths.ROOT), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", "from pathlib import Path\n" + text, str(tmp_path)]
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=900)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    (file,) = tmp_path.iterdir()
    assert VerdictFolder(tmp_path).read(Kind.of(call_of(), "causal")).passed
    assert file.suffix == ".json"


def test_while_a_graph_is_recorded_nothing_is_checked_but_what_is_known_holds(folder, checks, monkeypatch):
    monkeypatch.setattr(decision, "check", lambda kind, call: checks.append(kind) or Verdict(error=1e-6, speed=3.0))
    first = asked(folder)
    with monkeypatch.context() as patch:
        patch.setattr(decision, "_is_recording", lambda device: True)
        assert not first.serve(call_of())
    assert checks == []
    assert first.serve(call_of())
    monkeypatch.setattr(decision, "_is_recording", lambda device: True)
    assert first.serve(call_of())
    assert not first.serve(call_of(300))  # of another size
    assert not asked(folder).serve(call_of())  # known on disk, but not compiled in this process


@pytest.mark.usefixtures("times")
def test_what_the_check_does_is_not_the_callers(folder):
    """Autocast, inference mode and the global generator have no say, and stay as they were."""
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert asked(folder).serve(call_of())
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_tensors_that_are_not_there_and_deterministic_runs_are_pytorchs(folder, checks, monkeypatch):
    monkeypatch.setattr(decision, "check", lambda kind, call: checks.append(kind) or Verdict(error=1e-6, speed=3.0))
    first, plain, keeping = asked(folder), call_of(), call_of(kept_keys=2)

    class Traced(torch.Tensor):
        pass

    assert not first.serve(plain.replace(query=plain.query.as_subclass(Traced)))
    torch.use_deterministic_algorithms(True)
    try:
        assert first.serve(plain)
        assert not first.serve(keeping)
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.serve(keeping)
    assert not FirstUse(folder).serve(plain)  # the interpreter is never chosen for its own sake


@pytest.mark.usefixtures("times")
def test_while_a_model_is_calibrated_no_kernels_are_compiled(folder, checks, monkeypatch):
    """It tries each of many shapes for a moment, which takes less time than to compile kernels for them."""
    kernels = asked(folder)
    monkeypatch.setattr(decision, "KERNELS", kernels)
    with plain_torch():
        assert not kernels.serve(call_of())
        assert dispatch.causal_form(call_of()) == "chunked"
        assert dispatch.causal_form(call_of(backend="triton")) == "triton"  # as it is asked for
    assert not checks
    assert kernels.serve(call_of())
    with plain_torch():
        assert not kernels.serve(call_of())


@pytest.mark.usefixtures("times")
def test_decoding_has_a_verdict_of_its_own(folder, checks, monkeypatch):
    from hf_rfa.ops.triton import decoding

    call = call_of(1, kept_keys=2)
    assert asked(folder).serve(call, "decode")
    assert [kind.task for kind in checks] == ["decode"]
    assert dispatch.decoding_form(call) == "recurrent"  # on a CPU
    with monkeypatch.context() as patch:
        patch.setattr(decision, "KERNELS", asked(folder))
        assert dispatch.decoding_form(call) == "triton"
    monkeypatch.setattr(decoding, "end_of_chunk", {(4,): lambda *arguments, **settings: None})
    with pytest.warns(UserWarning, match="output: relative error"):
        assert not asked(VerdictFolder(folder.path / "other")).serve(call, "decode")


def test_a_decoder_without_a_window_is_recurrent_whatever_is_requested():
    assert dispatch.decoding_form(call_of(1, window=0, sink_tokens=0).replace(backend="triton")) == "recurrent"
    assert dispatch.decoding_form(call_of(1).replace(backend="triton")) == "triton"
    assert dispatch.decoding_form(call_of(1).replace(backend="chunked")) == "recurrent"


def test_kinds_tell_apart_what_the_kernels_are_compiled_for():
    kinds = {
        Kind.of(call_of(**options), "causal")
        for options in (
            {}, {"kept_keys": 2}, {"window": 8}, {"feature_map": "positive"}, {"length": 300},
            {"sink_logits": torch.zeros(1)}, {"query_radius": 1.0}, {"dtype": torch.float16},
        )
    }  # fmt: skip
    kinds.add(Kind.of(call_of(), "decode"))
    assert len(kinds) == 9
    assert len({kind.digest for kind in kinds}) == 9
    assert [size_class(size) for size in (1, 2, 4, 5, 64, 65, 10**9)] == [1, 4, 4, 16, 64, 256, 4**9]


def test_the_operator_follows_the_verdict(monkeypatch, folder):
    """From the call to the form that runs it."""
    monkeypatch.setattr(decision, "check", lambda kind, call: Verdict(error=1e-6, speed=3.0))
    monkeypatch.setattr(decision, "KERNELS", asked(folder))
    call = call_of()
    assert dispatch.causal_form(call) == "triton"
    assert dispatch.causal_form(call.replace(backend="chunked")) == "chunked"
    assert dispatch.causal_form(call_of(dtype=torch.float64)) == "chunked"
    monkeypatch.setattr(decision, "KERNELS", FirstUse(folder))
    assert dispatch.causal_form(call) == "chunked"
    with pytest.raises(ConfigError, match="float64"):
        dispatch.form_of_call(call_of(dtype=torch.float64).replace(backend="triton"))


def test_a_layer_whose_heads_keep_different_numbers_asks_once(monkeypatch):
    asked_for = []

    class Kernels:
        def serve(self, call):
            asked_for.append(call.most_kept)
            return False

    monkeypatch.setattr(decision, "KERNELS", Kernels())
    inputs = random_inputs(
        20, dim=16, value_dim=16, num_features=4, dtype=torch.float32, heads=3, key_heads=3, batch=1
    )
    options = OPTIONS | {"kept_keys": (2, 0, 5)}
    output = rfa_attention(**inputs, **options)
    assert asked_for == [5]
    assert torch.equal(output, rfa_attention(**inputs, **options, backend="chunked"))
