"""`pipeline(...)` of Transformers around converted models, with a tokenizer made here."""

import pytest
import torch
import transformers
from conversions import converted
from families import SHORT, build, inputs_for, token_ids
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast, pipeline

import hf_rfa

SPECIAL = ("<bos>", "<eos>", "<pad>", "[MASK]", "[UNK]")
TEXTS = [" ".join(f"w{i}" for i in token_ids(1, n, seed=n)[0].tolist()) for n in (70, 40, 55)]


def tokenizer(side="right"):
    words = {name: number for number, name in enumerate((*SPECIAL, *(f"w{i}" for i in range(5, 99))))}
    whole = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("bos_token", "eos_token", "pad_token", "mask_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, padding_side=side, model_input_names=["input_ids", "attention_mask"], **names
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_oss", "deepseek_v3", "jamba"])
def test_text_generation_one_by_one_and_in_a_padded_batch(family):
    model, own = converted(family), tokenizer("left")
    run = pipeline("text-generation", model=model, tokenizer=own)
    options = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    model.generation_config.max_length = None  # else Transformers warns that there are two lengths
    want = []
    for text in TEXTS:
        ids = own(text, return_tensors="pt").input_ids
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        want.append(own.decode(tokens, skip_special_tokens=True))
    assert [run(text, **options)[0]["generated_text"] for text in TEXTS] == want
    assert [one[0]["generated_text"] for one in run(TEXTS, batch_size=3, **options)] == want


def test_fill_mask():
    model, own = converted("bert"), tokenizer()
    words = TEXTS[0].split()
    words[30] = "[MASK]"
    found = pipeline("fill-mask", model=model, tokenizer=own)(" ".join(words), top_k=3)
    with torch.no_grad():
        logits = model(**own(" ".join(words), return_tensors="pt")).logits[0, 30]
    best = logits.softmax(-1).topk(3)
    assert [one["token"] for one in found] == best.indices.tolist()
    assert [one["score"] for one in found] == pytest.approx(best.values.tolist())


def test_feature_extraction_of_a_padded_batch():
    config = build("bert").config
    model = converted(lambda: transformers.BertModel(config))
    run = pipeline("feature-extraction", model=model, tokenizer=tokenizer(), return_tensors=True)
    alone = [run(text) for text in TEXTS]
    for one, padded in zip(alone, run(TEXTS, batch_size=3), strict=True):
        assert_close(padded[:, : one.shape[1]], one, atol=2e-5, rtol=0)


def test_text_classification():
    config = build("bert").config
    config.num_labels = 3
    model = build(lambda: transformers.BertForSequenceClassification(config))
    hf_rfa.convert(model, SHORT, calibrate=False)
    own = tokenizer()
    found = pipeline("text-classification", model=model, tokenizer=own, top_k=None)(TEXTS[:1])[0]
    with torch.no_grad():
        scores = model(**own(TEXTS[0], return_tensors="pt")).logits[0].softmax(-1)
    assert {one["label"]: one["score"] for one in found} == pytest.approx(
        {f"LABEL_{number}": score for number, score in enumerate(scores.tolist())}
    )


def test_image_feature_extraction():
    model = converted("vit")
    processor = transformers.ViTImageProcessor(size={"height": 64, "width": 64}, do_rescale=False, do_normalize=False)
    run = pipeline("image-feature-extraction", model=model, image_processor=processor, return_tensors=True)
    images = pytest.importorskip("PIL.Image")
    picture = images.effect_noise((64, 64), 50).convert("RGB")
    with torch.no_grad():
        want = model(**processor(picture, return_tensors="pt")).last_hidden_state
    assert_close(run(picture), want, atol=1e-6, rtol=0)
    assert want.shape == model(**inputs_for(model, batch=1)).last_hidden_state.shape
