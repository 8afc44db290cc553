"""The metric of Hugging Face Evaluate, whole-document perplexities and the passkey task, against what they must be."""

import math

import pytest
import torch
import torch.nn.functional as F
from families import token_ids
from trained_by_hand import Copier

import hf_rfa
from hf_rfa.errors import ConfigError, UnsupportedModelError
from hf_rfa.evaluation.document_perplexity import document_perplexity, sliding_window_nll, streaming_nll
from hf_rfa.evaluation.retrieval_tasks import KEY, passkey_retrieval


@torch.no_grad()
def whole_nll(model, ids):
    return F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")


def test_sliding_window_scores_each_token_once_with_the_context_promised(tiny_llama):
    ids = token_ids(1, 100, vocabulary=128)[0]
    nll = sliding_window_nll(tiny_llama, ids, context=40, stride=15)
    assert nll.shape == (99,)
    torch.testing.assert_close(nll[:39], whole_nll(tiny_llama, ids[:40]))
    torch.testing.assert_close(nll[39:54], whole_nll(tiny_llama, ids[15:55])[-15:])
    torch.testing.assert_close(sliding_window_nll(tiny_llama, ids, 200, 50), whole_nll(tiny_llama, ids))
    with pytest.raises(ConfigError, match="`stride` < `context`"):
        sliding_window_nll(tiny_llama, ids, context=40, stride=40)


def test_streaming_is_the_loss_of_the_whole_document(tiny_llama):
    ids = token_ids(1, 150, vocabulary=128)[0]
    with pytest.raises(UnsupportedModelError, match="not converted"):
        streaming_nll(tiny_llama, ids)
    config = hf_rfa.RFAConfig(num_features=8, window=8, sink_tokens=2, softmax_heads=[(0, 1)])
    model = hf_rfa.convert(tiny_llama, config, calibrate=False)
    torch.testing.assert_close(streaming_nll(model, ids, chunk=32), whole_nll(model, ids), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="two tokens"):
        streaming_nll(model, ids[:1])


def test_documents_are_weighted_by_their_tokens():
    losses = [torch.zeros(30), torch.full((10,), math.log(16.0))]
    assert document_perplexity(losses) == pytest.approx(2.0)


def test_passkey_is_found_by_a_model_that_reaches_it_and_by_no_other():
    ids = token_ids(1, 800, vocabulary=128)[0]
    far = passkey_retrieval(Copier(1000, match=4, vocabulary=128), ids, lengths=[100], depths=[0.0, 1.0], samples=2)
    near = passkey_retrieval(Copier(40, match=4, vocabulary=128), ids, lengths=[100], depths=[0.0, 1.0], samples=2)
    assert [score.accuracy for score in far] == [1.0, 1.0]
    assert near[0].accuracy < 2 / KEY
    assert near[1].accuracy == 1.0
    with pytest.raises(ConfigError, match="depths in"):
        passkey_retrieval(Copier(9), ids, lengths=[100], depths=[2.0])


def test_the_metric_loads_from_its_folder_and_counts_tokens(tiny_llama, tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    from processes import ROOT
    from tokenizers_of_tests import byte_tokenizer

    tiny_llama.resize_token_embeddings(258)
    tokenizer = byte_tokenizer(bos_token="<s>")
    texts = ["a short text", "another text that is longer than the first"]
    metric = evaluate.load(str(ROOT / "hf_rfa" / "metrics" / "token_perplexity"), cache_dir=str(tmp_path))
    found = metric.compute(predictions=texts, model=tiny_llama, tokenizer=tokenizer, context=64)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids])
        nll = whole_nll(tiny_llama, ids)
        total, count = total + nll.sum().item(), count + len(nll)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    from hf_rfa.metrics.token_perplexity.token_perplexity import TokenPerplexity

    by_class = TokenPerplexity(cache_dir=str(tmp_path / "class"))
    assert by_class.compute(predictions=texts, model=tiny_llama, tokenizer=tokenizer, context=64) == found
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / sum(map(len, texts)), rel=1e-4)
