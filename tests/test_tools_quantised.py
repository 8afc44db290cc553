"""Models whose linear layers are quantised: the attention function gets their outputs and never touches a weight."""

import pytest
import torch
import torch.nn.functional as F
from families import SHORT, build, inputs_for, outputs_of, token_ids
from torch import nn
from torch.testing import assert_close

import hf_rfa
from hf_rfa import RFAConfig


class Int8Linear(nn.Module):
    """As bitsandbytes' Linear8bitLt: an int8 weight and a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
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
        self.shape = linear.weight.shape
        weight = linear.weight.detach().flatten()
        self.register_buffer("scale", weight.abs().max() / 7)
        levels = ((weight / self.scale).round() + 8).to(torch.uint8)
        self.weight = nn.Parameter((levels[0::2] * 16 + levels[1::2])[:, None], requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        packed = self.weight.flatten()
        levels = torch.stack([packed // 16, packed % 16], dim=1).flatten().to(x.dtype)
        return F.linear(x, ((levels - 8) * self.scale.to(x.dtype)).view(self.shape), self.bias)


KINDS = {"8 bit": Int8Linear, "4 bit": Int4Linear}


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
    converted = outputs_of(hf_rfa.convert(model, SHORT, calibrate=False), inputs)
    assert (converted - before).abs().max() > 1e-4
    quantised_later = quantise(hf_rfa.convert(build(family), SHORT, calibrate=False), kind)
    assert torch.equal(outputs_of(quantised_later, inputs), converted)
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


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_quantised_model_is_calibrated_without_its_output_projection(kind):
    """A weight of integers is not read: the error is measured before the projection then."""
    model = quantise(build("llama"), kind)
    hf_rfa.convert(model, RFAConfig(window=8, num_features=16, sink_tokens=2), calibrate=token_ids(2, 96))
    report = hf_rfa.calibration_report(model)
    assert len(report.heads) == 4
    assert all(0 <= head.loss < 1 for head in report.heads)
