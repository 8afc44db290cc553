"""Models whose linear layers are quantised: no weight is read, what a layer does is asked of the layer."""

import pytest
import torch
import torch.nn.functional as F
from conversions import converted
from families import SHORT, build, inputs_for, outputs_of, token_ids
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import hf_rfa
from hf_rfa import RFAConfig
from hf_rfa.calibration.output_projection import linear_map, output_projection


class Int8Linear(nn.Module):
    """As bitsandbytes' Linear8bitLt: an int8 weight and a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class Int4Linear(nn.Module):
    """As bitsandbytes' Linear4bit: two numbers a byte, in a weight of shape (bytes, 1)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.shape = linear.in_features, linear.weight.shape
        weight = linear.weight.detach().flatten()
        self.register_buffer("scale", weight.abs().max() / 7)
        levels = ((weight / self.scale).round() + 8).to(torch.uint8)
        self.weight = nn.Parameter((levels[0::2] * 16 + levels[1::2])[:, None], requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.weight.flatten()
        levels = torch.stack([packed // 16, packed % 16], dim=1).flatten().to(x.dtype)
        return F.linear(x, ((levels - 8) * self.scale.to(x.dtype)).view(self.shape), self.bias)


class Float8Linear(nn.Linear):
    """As Transformers' FP8Linear: a weight that says it is floating-point, and a scale without which it is wrong."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax() / 448
        self.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


class QuantisedTensor(torch.Tensor):
    """As torchao's: a tensor of another dtype than its data's, with which only a linear layer can be computed."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> "QuantisedTensor":
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight: torch.Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.data8 = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = (*args, None)[:3]
            return F.linear(x, weight.data8.to(x.dtype) * weight.scale.to(x.dtype), bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of a quantised weight")


def with_quantised_tensor(linear: nn.Linear) -> nn.Linear:
    """The layer itself, with such a weight."""
    linear.weight = nn.Parameter(QuantisedTensor(linear.weight.detach()), requires_grad=False)
    return linear


KINDS = {"8 bit": Int8Linear, "4 bit": Int4Linear, "float8": Float8Linear}


def quantise(model, kind):
    """Every linear layer but the head, as bitsandbytes does it."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                setattr(parent, name, kind(child))
    return model


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "deepseek_v3", "bert", "vit"])
def test_a_quantised_model_converts_and_reverts(family, kind):
    model = quantise(build(family), kind)
    inputs = inputs_for(model)
    before = outputs_of(model, inputs)
    after = outputs_of(hf_rfa.convert(model, SHORT, calibrate=False), inputs)
    assert (after - before).abs().max() > 1e-4
    quantised_later = quantise(converted(family), kind)
    assert torch.equal(outputs_of(quantised_later, inputs), after)
    assert torch.equal(outputs_of(hf_rfa.revert(model), inputs), before)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_quantised_model_generates_and_a_window_over_everything_is_its_softmax(kind):
    model, ids = quantise(build("llama"), kind), token_ids()
    before = outputs_of(model, {"input_ids": ids})
    hf_rfa.convert(model, RFAConfig(window=70, num_features=16), calibrate=False)
    assert_close(outputs_of(model, {"input_ids": ids}), before, atol=2e-5, rtol=0)
    hf_rfa.convert(hf_rfa.revert(model), SHORT, calibrate=False)
    options = {"do_sample": False, "max_new_tokens": 8}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


ALL = {**KINDS, "tensor": with_quantised_tensor}
every_kind = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)


def dequantised(model):
    """The same model in float32: each quantised layer as the plain one that does what it does."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(getattr(child, "weight", None), QuantisedTensor) or type(child) in KINDS.values():
                plain = nn.Linear(child.in_features, child(torch.zeros(1, child.in_features)).shape[1])
                with torch.no_grad():
                    plain.bias.copy_(child(torch.zeros(1, child.in_features))[0])
                    plain.weight.copy_((child(torch.eye(child.in_features)) - plain.bias).T)
                setattr(parent, name, plain)
    return model


@every_kind
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bert"])
def test_calibration_is_that_of_the_dequantised_model(family, kind):
    ids = inputs_for(build("bert"), length=96) if family == "bert" else token_ids(2, 96)
    reports = []
    for model in (quantise(build(family), kind), dequantised(quantise(build(family), kind))):
        hf_rfa.convert(model, RFAConfig(window=8, num_features=16, sink_tokens=2), calibrate=ids)
        reports.append(hf_rfa.calibration_report(model))
    for got, want in zip(*(report.heads for report in reports), strict=True):
        costs = want.cost, want.window_cost
        assert (got.cost, got.window_cost) == pytest.approx(costs, rel=1e-2, abs=1e-8)
        assert 0 <= got.cost <= got.window_cost


@every_kind
def test_distillation_is_that_of_the_dequantised_model(kind):
    losses = []
    for model in (quantise(build("llama"), kind), dequantised(quantise(build("llama"), kind))):
        hf_rfa.convert(model, RFAConfig(window=8, num_features=16, sink_tokens=2), calibrate=False)
        result = hf_rfa.distill(model, [token_ids(2, 96)] * 2, hf_rfa.DistillConfig(steps=2, progress=False))
        losses += [result.losses]
    for got, want in zip(*losses, strict=True):
        assert got == pytest.approx(want, rel=1e-3)


# --- what a layer does to a basis ------------------------------------------------------------------------------------


def plain_linear(bias=True, out=24, size=32):
    torch.manual_seed(0)
    return nn.Linear(size, out, bias=bias)


def lora(linear):
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.lora import LoraConfig

    layer = LoraLinear(linear, "one", LoraConfig(), r=4)
    nn.init.normal_(layer.lora_B["one"].weight)
    return layer.eval()


def conv1d(linear):
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight.data, layer.bias.data = linear.weight.data.T.contiguous(), linear.bias.data
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda linear: linear, conv1d, lora], ids=["Linear", "Conv1D", "LoRA"])
def test_the_map_is_what_the_layer_does(make, dtype):
    layer = make(plain_linear()).to(dtype)
    got = output_projection(holder(layer), 32, torch.zeros(1, dtype=dtype))
    x = torch.randn(5, 32, dtype=dtype)
    want = (layer(x) - layer(torch.zeros_like(x))).float()
    assert got.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(x.float() @ got.T, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_bias_does_not_drown_small_weights(dtype):
    layer = plain_linear()
    layer.weight.data.mul_(1e-3)
    layer.bias.data.mul_(50)
    layer = layer.to(dtype)
    got = linear_map(layer, 32, dtype=dtype, device=torch.device("cpu"))
    error = (got - layer.weight.float()).norm() / layer.weight.float().norm()
    assert error < 0.01


def test_weights_of_nothing_but_zeros():
    layer = plain_linear()
    layer.weight.data.zero_()
    assert not linear_map(layer, 32, dtype=torch.float32, device=torch.device("cpu")).any()


class Curved(nn.Linear):
    def forward(self, x):
        return F.gelu(super().forward(x))


@pytest.mark.parametrize("layer", [Curved(32, 24), nn.Linear(31, 24), nn.Sequential(plain_linear()), nn.Identity()])
def test_what_is_no_linear_layer_of_that_size_is_not_known(layer):
    assert output_projection(holder(layer), 32, torch.zeros(1)) is None


def test_hooks_of_the_layer_see_only_what_the_model_computes():
    layer, seen = plain_linear(), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    assert output_projection(holder(layer), 32, torch.zeros(1)) is not None
    assert seen == []


def test_training_a_distillation_leaves_no_graph_behind():
    layer = plain_linear()
    assert not output_projection(holder(layer), 32, torch.zeros(1)).requires_grad


def holder(layer):
    module = nn.Module()
    module.o_proj = layer
    return module
