# mypy: disable-error-code="import-untyped,import-not-found"
"""Token-weighted perplexity and bits per byte of a model, converted or not, as a metric of Hugging Face Evaluate.

metric = evaluate.load("hf_rfa/metrics/token_perplexity")   # the folder: works offline
metric = TokenPerplexity()                                  # or by class
metric.compute(predictions=texts, model=model, tokenizer=tokenizer, context=1024)
"""

import datasets
import evaluate
import torch

import hf_rfa.data
import hf_rfa.evaluation
import hf_rfa.evaluation.document_perplexity

_DESCRIPTION = "exp of the mean next-token loss over all tokens of all texts, in sliding windows, and bits per byte."


class TokenPerplexity(evaluate.Metric):
    """`perplexity` and `bits_per_byte` of texts under a causal LM.

    Arguments of `compute`: `predictions` (texts), `model`, `tokenizer`, `context` (tokens per window) and `stride`
    (tokens between windows, by default half of the context).
    """

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_DESCRIPTION, features=features
        )

    def _compute(self, predictions, model, tokenizer, context=1024, stride=None):
        documents = [hf_rfa.data.Document(str(i), text) for i, text in enumerate(predictions)]
        token_lists, num_bytes = hf_rfa.data.tokenize_documents(tokenizer, documents)
        nll = torch.cat(
            [
                hf_rfa.evaluation.document_perplexity.sliding_window_nll(model, ids, context, stride or context // 2)
                for ids in token_lists
            ]
        ).double()
        bits = hf_rfa.evaluation.bits_per_byte(float(nll.mean()), sum(num_bytes) / len(nll))
        return {"perplexity": float(nll.mean().exp()), "bits_per_byte": bits}
