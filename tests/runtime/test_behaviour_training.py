"""Training as people do it: gradient checkpointing under a LoRA, mixed precision, accumulated steps."""

import dataclasses

import pytest
import torch
from families import PEFT_ASKS, SHORT, build, token_ids
from torch.testing import assert_close

import hf_rfa

# Where each family projects its queries.
TARGETS = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "gemma3": ["q_proj", "v_proj"],
    "gpt_oss": ["q_proj", "v_proj"],
    "deepseek_v3": ["q_b_proj", "kv_b_proj"],
    "jamba": ["q_proj", "in_proj"],
}


def with_lora(family, **changes):
    peft = pytest.importorskip("peft")
    model = hf_rfa.convert(build(family), dataclasses.replace(SHORT, **changes), calibrate=False)
    config = peft.LoraConfig(
        r=2, target_modules=TARGETS[family], init_lora_weights=False, task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config).train()


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model, reentrant):
    base = model.get_base_model()
    # Transformers 5.23 renamed it.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    return model


@PEFT_ASKS
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_gradient_checkpointing_with_a_lora(family, reentrant):
    """Frozen base weights: without gradients of the inputs a reentrant checkpoint would train nothing, silently."""
    ids = token_ids()
    want = gradients(with_lora(family), ids)
    got = gradients(checkpointed(with_lora(family), reentrant), ids)
    assert want.keys() == got.keys()
    assert all("lora" in name for name in want)
    assert sum(gradient.abs().max() > 0 for gradient in want.values()) > len(want) / 2
    for name, gradient in want.items():
        assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
