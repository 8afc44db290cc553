"""torch.func on the operator and on converted models: the gradients are those of ordinary autograd."""

import pytest
import torch
from operator_inputs import assert_near, random_inputs
from operator_states import run_in_pieces
from transformers import LlamaConfig, LlamaForCausalLM

import hf_rfa

N = 41
VALID = torch.arange(N).expand(2, -1) > torch.tensor([[3], [0]])
CALLS = {
    "causal": {},
    "causal, of maps with a maximum": {"feature_map": "positive"},
    "without a window": {"window": 0, "sink_tokens": 0},
    "both sides": {"causal": False},
    "padding": {"token_mask": VALID},
    "padding, both sides": {"token_mask": VALID, "causal": False},
    "packing": {"segment_ids": (torch.arange(N) // 15).expand(2, -1)},
    "an exact head": {"softmax_heads": (1,)},
    "an exact head, padding": {"softmax_heads": (1,), "token_mask": VALID},
    "an exact head, packing": {"softmax_heads": (1,), "segment_ids": (torch.arange(N) // 15).expand(2, -1)},
    "kept keys": {"window": 4, "kept_keys": 5},
    "kept keys, padding": {"window": 4, "kept_keys": 5, "token_mask": VALID},
    "one token": {"length": 1},
    "one token, padding": {"length": 1, "token_mask": torch.tensor([[True], [False]])},
    "the kernels of Triton": {"backend": "triton", "length": 25},
    "the kernels of Triton, kept keys": {"backend": "triton", "length": 25, "window": 4, "kept_keys": 3},
}


def call_of(name):
    """A function of q, k, v and omega to a number, and its arguments."""
    options = {"feature_map": "hyperbolic", "window": 8, "sink_tokens": 2, "alpha": 0.4} | CALLS[name]
    if "backend" in options:
        pytest.importorskip("triton")
    sizes = {"heads": 1, "key_heads": 1, "batch": 1} if "backend" in options else {}  # it takes seconds a head
    inputs = random_inputs(options.pop("length", N), value_dim=8, dtype=torch.float32, **sizes)
    names = ("query", "key", "value", "omega")

    def function(*tensors):
        return hf_rfa.rfa_attention(**dict(zip(names, tensors, strict=True)), **options).square().sum()

    return function, [inputs[name] for name in names]


@pytest.mark.parametrize("name", CALLS)
def test_gradients_of_the_operator(name):
    function, arguments = call_of(name)
    leaves = [x.clone().requires_grad_() for x in arguments]
    value = function(*leaves)
    wanted = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    assert max(float(x.abs().max()) for x in wanted[:3]) > 1e-3
    found = torch.func.grad(function, argnums=(0, 1, 2, 3))(*arguments)
    again, pull_back = torch.func.vjp(function, *arguments)
    assert_near(again, value, 1e-6)
    for want, one, two in zip(wanted, found, pull_back(torch.ones(())), strict=True):
        assert_near(one, want, 1e-6)
        assert_near(two, want, 1e-6)


@pytest.mark.parametrize("name", ["causal", "causal, of maps with a maximum", "both sides"])
def test_gradients_of_each_example_and_of_all(name):
    function, arguments = call_of(name)
    examples = torch.stack([arguments[0], 0.5 * arguments[0].flip(2)])
    omega = arguments[3]

    def loss(query, omega):
        return function(query, *arguments[1:3], omega)

    wanted = [torch.func.grad(loss, argnums=(0, 1))(query, omega) for query in examples]
    found = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(examples, omega)
    for got, want in zip(found, zip(*wanted, strict=True), strict=True):
        assert_near(got, torch.stack(want), 1e-6)

    def together(omega):
        return torch.func.vmap(loss, in_dims=(0, None))(examples, omega).sum()

    assert_near(torch.func.grad(together)(omega), sum(of_omega for _, of_omega in wanted), 1e-5)


@pytest.mark.parametrize("over", ["query", "key", "value", "gate_weight", "gamma", "sink_logits"])
def test_whatever_is_mapped_over_keys_are_kept_for_each(over):
    inputs = random_inputs(N, value_dim=8) | {"gate_weight": torch.linspace(-0.4, 0.4, 16).double().view(2, 8)}
    inputs |= {"gamma": torch.tensor([0.5, 2.0]).double(), "sink_logits": torch.linspace(-1, 1, 4).double()}
    options = {"window": 4, "sink_tokens": 0, "kept_keys": 5, "alpha": 0.4, "gate_bias": torch.ones(2).double()}

    def loss(x):  # the choices are handed on in a state, to a chunk, a token and more
        output, _ = run_in_pieces(inputs | {over: x}, [22, 1, N - 23], **options)
        return output.square().sum()

    examples = torch.stack([inputs[over], 0.5 * inputs[over] + 0.1])
    wanted = torch.stack([torch.func.grad(loss)(x) for x in examples])
    assert float((wanted[0] - wanted[1]).abs().max()) > 1e-3
    assert_near(torch.func.vmap(loss)(examples), torch.stack([loss(x) for x in examples]), 1e-12)
    assert_near(torch.func.vmap(torch.func.grad(loss))(examples), wanted, 1e-12)
    assert_near(torch.func.grad(lambda xs: torch.func.vmap(loss)(xs).sum())(examples), wanted, 1e-12)


def test_padding_that_is_mapped_over_is_refused():
    inputs = random_inputs(N)
    token_mask = VALID[:, None].expand(-1, 2, -1)
    with pytest.raises(
        hf_rfa.ConfigError, match=r"must be the same for everything that `torch\.func\.vmap` maps over"
    ):
        torch.func.vmap(lambda token_mask: hf_rfa.rfa_attention(**inputs, window=8, token_mask=token_mask))(token_mask)


def test_second_derivatives_are_refused_with_a_reason():
    function, arguments = call_of("causal")

    def size_of_the_gradient(query):
        return torch.func.grad(function)(query, *arguments[1:]).square().sum()

    with pytest.raises(NotImplementedError, match="no derivative of the second order"):
        torch.func.grad(size_of_the_gradient)(arguments[0])


MODEL_CALLS = {
    "plain": {},
    "padding": {"attention_mask": VALID.long()},
    "packing": {"position_ids": (torch.arange(N) % 15).expand(2, -1)},
}


@pytest.mark.parametrize("inputs", MODEL_CALLS)
@pytest.mark.parametrize("more", [{}, {"omega": "learned", "softmax_heads": [(0, 1)]}, {"gate": True}], ids=str)
def test_functional_call_of_a_converted_model(more, inputs):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2))
    model = hf_rfa.convert(model, hf_rfa.RFAConfig(window=8, num_features=8, **more), calibrate=False).train()
    ids = torch.randint(64, (2, N), generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "labels": ids, "use_cache": False, **MODEL_CALLS[inputs]}
    parameters = dict(model.named_parameters())
    loss = model(**given).loss
    wanted = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    detached = {name: parameter.detach() for name, parameter in parameters.items()}

    def loss_of(parameters):
        return torch.func.functional_call(model, parameters, (), given).loss

    assert_near(loss_of(detached), loss, 1e-6)
    found = torch.func.grad(loss_of)(detached)
    for name, want in zip(parameters, wanted, strict=True):
        assert_near(found[name], want, 1e-6, name)
    assert any(float(found[name].abs().max()) > 1e-4 for name in found if "q_proj" in name)
