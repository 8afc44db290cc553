"""What Transformers asks of every model's forward: the same answer every time, by every way to ask for it."""

import copy

import pytest
import torch
from conversions import converted
from families import SHORT, build, inputs_for, llama, outputs_of, token_ids
from torch.testing import assert_close
from transformers import DataCollatorWithFlattening, LlamaForSequenceClassification

import hf_rfa
from hf_rfa import UnsupportedModelError

DECODERS = ["llama", "gpt2", "gemma3", "deepseek_v3", "jamba"]
SIX = pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "jamba", "bert", "vit"])


@SIX
def test_a_forward_is_deterministic_in_evaluation_and_in_training(family):
    model = converted(family)
    inputs = inputs_for(model)
    first = outputs_of(model, inputs)
    torch.manual_seed(5)
    assert torch.equal(outputs_of(model, inputs), first)
    gradients = []
    for _ in range(2):
        model.train().zero_grad()
        model(**inputs)[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@SIX
def test_each_row_of_a_batch_is_what_it_is_alone(family):
    model = converted(family)
    inputs = inputs_for(model, batch=3)
    batch = outputs_of(model, inputs)
    for row in range(3):
        one = {name: v[row : row + 1] if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        assert_close(outputs_of(model, one)[0], batch[row], atol=1e-5, rtol=0)


@SIX
def test_a_tuple_holds_what_the_dictionary_holds(family):
    model = converted(family)
    inputs = inputs_for(model)
    with torch.no_grad():
        by_name = model(**inputs, output_hidden_states=True)
        by_place = model(**inputs, output_hidden_states=True, return_dict=False)
    for one, two in zip(by_name.to_tuple(), by_place, strict=True):
        for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (one, two)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_embeddings_are_tokens(family):
    model, ids = converted(family), token_ids()
    embeddings = model.get_input_embeddings()(ids)
    options = {"use_cache": False} if family != "bert" else {}
    by_ids = outputs_of(model, {"input_ids": ids, **options})
    assert_close(outputs_of(model, {"inputs_embeds": embeddings, **options}), by_ids, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss", "bert", "vit", "bart"])
@pytest.mark.parametrize("where", ["argument", "config"])
def test_attention_weights_are_refused_wherever_they_are_asked_for(family, where):
    """GPT-2 and OPT swallow the argument, and from the config every model would answer with an empty tuple."""
    model = build(family)
    inputs = inputs_for(model)
    if where == "argument":
        hf_rfa.convert(model, SHORT, calibrate=False)
        with pytest.raises(UnsupportedModelError, match="output_attentions=True"):
            model(**inputs, output_attentions=True)
        assert torch.isfinite(outputs_of(model, {**inputs, "output_attentions": False})).all()
    else:
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        before = model(**inputs)
        with pytest.raises(UnsupportedModelError, match="output_attentions=True"):
            hf_rfa.convert(model, SHORT, calibrate=False)
        assert torch.equal(model(**inputs)[0], before[0])


def test_the_inner_model_refuses_attention_weights_too():
    model = converted("opt")
    with pytest.raises(UnsupportedModelError, match="output_attentions=True"):
        model.model(token_ids(), output_attentions=True)
    weights = hf_rfa.revert(model).model(token_ids(), output_attentions=True)
    assert "attentions" in weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox", "deepseek_v3", "cohere"])
def test_the_loss_of_a_flattened_batch_is_the_loss_of_its_documents(family):
    model = converted(family)
    documents = [{"input_ids": token_ids(1, n, seed=n)[0].tolist()} for n in (30, 3, 25, 12)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(documents)
    total, count = 0.0, 0
    for segment_ids in documents:
        ids = torch.tensor([segment_ids["input_ids"]])
        with torch.no_grad():
            total += model(ids, labels=ids, use_cache=False).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    with torch.no_grad():
        assert model(**batch, use_cache=False).loss.item() == pytest.approx(total / count, abs=1e-5)


def test_a_sequence_classifier_reads_the_last_token_of_a_padded_row():
    model = converted(llama(LlamaForSequenceClassification, num_labels=3))
    ids = token_ids()
    alone = outputs_of(model, {"input_ids": ids[:1, :47]})
    mask = (torch.arange(70) < torch.tensor([[47], [70]])).long()
    padded = outputs_of(model, {"input_ids": ids.where(mask.bool(), 2), "attention_mask": mask})
    assert_close(padded[:1], alone, atol=1e-5, rtol=0)


def test_new_tokens_in_the_vocabulary_leave_the_conversion_alone():
    model, ids = converted(), token_ids()
    before = outputs_of(model, {"input_ids": ids})
    model.resize_token_embeddings(120, mean_resizing=False)
    assert torch.equal(outputs_of(model, {"input_ids": ids})[..., :99], before)
    assert outputs_of(model, {"input_ids": ids + 20}).shape == (2, 70, 120)


def test_another_implementation_set_by_hand_is_not_rfa_and_revert_still_works():
    model, ids = build("llama"), token_ids()
    softmax = outputs_of(copy.deepcopy(model), {"input_ids": ids})
    hf_rfa.convert(model, SHORT, calibrate=False)
    model.set_attn_implementation("sdpa")
    assert torch.equal(outputs_of(model, {"input_ids": ids, "use_cache": False}), softmax)
    assert torch.equal(outputs_of(hf_rfa.revert(model), {"input_ids": ids}), softmax)
