"""lm-evaluation-harness on a converted folder, with a task of one local file."""

import json

import pytest
import torch
from tokenizers_of_tests import byte_tokenizer

import hf_rfa

pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.mark.filterwarnings("default")  # the harness and its imports warn about themselves
def test_a_local_task_runs(tiny_llama, tmp_path):
    from hf_rfa.lm_eval import evaluate

    tiny_llama.resize_token_embeddings(258)
    model = hf_rfa.convert(tiny_llama, hf_rfa.RFAConfig(num_features=8, window=8, sink_tokens=2), calibrate=False)
    hf_rfa.save_pretrained(model, tmp_path / "model")
    byte_tokenizer(bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "model")
    rows = [{"question": "one", "word": " two"}, {"question": "three", "word": " four"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(
        f"task: tiny_local\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{word}}'\n"
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
    )
    results = evaluate(str(tmp_path / "model"), ["tiny_local"], include_path=str(tmp_path))
    found = results["tiny_local"]["perplexity,none"]
    assert torch.isfinite(torch.tensor(found))
    assert found > 1
