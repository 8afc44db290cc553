"""Training as people do it: gradient checkpointing under a LoRA, mixed precision, accumulated steps."""

import pytest
from conversions import converted
from families import LORA_TARGETS, PEFT_ASKS, checkpoint_activations, lora, token_ids
from torch.testing import assert_close

TRAINED = [family for family in LORA_TARGETS if family != "bert"]  # causal ones


def with_lora(family, **changes):
    return lora(converted(family, **changes), family).train()


def gradients(model, ids):
    model.zero_grad()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def checkpointed(model, reentrant):
    base = model.get_base_model()
    checkpoint_activations(base, use_reentrant=reentrant)
    base.enable_input_require_grads()
    return model


@PEFT_ASKS
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", TRAINED)
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
