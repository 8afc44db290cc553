"""The operator as one operation of a graph: compiled and exported, it gives eager's numbers."""

from typing import Any

import pytest
import torch
from families import CACHE
from operator_inputs import assert_near, random_inputs, tokens
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_rfa
from hf_rfa import rfa_attention
from hf_rfa.ops.combine import FarStatistics

N = 100
PADDING = torch.ones(2, N, dtype=torch.bool)
PADDING[0, :30] = PADDING[1, 40:45] = False
GATE = {"gate_weight": torch.full((2, 8), 0.1), "gate_bias": torch.tensor([4.0, 2.0])}
OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 16},
    "pure": {"window": 0},
    "trigonometric": {"window": 16, "feature_map": "trigonometric"},
    "padding": {"window": 16, "token_mask": PADDING},
    "packing": {"window": 16, "segment_ids": torch.arange(N).expand(2, -1) // 33},
    "gate": {"window": 16, **GATE},
    "bidirectional": {"window": 16, "causal": False, "token_mask": PADDING},
    "exact head": {"window": 16, "softmax_heads": (0,)},
    "kept keys": {"window": 8, "kept_keys": 5, "token_mask": PADDING, **GATE},
    "centres": {"window": 16, "query_center": torch.full((2, 8), 0.2), "key_transform": torch.eye(8).repeat(2, 1, 1)},
}


def compiled(function, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_compiled_call_gives_the_same_outputs_states_and_gradients(options):
    inputs = random_inputs(N, dtype=torch.float32)

    def run(query, key, value, omega):
        return rfa_attention(query, key, value, omega=omega, output_final_state=True, **options)

    results = []
    for function in (run, compiled(run)):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        output, state = function(*leaves)
        loss = output.square().sum() + state.kv_state.square().sum() / N
        if state.kept_key is not None:
            loss = loss + state.kept_key.square().sum() + state.kept_value.square().sum() + state.kept_decay.sum()
        tensors = [tensor for name, tensor in state.to_dict().items() if name not in ("kv_state", "beside")]
        found = [output, *tensors]
        results.append([*found, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(results[1], results[0], strict=True):
        assert got.dtype == want.dtype
        assert_near(got.double(), want.double(), 1e-6)


def test_a_compiled_call_counts_dropped_far_parts():
    inputs = random_inputs(N, dtype=torch.float32, size=3.0)
    counts = []
    for wrap in (lambda f: f, compiled):
        statistics = FarStatistics()

        def run(query, key, value, omega, statistics=statistics):
            return rfa_attention(
                query, key, value, omega=omega, window=16, feature_map="trigonometric", statistics=statistics
            )

        function = wrap(run)
        function(**inputs)
        function(**inputs)
        counts.append(statistics.counts().tolist())
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


# torch 2.14 looks at `.grad` of what its own check has computed.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operation_is_what_its_schema_and_its_fake_say():
    inputs = {name: tensor.requires_grad_() for name, tensor in random_inputs(40, dtype=torch.float32).items()}
    heads = {name: torch.full((2,), 0.5) for name in ("alpha", "gamma", "proposal")}
    centres = {name: torch.zeros(2, 8) for name in ("query_center", "key_center")}
    tensors = {**inputs, **heads, **centres, "token_mask": torch.arange(40).expand(2, -1) > 3}
    tensors["query"] = inputs["query"].detach().unflatten(1, (2, 2)).requires_grad_()
    settings = (",".join(tensors), "positive,positive", [1, 16, 4, 0], 0.3, "auto", True, False)
    torch.library.opcheck(torch.ops.hf_rfa.linear_heads.default, (list(tensors.values()), *settings))


def test_lengths_that_differ_share_a_graph():
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(lambda **inputs: rfa_attention(**inputs, window=16), counter)
    for length in (50, 70, 90, 200, 333):
        inputs = random_inputs(length, dtype=torch.float32)
        assert_near(function(**inputs), rfa_attention(**inputs, window=16), 1e-6)
    assert counter.frame_count <= 2  # the second one with a symbol for the length


@pytest.mark.parametrize("kept_keys", [0, 5])
def test_decoding_steps_share_a_graph(kept_keys):
    inputs, options = random_inputs(N, dtype=torch.float32), {"window": 8, "sink_tokens": 2, "kept_keys": kept_keys}
    counter = CompileCounterWithBackend("aot_eager")

    def step(state, **new):
        return rfa_attention(**new, **options, initial_state=state, output_final_state=True)

    function = compiled(step, counter)
    whole = rfa_attention(**inputs, **options)
    _, state = rfa_attention(**tokens(inputs, slice(0, 1)), **options, output_final_state=True)
    for number in range(1, N):  # sinks, chunks and kept keys fill up, chunks move on
        output, state = function(state, **tokens(inputs, slice(number, number + 1)))
        assert_near(output, whole[:, :, number : number + 1], 1e-5)
    assert counter.frame_count == 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2)
    return hf_rfa.convert(LlamaForCausalLM(config), hf_rfa.RFAConfig(window=16), calibrate=False).eval()


def test_a_compiled_model_trains_like_an_eager_one(model):
    ids = torch.randint(64, (2, N), generator=torch.Generator().manual_seed(1))
    gradients = []
    for function in (model, compiled(model)):
        model.zero_grad()
        function(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert_near(got, want, 1e-5)


@torch.no_grad()
def test_a_compiled_model_decodes_without_recompiling(model):
    ids = torch.randint(64, (2, N), generator=torch.Generator().manual_seed(1))
    whole = model(input_ids=ids, use_cache=False).logits
    counter = CompileCounterWithBackend("aot_eager")
    cache = DynamicCache(config=model.config)
    model(input_ids=ids[:, :20], **{CACHE: cache})
    function = compiled(model, counter)
    for number in range(20, N):
        logits = function(input_ids=ids[:, number : number + 1], **{CACHE: cache}).logits
        assert_near(logits, whole[:, number : number + 1], 1e-5)
        if number == 22:
            settled = counter.frame_count
    assert counter.frame_count == settled


@torch.no_grad()
def test_a_model_is_exported(model):
    ids = torch.randint(64, (2, N), generator=torch.Generator().manual_seed(1))
    program = torch.export.export(model, (ids,), {"use_cache": False})
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    assert sum("hf_rfa.linear_heads" in str(node.target) for graph in graphs for node in graph.nodes) == 2
    other = ids.flip(1)
    assert_near(program.module()(other, use_cache=False).logits, model(other, use_cache=False).logits, 1e-5)
