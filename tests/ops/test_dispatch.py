"""Which form runs a call: what is asked for, or an error that says why it cannot."""

import pytest
import torch
from conversions import converted
from families import SHORT, build
from operator_inputs import random_inputs

import hf_rfa
from hf_rfa import ConfigError
from hf_rfa.ops import dispatch, linear


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def kernels_can_run(monkeypatch):
    """As on a machine with triton and something that runs it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())


def reason(*, dtype=torch.float32, feature_map="hyperbolic", window=16, value_dim=16, **inputs):
    """What the error of a forced call says."""
    inputs = random_inputs(40, dim=16, value_dim=value_dim, dtype=dtype, **inputs)
    with pytest.raises(ConfigError) as error:
        hf_rfa.rfa_attention(**inputs, feature_map=feature_map, window=window, sink_tokens=0, backend="triton")
    assert "backend='triton'" in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("kernels_can_run")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"window": 256}, "window is 256"),
        ({"value_dim": 300}, "head dims are 16 and 300"),
        ({"num_features": 1024, "value_dim": 64}, "1024 rows of omega"),
    ],
)
def test_what_is_forced_and_cannot_run_says_why(changes, words):
    assert words in reason(**changes)


@pytest.mark.usefixtures("no_interpreter")
def test_without_a_gpu_the_error_says_so(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    assert "device 'cpu'" in reason()


def test_without_triton_the_error_says_so(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in reason()


@pytest.mark.usefixtures("kernels_can_run")
def test_gates_and_encoders_are_not_the_kernels():
    inputs = random_inputs(40, dim=16, dtype=torch.float32)
    options = {"feature_map": "hyperbolic", "window": 16, "backend": "triton"}
    gate = {"gate_weight": torch.zeros(2, 16), "gate_bias": torch.zeros(2)}
    with pytest.raises(ConfigError, match="forget gate"):
        hf_rfa.rfa_attention(**inputs, **options, **gate)
    with pytest.raises(ConfigError, match="both sides"):
        hf_rfa.rfa_attention(**inputs, **options, causal=False)


def test_unknown_names_are_refused(tiny_llama):
    model = hf_rfa.convert(tiny_llama, SHORT, calibrate=False)
    with pytest.raises(ConfigError, match="'cuda'"):
        hf_rfa.set_backend(model, "cuda")
    with pytest.raises(ConfigError, match="'cuda'"):
        hf_rfa.rfa_attention(**random_inputs(40), window=16, backend="cuda")


@pytest.mark.usefixtures("no_interpreter")
def test_a_model_that_cannot_is_left_as_it_was(tiny_llama):
    model = hf_rfa.convert(tiny_llama, SHORT, calibrate=False)
    with pytest.raises(ConfigError, match="triton"):
        hf_rfa.set_backend(model, "triton")
    assert set(hf_rfa.backend(model).values()) == {"chunked"}


@pytest.mark.usefixtures("kernels_can_run")
def test_what_was_chosen_is_what_runs(tiny_llama, monkeypatch):
    model = hf_rfa.convert(tiny_llama, SHORT, calibrate=False)
    hf_rfa.set_backend(model, "triton")
    assert set(hf_rfa.backend(model).values()) == {"triton"}
    asked = []
    monkeypatch.setattr(linear, "causal_form", lambda call: asked.append(call.backend) or "chunked")
    model(torch.ones(1, 40, dtype=torch.int64))
    assert asked == ["triton"] * len(hf_rfa.backend(model))


def test_encoders_and_layers_that_stay_softmax_are_named():
    encoder = hf_rfa.convert(build("bert"), SHORT, calibrate=False)
    assert set(hf_rfa.backend(encoder).values()) == {"bidirectional"}
    partly = hf_rfa.RFAConfig(window=8, sink_tokens=2, layers=[1])
    model = hf_rfa.convert(build("llama"), partly, calibrate=False)
    assert hf_rfa.backend(model)[0] == "softmax"
    assert hf_rfa.backend(model)[1] == "chunked"


@pytest.mark.usefixtures("kernels_can_run")
def test_heads_that_keep_keys_run_on_the_kernels_too():
    model = converted(head_kept_keys={(0, 1): 8})
    hf_rfa.set_backend(model, "triton")
    assert set(hf_rfa.backend(model).values()) == {"triton"}
