"""Divergence behind a document, against the logits of document and continuation read at once."""

import pytest
import torch
import torch.nn.functional as F
from conversions import converted
from families import llama, token_ids

from hf_rfa.errors import ConfigError
from hf_rfa.evaluation.continuation import continuation_kl


def test_it_is_the_divergence_of_the_tokens_behind_the_document():
    original, model = llama(gain=8), converted(llama(gain=8), window=16, kept_keys=4)
    document, continuation = token_ids(1, 90)[0], token_ids(1, 30, seed=1)[0]
    with torch.no_grad():
        log_p, log_q = (
            each(torch.cat([document, continuation])[None]).logits[0, 90:].double().log_softmax(-1)
            for each in (original, model)
        )
    expected = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
    assert expected > 1e-3
    assert continuation_kl(original, model, document, continuation) == pytest.approx(expected, rel=1e-3)
    assert continuation_kl(original, original, document, continuation) == pytest.approx(0, abs=1e-7)
    with pytest.raises(ConfigError, match="Got 0 and 30"):
        continuation_kl(original, model, document[:0], continuation)
